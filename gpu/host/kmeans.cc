#include "gpu/host/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "gpu/host/kmeans_tiles.h"
#include "gpu/host/simd.h"
#include "gpu/kmeans_seed.h"
#include "hwy/aligned_allocator.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "gpu/host/kmeans_kernels-inl.h"
#include "hwy/foreach_target.h"  // includes it once for each instruction set but the last
// The last one:
#include "gpu/host/kmeans_kernels-inl.h"

namespace clusterkv::gpu::host {
namespace {

HWY_EXPORT(PointsPerTile);
HWY_EXPORT(AssignTiles);

// fp32 copies of the keys that are held at once; more problems go in further batches.
constexpr size_t kBatchBytes = size_t{64} << 20;
// Units of work of the pool. They shape no sum, so no result depends on them.
constexpr size_t kTilesPerTask = 8;
constexpr size_t kClustersPerTask = 16;
// Points this close to their centroid are no better as a centroid of their own.
constexpr float kReseedBelow = 1.0f - 1e-5f;

constexpr uint32_t kNoLabel = std::numeric_limits<uint32_t>::max();

// A range of tiles or clusters of one problem.
struct Task {
  size_t problem;
  size_t begin;
  size_t end;
};

// The working set of one problem.
struct Clustering {
  const ClusterProblem* problem = nullptr;
  size_t clusters = 0;  // k
  size_t tiles = 0;
  uint32_t iterations = 0;
  bool done = false;
  std::vector<float> mean;                   // subtracted from every key; empty: nothing is
  hwy::AlignedFreeUniquePtr<float[]> units;  // keys of length 1, [tile][dim][point]
  std::vector<float> inverse_norms;          // [tokens]; 0: a key without a direction
  std::vector<float> centroids;              // of length 1, [group][dim][kCentroidGroup]
  std::vector<uint32_t> labels;              // [tiles * points per tile], as are the scores
  std::vector<float> scores;
  std::vector<uint32_t> grouped;  // [tokens] the labels by which members are grouped
  std::vector<uint8_t> moved;     // [clusters] lost or won a member by the last grouping
  std::vector<uint32_t> members;  // [tokens] points by cluster, ascending within one
  std::vector<uint32_t> begins;   // [clusters + 1] into members
  std::vector<uint32_t> sizes;    // [*count] after splitting
  std::vector<uint32_t> offsets;  // [*count] into members
};

// 1 / |key|, or 0 for a key that has no direction: zero, or not finite.
float InverseNorm(const float* key, size_t dim) {
  const float squared = Dot(key, key, dim);
  if (squared > 1e-30f && squared < 1e30f) return 1.0f / std::sqrt(squared);
  double exact = 0.0;  // fp32 may have lost it to overflow or underflow
  for (size_t i = 0; i < dim; ++i) exact += double{key[i]} * key[i];
  const float inverse = static_cast<float>(1.0 / std::sqrt(exact));
  return std::isfinite(inverse) ? inverse : 0.0f;
}

bool IsFinite(const float* key, size_t dim) {
  if (std::isfinite(Dot(key, key, dim))) return true;
  return std::all_of(key, key + dim, [](float x) { return std::isfinite(x); });
}

// Rows that are summed with weights.
class Rows {
 public:
  void Clear() {
    rows_.clear();
    weights_.clear();
  }
  void Add(const std::byte* row, float weight) {
    rows_.push_back(row);
    weights_.push_back(weight);
  }
  void Sum(DType dtype, size_t n, float* sum) const {
    std::fill_n(sum, n, 0.0f);
    AddWeightedRows(dtype, weights_.data(), 0, 1, rows_.data(), rows_.size(), n, sum);
  }

 private:
  std::vector<const std::byte*> rows_;
  std::vector<float> weights_;
};

// Some problems with the same arguments, in step: each phase is one parallel loop over all of
// them. A problem's arithmetic is the same in any batch and on any number of threads.
class Batch {
 public:
  Batch(ThreadPool& pool, const ClusterArgs& args)
      : pool_(pool),
        args_(args),
        dim_(args.head_dim),
        element_(SizeOf(args.dtype)),
        width_(HWY_DYNAMIC_DISPATCH(PointsPerTile)()) {}

  void Run(absl::Span<const ClusterProblem> problems);

 private:
  const std::byte* Row(const Clustering& c, size_t token) const {
    return c.problem->rows + token * 2 * dim_ * element_;  // K, then V
  }
  float* Unit(const Clustering& c, size_t token) const {
    return c.units.get() + token / width_ * width_ * dim_ + token % width_;
  }
  // Element i of the centroid is at [i * kCentroidGroup].
  float* Centroid(Clustering& c, size_t cluster) const {
    return c.centroids.data() + cluster / kCentroidGroup * kCentroidGroup * dim_ +
           cluster % kCentroidGroup;
  }
  template <typename Count>
  std::vector<Task> Tasks(size_t per_task, Count count) const;

  void Prepare(const ClusterProblem& problem, Clustering& c) const;
  void SetMean(Clustering& c) const;
  void Pack(Clustering& c, size_t first_tile, size_t end_tile) const;
  void Seed(Clustering& c) const;
  void Assign(Clustering& c, size_t first_tile, size_t end_tile) const;
  bool GroupByLabel(Clustering& c) const;
  void Reseed(Clustering& c) const;
  void UpdateCentroid(Clustering& c, size_t cluster, Rows& rows, float* sum) const;
  void SetCentroid(Clustering& c, size_t cluster, const float* unit, size_t stride) const;
  void WriteOrder(Clustering& c) const;
  void WriteMeans(const Clustering& c, size_t piece, Rows& rows, float* mean) const;

  ThreadPool& pool_;
  const ClusterArgs& args_;
  const size_t dim_;
  const size_t element_;  // bytes
  const size_t width_;    // points per tile
  std::vector<Clustering> clusterings_;
};

// Ranges of at most per_task over [0, count(c)) of every problem that is not done.
template <typename Count>
std::vector<Task> Batch::Tasks(size_t per_task, Count count) const {
  std::vector<Task> tasks;
  for (size_t p = 0; p < clusterings_.size(); ++p) {
    if (clusterings_[p].done) continue;
    const size_t end = count(clusterings_[p]);
    for (size_t begin = 0; begin < end; begin += per_task) {
      tasks.push_back({p, begin, std::min(end, begin + per_task)});
    }
  }
  return tasks;
}

void Batch::Run(absl::Span<const ClusterProblem> problems) {
  clusterings_.resize(problems.size());
  pool_.ParallelFor(problems.size(), [&](size_t p) { Prepare(problems[p], clusterings_[p]); });
  const auto tiles = [](const Clustering& c) { return c.tiles; };
  const auto clusters = [](const Clustering& c) { return c.clusters; };
  std::vector<Task> tasks = Tasks(kTilesPerTask, tiles);
  pool_.ParallelFor(tasks.size(), [&](size_t i) {
    Pack(clusterings_[tasks[i].problem], tasks[i].begin, tasks[i].end);
  });
  pool_.ParallelFor(problems.size(), [&](size_t p) { Seed(clusterings_[p]); });
  for (uint32_t iteration = 1;; ++iteration) {
    tasks = Tasks(kTilesPerTask, tiles);
    if (tasks.empty()) break;
    pool_.ParallelFor(tasks.size(), [&](size_t i) {
      Assign(clusterings_[tasks[i].problem], tasks[i].begin, tasks[i].end);
    });
    const bool last = iteration >= args_.iterations;
    pool_.ParallelFor(problems.size(), [&](size_t p) {
      Clustering& c = clusterings_[p];
      if (c.done) return;
      c.iterations = iteration;
      c.moved.assign(c.clusters, 0);
      const bool changed = GroupByLabel(c);
      c.done = last || !changed;
      if (!c.done) Reseed(c);
    });
    tasks = Tasks(kClustersPerTask, clusters);
    pool_.ParallelFor(tasks.size(), [&](size_t i) {
      std::vector<float> sum(dim_);
      Rows rows;
      for (size_t k = tasks[i].begin; k < tasks[i].end; ++k) {
        Clustering& c = clusterings_[tasks[i].problem];
        if (c.moved[k] != 0) UpdateCentroid(c, k, rows, sum.data());
      }
    });
  }
  pool_.ParallelFor(problems.size(), [&](size_t p) {
    WriteOrder(clusterings_[p]);
    clusterings_[p].done = false;
  });
  tasks = Tasks(kClustersPerTask, [](const Clustering& c) { return c.sizes.size(); });
  pool_.ParallelFor(tasks.size(), [&](size_t i) {
    std::vector<float> mean(2 * dim_);
    Rows rows;
    for (size_t piece = tasks[i].begin; piece < tasks[i].end; ++piece) {
      WriteMeans(clusterings_[tasks[i].problem], piece, rows, mean.data());
    }
  });
}

void Batch::Prepare(const ClusterProblem& problem, Clustering& c) const {
  c.problem = &problem;
  c.clusters = std::min(problem.clusters, problem.tokens);
  c.tiles = (problem.tokens + width_ - 1) / width_;
  c.done = false;
  c.units = hwy::AllocateAligned<float>(c.tiles * width_ * dim_);
  c.inverse_norms.assign(problem.tokens, 0.0f);
  const size_t groups = (c.clusters + kCentroidGroup - 1) / kCentroidGroup;
  c.centroids.assign(groups * kCentroidGroup * dim_, 0.0f);
  c.labels.resize(c.tiles * width_);
  c.scores.resize(c.tiles * width_);
  c.grouped.assign(problem.tokens, kNoLabel);
  c.members.resize(problem.tokens);
  c.mean.clear();
  if (args_.center_keys) SetMean(c);
}

void Batch::SetMean(Clustering& c) const {
  // Sums of 256 rows, then of those: a long fp32 sum would lose the small keys.
  std::vector<double> total(dim_, 0.0);
  std::vector<float> key(dim_), sum(dim_);
  size_t count = 0;
  for (size_t begin = 0; begin < c.problem->tokens; begin += 256) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    const size_t end = std::min<size_t>(c.problem->tokens, begin + 256);
    for (size_t t = begin; t < end; ++t) {
      ToFloat(args_.dtype, Row(c, t), key.data(), dim_);
      if (!IsFinite(key.data(), dim_)) continue;  // one NaN would take every key's direction
      AddScaled(DType::kFp32, 1.0f, key.data(), sum.data(), dim_);
      ++count;
    }
    for (size_t i = 0; i < dim_; ++i) total[i] += double{sum[i]};
  }
  c.mean.resize(dim_);
  const double divisor = static_cast<double>(std::max<size_t>(1, count));
  for (size_t i = 0; i < dim_; ++i) c.mean[i] = static_cast<float>(total[i] / divisor);
}

void Batch::Pack(Clustering& c, size_t first_tile, size_t end_tile) const {
  std::vector<float> key(dim_);
  for (size_t t = first_tile * width_; t < end_tile * width_; ++t) {
    float inverse = 0.0f;  // of the padding of the last tile
    if (t < c.problem->tokens) {
      ToFloat(args_.dtype, Row(c, t), key.data(), dim_);
      for (size_t i = 0; i < c.mean.size(); ++i) key[i] -= c.mean[i];
      inverse = InverseNorm(key.data(), dim_);
      c.inverse_norms[t] = inverse;
    }
    float* unit = Unit(c, t);
    for (size_t i = 0; i < dim_; ++i) unit[i * width_] = inverse == 0.0f ? 0.0f : inverse * key[i];
  }
}

void Batch::Seed(Clustering& c) const {
  for (uint32_t k = 0; k < c.clusters; ++k) {
    const SeedRange range =
        RangeOfSeed(c.problem->seed, k, static_cast<uint32_t>(c.clusters), c.problem->tokens);
    uint32_t token = 0;
    for (uint32_t i = 0; i < std::min(range.size, kSeedAttempts); ++i) {
      token = range.begin + (range.start + i) % range.size;
      if (c.inverse_norms[token] != 0.0f) break;
    }
    SetCentroid(c, k, Unit(c, token), width_);
  }
}

void Batch::SetCentroid(Clustering& c, size_t cluster, const float* unit, size_t stride) const {
  float* centroid = Centroid(c, cluster);
  for (size_t i = 0; i < dim_; ++i) centroid[i * kCentroidGroup] = unit[i * stride];
  if (cluster + 1 != c.clusters) return;
  // The rest of the last group repeats it: equal scores, so that the lower id, this one, wins.
  for (size_t pad = 1; (cluster + pad) % kCentroidGroup != 0; ++pad) {
    for (size_t i = 0; i < dim_; ++i) {
      centroid[i * kCentroidGroup + pad] = centroid[i * kCentroidGroup];
    }
  }
}

void Batch::Assign(Clustering& c, size_t first_tile, size_t end_tile) const {
  AssignTilesArgs args;
  args.points = c.units.get();
  args.centroids = c.centroids.data();
  args.centroid_groups = (c.clusters + kCentroidGroup - 1) / kCentroidGroup;
  args.dim = dim_;
  args.first_tile = first_tile;
  args.end_tile = end_tile;
  args.labels = c.labels.data();
  args.scores = c.scores.data();
  HWY_DYNAMIC_DISPATCH(AssignTiles)(args);
}

// A counting sort of the points. Whether a label differs from the last grouping's; the clusters
// concerned are added to `moved`.
bool Batch::GroupByLabel(Clustering& c) const {
  bool changed = false;
  c.begins.assign(c.clusters + 1, 0);
  const size_t tokens = c.problem->tokens;
  for (size_t t = 0; t < tokens; ++t) {
    const uint32_t label = c.labels[t];
    ++c.begins[label + 1];
    if (label == c.grouped[t]) continue;
    c.moved[label] = 1;
    if (c.grouped[t] != kNoLabel) c.moved[c.grouped[t]] = 1;
    c.grouped[t] = label;
    changed = true;
  }
  std::partial_sum(c.begins.begin(), c.begins.end(), c.begins.begin());
  std::vector<uint32_t> next(c.begins.begin(), c.begins.end() - 1);
  for (size_t t = 0; t < tokens; ++t) c.members[next[c.labels[t]]++] = static_cast<uint32_t>(t);
  return changed;
}

// Gives each empty cluster the point that fits its own cluster worst, of clusters with others.
void Batch::Reseed(Clustering& c) const {
  std::vector<uint32_t> empty;
  std::vector<uint32_t> sizes(c.clusters);
  for (size_t k = 0; k < c.clusters; ++k) {
    sizes[k] = c.begins[k + 1] - c.begins[k];
    if (sizes[k] == 0) empty.push_back(static_cast<uint32_t>(k));
  }
  if (empty.empty()) return;
  std::vector<uint32_t> worst;
  for (uint32_t t = 0; t < c.problem->tokens; ++t) {
    if (c.inverse_norms[t] != 0.0f && c.scores[t] < kReseedBelow) worst.push_back(t);
  }
  std::stable_sort(worst.begin(), worst.end(),
                   [&](uint32_t a, uint32_t b) { return c.scores[a] < c.scores[b]; });
  size_t filled = 0;
  for (const uint32_t t : worst) {
    if (filled == empty.size()) break;
    if (sizes[c.labels[t]] == 1) continue;
    --sizes[c.labels[t]];
    c.labels[t] = empty[filled++];
  }
  if (filled > 0) GroupByLabel(c);
}

// To the direction of the sum of its unit keys, which maximises their mean cosine. Without one
// (no members, or they cancel out) it stays where it is.
void Batch::UpdateCentroid(Clustering& c, size_t cluster, Rows& rows, float* sum) const {
  rows.Clear();
  double weights = 0.0;
  for (uint32_t m = c.begins[cluster]; m < c.begins[cluster + 1]; ++m) {
    const uint32_t token = c.members[m];
    if (c.inverse_norms[token] == 0.0f) continue;
    rows.Add(Row(c, token), c.inverse_norms[token]);
    weights += double{c.inverse_norms[token]};
  }
  rows.Sum(args_.dtype, dim_, sum);
  for (size_t i = 0; i < c.mean.size(); ++i) {
    sum[i] = static_cast<float>(double{sum[i]} - weights * double{c.mean[i]});
  }
  const float inverse = InverseNorm(sum, dim_);
  if (inverse == 0.0f) return;
  Scale(inverse, sum, dim_);
  SetCentroid(c, cluster, sum, 1);
}

void Batch::WriteOrder(Clustering& c) const {
  const uint32_t largest = std::max<uint32_t>(1, args_.largest_cluster_tokens);
  c.sizes.clear();
  c.offsets.clear();
  for (size_t k = 0; k < c.clusters; ++k) {
    const uint64_t size = c.begins[k + 1] - c.begins[k];
    const uint64_t pieces = (size + largest - 1) / largest;
    for (uint64_t piece = 0; piece < pieces; ++piece) {
      const uint64_t begin = size * piece / pieces;
      c.offsets.push_back(static_cast<uint32_t>(c.begins[k] + begin));
      c.sizes.push_back(static_cast<uint32_t>(size * (piece + 1) / pieces - begin));
    }
  }
  const ClusterProblem& problem = *c.problem;
  std::copy(c.members.begin(), c.members.end(), problem.order);
  std::copy(c.sizes.begin(), c.sizes.end(), problem.sizes);
  *problem.count = static_cast<uint32_t>(c.sizes.size());
  if (problem.iterations != nullptr) *problem.iterations = c.iterations;
}

// Of the raw rows; `mean` holds the key's and the value's.
void Batch::WriteMeans(const Clustering& c, size_t piece, Rows& rows, float* mean) const {
  rows.Clear();
  // Weights before the sum: it cannot overflow where the mean does not.
  const float weight = 1.0f / static_cast<float>(c.sizes[piece]);
  for (uint32_t m = 0; m < c.sizes[piece]; ++m) {
    rows.Add(Row(c, c.members[c.offsets[piece] + m]), weight);
  }
  rows.Sum(args_.dtype, 2 * dim_, mean);
  const size_t bytes = dim_ * element_;
  FromFloat(args_.dtype, mean, c.problem->centroids + piece * bytes, dim_);
  FromFloat(args_.dtype, mean + dim_, c.problem->value_means + piece * bytes, dim_);
}

}  // namespace

void ClusterProblems(ThreadPool& pool, const ClusterArgs& args) {
  Batch batch(pool, args);
  const absl::Span<const ClusterProblem> problems(args.problems);
  for (size_t begin = 0; begin < problems.size();) {
    size_t bytes = 0;
    size_t end = begin;
    while (end < problems.size() && (end == begin || bytes < kBatchBytes)) {
      bytes += size_t{problems[end++].tokens} * args.head_dim * sizeof(float);
    }
    batch.Run(problems.subspan(begin, end - begin));
    begin = end;
  }
}

}  // namespace clusterkv::gpu::host
