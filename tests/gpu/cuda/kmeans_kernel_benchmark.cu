// Checks of the k-means kernels against a plain CPU k-means, and their times.
//
//   kmeans_kernel_benchmark [--check] [--paths] [--large] [--bench] [--profile] [--seed N]
//
// --check: small cases of every shape and edge, for compute-sanitizer's memcheck. --paths: a few of
// them, for its racecheck. --large: cases of real size. --bench: times, median of CUDA event pairs.
// --profile: four iterations of the large case, for a profiler. Nothing but a CUDA runtime is
// needed; the exit status is the verdict.
//
// Medians, head_dim 128, bf16, 10 iterations, one H100 80GB HBM3, CUDA 13.0, --bench --seed 5;
// flash-kmeans 0.3.1 (cosine; torch 2.11, normal data) on the same card within the same minute:
//
//   problems x tokens, k        here      flash-kmeans
//   256 x 32,768, k = 400    21.4 ms      58.9 ms         402 TFLOP/s here
//     8 x 32,768, k = 400    1.27 ms      5.75 ms
//   256 x  8,192, k = 102    3.81 ms      11.7 ms
//     8 x  8,192, k = 102    0.49 ms      6.25 ms
//
// Of the first, by a profiler: an assignment 1.47 ms (two launches), a grouping 0.06 to 0.09, the
// first update 0.86, the next 0.68 and 0.56, means 1.5 (two launches), seeds 0.17.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "gpu/cuda/kernels/kmeans.h"
#include "gpu/kmeans_seed.h"

namespace clusterkv::gpu::cuda {
namespace {

void Require(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

enum class Data { kTopics, kNormal, kFewDistinct, kHostile, kZero, kNaN };

struct Case {
  const char* name = "";
  bool bf16 = true;
  uint32_t head_dim = 128;
  uint32_t iterations = 10;
  uint32_t largest = 320;
  bool center = false;
  Data data = Data::kTopics;
  std::vector<std::pair<uint32_t, uint32_t>> shapes;  // tokens, clusters
};

__device__ float Uniform(uint64_t seed, uint64_t i) {
  return (static_cast<float>(MixBits(seed + i * 0x9E3779B97F4A7C15u) >> 40) + 0.5f) *
         (1.0f / 16777216.0f);
}

__device__ float Normal(uint64_t seed, uint64_t i) {
  return sqrtf(-2.0f * logf(Uniform(seed, 2 * i))) * cospif(2.0f * Uniform(seed, 2 * i + 1));
}

// Keys like a model's: a common mean with a few large channels, topics that last some tokens, and
// noise about as large as the topic.
__device__ float Element(Data data, uint64_t seed, uint32_t tokens, uint32_t t, uint32_t i,
                         uint32_t head_dim) {
  const uint64_t at = uint64_t{t} * 2 * head_dim + i;
  const float noise = Normal(seed, at);
  if (data == Data::kZero) return i < head_dim ? 0.0f : noise;
  if (data == Data::kNaN) return NAN;
  if (i >= head_dim || data == Data::kNormal) return noise;
  if (data == Data::kFewDistinct) return Normal(seed + 1, uint64_t{t} * 7919 % 40 * 512 + i);
  const uint32_t topics = tokens / 48 + 1;
  const uint64_t topic = MixBits(seed + 3 + t / 12) % topics;
  float x = Normal(seed + 5, topic * 512 + i) + 0.7f * noise;
  x += Normal(seed + 7, i) * (i % 37 == 5 ? 6.0f : 0.4f);
  if (data == Data::kHostile) {
    switch (t % 97) {
      case 3:
        return 0.0f;
      case 5:
        return i % 9 == 0 ? NAN : x;
      case 11:
        return i == 1 ? INFINITY : x;
      case 17:
        return i == 2 ? -INFINITY : x;
      case 23:
        return x * 1e30f;  // infinite as fp16
      case 29:
        return x * 1e-30f;  // zero as fp16
      case 31:
        return -0.0f;
      default:
        break;
    }
  }
  return x;
}

__global__ void GenerateKernel(void* rows, bool bf16, Data data, uint64_t seed, uint32_t tokens,
                               uint32_t head_dim) {
  const uint64_t n = uint64_t{tokens} * 2 * head_dim;
  for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < n;
       i += uint64_t{gridDim.x} * blockDim.x) {
    const auto t = static_cast<uint32_t>(i / (2 * head_dim));
    const float x = Element(data, seed, tokens, t, i % (2 * head_dim), head_dim);
    if (bf16) {
      static_cast<__nv_bfloat16*>(rows)[i] = __float2bfloat16_rn(x);
    } else {
      static_cast<__half*>(rows)[i] = __float2half_rn(x);
    }
  }
}

float Decode(bool bf16, uint16_t bits) {
  if (!bf16) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

// Device memory of one case: rows, workspace, and results in one poisoned block.
class Run {
 public:
  Run(const Case& test, uint64_t seed) : case_(test) {
    args_.bf16 = test.bf16;
    args_.head_dim = test.head_dim;
    args_.iterations = test.iterations;
    args_.largest_cluster_tokens = test.largest;
    args_.center_keys = test.center;
    size_t rows = 0;
    size_t results = 0;
    for (const auto& [tokens, clusters] : test.shapes) {
      rows += size_t{tokens} * test.head_dim * 4;
      results += ResultBytes(tokens, clusters);
    }
    result_bytes_ = results;
    Require(cudaMalloc(&rows_, rows), "rows");
    Require(cudaMalloc(&results_, results), "results");
    size_t row_at = 0;
    size_t at = 0;
    for (size_t p = 0; p < test.shapes.size(); ++p) {
      const auto [tokens, clusters] = test.shapes[p];
      const size_t pieces = clusters + tokens / test.largest;
      KMeansProblem problem;
      problem.rows = rows_ + row_at;
      problem.tokens = tokens;
      problem.clusters = clusters;
      problem.seed = MixBits(seed + p);
      const auto take = [&](size_t bytes) {
        unsigned char* pointer = results_ + at;
        at += (bytes + 31) / 16 * 16;  // poison between: at least 16 bytes
        return pointer;
      };
      problem.order = reinterpret_cast<uint32_t*>(take(tokens * 4));
      problem.sizes = reinterpret_cast<uint32_t*>(take(pieces * 4));
      problem.centroids = take(pieces * test.head_dim * 2);
      problem.value_means = take(pieces * test.head_dim * 2);
      problem.count = reinterpret_cast<uint32_t*>(take(4));
      problem.iterations = reinterpret_cast<uint32_t*>(take(4));
      GenerateKernel<<<256, 256>>>(rows_ + row_at, test.bf16, test.data, MixBits(seed + 99 + p),
                                   tokens, test.head_dim);
      row_at += size_t{tokens} * test.head_dim * 4;
      problems_.push_back(problem);
    }
    args_.problems = problems_.data();
    args_.problem_count = static_cast<uint32_t>(problems_.size());
    workspace_bytes_ = KMeansWorkspaceBytes(args_);
    Require(cudaMalloc(&workspace_, workspace_bytes_), "workspace");
    Require(cudaDeviceSynchronize(), "generate");
  }
  ~Run() {
    cudaFree(rows_);
    cudaFree(results_);
    cudaFree(workspace_);
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  void Poison() {
    Require(cudaMemset(results_, 0xAB, result_bytes_), "poison");
    Require(cudaMemset(workspace_, 0xCD, workspace_bytes_), "poison");
  }
  void Launch(cudaStream_t stream) {
    Require(LaunchKMeans(args_, workspace_, stream), "LaunchKMeans");
  }
  std::vector<unsigned char> Results() const {
    std::vector<unsigned char> bytes(result_bytes_);
    Require(cudaMemcpy(bytes.data(), results_, result_bytes_, cudaMemcpyDeviceToHost), "results");
    return bytes;
  }
  std::vector<float> Rows(size_t p) const {
    const size_t n = size_t{problems_[p].tokens} * 2 * case_.head_dim;
    std::vector<uint16_t> bits(n);
    Require(cudaMemcpy(bits.data(), problems_[p].rows, n * 2, cudaMemcpyDeviceToHost), "rows");
    std::vector<float> rows(n);
    for (size_t i = 0; i < n; ++i) rows[i] = Decode(case_.bf16, bits[i]);
    return rows;
  }
  size_t OffsetOf(const void* result) const {
    return static_cast<size_t>(static_cast<const unsigned char*>(result) - results_);
  }
  const std::vector<KMeansProblem>& Problems() const { return problems_; }
  size_t WorkspaceBytes() const { return workspace_bytes_; }

 private:
  size_t ResultBytes(uint32_t tokens, uint32_t clusters) const {
    const size_t pieces = clusters + tokens / case_.largest;
    return tokens * 4 + pieces * (4 + 4 * case_.head_dim) + 4 + 5 * 32;
  }

  const Case& case_;
  KMeansArgs args_;
  std::vector<KMeansProblem> problems_;
  unsigned char* rows_ = nullptr;
  unsigned char* results_ = nullptr;
  unsigned char* workspace_ = nullptr;
  size_t result_bytes_ = 0;
  size_t workspace_bytes_ = 0;
};

// One problem's input and output on the host.
struct Answer {
  const Case* test;
  uint32_t tokens, clusters;
  uint64_t seed;
  std::vector<float> rows;                  // [tokens][2 * head_dim]
  std::vector<float> units;                 // [tokens][head_dim], zero without a direction
  std::vector<uint32_t> order, sizes;       // sizes: [count]
  uint32_t iterations = 0;                  // done
  std::vector<uint16_t> centroids, values;  // [count][head_dim]
  bool poison_kept = true;
};

void SetUnits(Answer& a) {
  const uint32_t d = a.test->head_dim;
  std::vector<double> mean(d, 0.0);
  if (a.test->center) {
    size_t finite = 0;
    for (uint32_t t = 0; t < a.tokens; ++t) {
      const float* row = &a.rows[size_t{t} * 2 * d];
      if (!std::all_of(row, row + d, [](float x) { return std::isfinite(x); })) continue;
      ++finite;
      for (uint32_t i = 0; i < d; ++i) mean[i] += row[i];
    }
    for (double& x : mean) x /= static_cast<double>(std::max<size_t>(finite, 1));
  }
  a.units.assign(size_t{a.tokens} * d, 0.0f);
  for (uint32_t t = 0; t < a.tokens; ++t) {
    double squared = 0.0;
    for (uint32_t i = 0; i < d; ++i) {
      const double x = a.rows[size_t{t} * 2 * d + i] - mean[i];
      squared += x * x;
    }
    if (!(squared > 0.0) || !std::isfinite(squared)) continue;
    for (uint32_t i = 0; i < d; ++i) {
      a.units[size_t{t} * d + i] =
          static_cast<float>((a.rows[size_t{t} * 2 * d + i] - mean[i]) / std::sqrt(squared));
    }
  }
}

float Dot(const float* a, const float* b, uint32_t n) {
  float lanes[8] = {};
  for (uint32_t i = 0; i < n; i += 8) {
    for (uint32_t j = 0; j < 8; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Directions of the clusters that labels make, and the mean cosine of keys to theirs.
double Directions(const Answer& a, const std::vector<uint32_t>& labels, uint32_t clusters,
                  std::vector<float>& directions) {
  const uint32_t d = a.test->head_dim;
  std::vector<double> sums(size_t{clusters} * d, 0.0);
  size_t directed = 0;
  for (uint32_t t = 0; t < a.tokens; ++t) {
    const float* unit = &a.units[size_t{t} * d];
    if (Dot(unit, unit, d) > 0.5f) ++directed;
    for (uint32_t i = 0; i < d; ++i) sums[size_t{labels[t]} * d + i] += unit[i];
  }
  double total = 0.0;
  for (uint32_t c = 0; c < clusters; ++c) {
    double squared = 0.0;
    for (uint32_t i = 0; i < d; ++i) squared += sums[size_t{c} * d + i] * sums[size_t{c} * d + i];
    const double norm = std::sqrt(squared);
    total += norm;
    if (norm < 1e-12) continue;
    for (uint32_t i = 0; i < d; ++i) {
      directions[size_t{c} * d + i] = static_cast<float>(sums[size_t{c} * d + i] / norm);
    }
  }
  return directed == 0 ? 1.0 : total / static_cast<double>(directed);
}

uint32_t Nearest(const Answer& a, uint32_t t, const std::vector<float>& directions,
                 uint32_t clusters) {
  const uint32_t d = a.test->head_dim;
  uint32_t best = 0;
  float best_score = -2.0f;
  for (uint32_t c = 0; c < clusters; ++c) {
    const float score = Dot(&a.units[size_t{t} * d], &directions[size_t{c} * d], d);
    if (score > best_score) {
      best = c;
      best_score = score;
    }
  }
  return best;
}

// A plain k-means from the same seeds; empty clusters stay. Splits as the kernels do.
double ReferenceObjective(const Answer& a) {
  const uint32_t d = a.test->head_dim;
  std::vector<float> directions(size_t{a.clusters} * d);
  for (uint32_t c = 0; c < a.clusters; ++c) {
    const auto range = RangeOfSeed(a.seed, c, a.clusters, a.tokens);
    std::copy_n(&a.units[size_t{range.begin + range.start} * d], d, &directions[size_t{c} * d]);
  }
  std::vector<uint32_t> labels(a.tokens, a.clusters);
  for (uint32_t i = 0; i < a.test->iterations; ++i) {
    bool changed = false;
    for (uint32_t t = 0; t < a.tokens; ++t) {
      const uint32_t label = Nearest(a, t, directions, a.clusters);
      changed |= label != labels[t];
      labels[t] = label;
    }
    if (!changed) break;
    Directions(a, labels, a.clusters, directions);
  }
  std::vector<uint64_t> sizes(a.clusters), seen(a.clusters);
  std::vector<uint32_t> first(a.clusters);
  for (const uint32_t label : labels) ++sizes[label];
  uint32_t pieces = 0;
  for (uint32_t c = 0; c < a.clusters; ++c) {
    first[c] = pieces;
    pieces += static_cast<uint32_t>((sizes[c] + a.test->largest - 1) / a.test->largest);
  }
  for (uint32_t t = 0; t < a.tokens; ++t) {
    const uint32_t c = labels[t];
    const uint64_t parts = (sizes[c] + a.test->largest - 1) / a.test->largest;
    uint64_t part = 0;
    while (sizes[c] * (part + 1) / parts <= seen[c]) ++part;
    ++seen[c];
    labels[t] = first[c] + static_cast<uint32_t>(part);
  }
  directions.assign(size_t{pieces} * d, 0.0f);
  return Directions(a, labels, pieces, directions);
}

// What is wrong with one problem's answer; empty: nothing.
class Checker {
 public:
  explicit Checker(const Answer& a) : a_(a), d_(a.test->head_dim) {}

  std::string Check() {
    if (!a_.poison_kept) return "wrote beyond its results";
    if (std::string fault = CheckOrder(); !fault.empty()) return fault;
    if (std::string fault = CheckMeans(); !fault.empty()) return fault;
    if (a_.iterations == 0 || a_.iterations > a_.test->iterations) {
      return "took " + std::to_string(a_.iterations) + " iterations";
    }
    std::vector<float> directions(a_.sizes.size() * d_);
    objective_ = Directions(a_, labels_, static_cast<uint32_t>(a_.sizes.size()), directions);
    if (a_.test->largest >= a_.tokens) {
      if (a_.test->iterations == 1) return CheckFirstLabels();
      if (a_.test->iterations >= 200) return CheckConverged(directions);
    }
    if (a_.test->data == Data::kZero || a_.test->data == Data::kNaN) return "";
    const double flop = 2.0 * a_.tokens * a_.clusters * d_ * a_.test->iterations;
    if (flop > 5e10) return "";  // a minute here
    reference_ = ReferenceObjective(a_);
    return "";
  }
  double Objective() const { return objective_; }
  double Reference() const { return reference_ == 0.0 ? objective_ : reference_; }

 private:
  std::string CheckOrder() {
    if (a_.sizes.empty() || a_.sizes.size() > a_.clusters + a_.tokens / a_.test->largest) {
      return "count " + std::to_string(a_.sizes.size());
    }
    labels_.assign(a_.tokens, UINT32_MAX);
    size_t at = 0;
    for (uint32_t c = 0; c < a_.sizes.size(); ++c) {
      if (a_.sizes[c] == 0 || a_.sizes[c] > a_.test->largest || a_.sizes[c] > a_.tokens - at) {
        return "size " + std::to_string(a_.sizes[c]) + " of cluster " + std::to_string(c);
      }
      for (uint32_t i = 0; i < a_.sizes[c]; ++i, ++at) {
        const uint32_t t = a_.order[at];
        if (t >= a_.tokens || labels_[t] != UINT32_MAX) return "order is no permutation";
        if (i > 0 && t <= a_.order[at - 1]) return "order does not ascend within a cluster";
        labels_[t] = c;
      }
    }
    return at == a_.tokens ? "" : "sizes add up to " + std::to_string(at);
  }
  std::string CheckMeans() const {
    const double rounding = a_.test->bf16 ? 1.0 / 256 : 1.0 / 2048;
    size_t at = 0;
    for (size_t c = 0; c < a_.sizes.size(); at += a_.sizes[c++]) {
      for (uint32_t i = 0; i < 2 * d_; ++i) {
        double mean = 0.0;
        double magnitude = 0.0;
        for (uint32_t m = 0; m < a_.sizes[c]; ++m) {
          const double x = a_.rows[size_t{a_.order[at + m]} * 2 * d_ + i];
          mean += x / a_.sizes[c];
          magnitude += std::abs(x) / a_.sizes[c];
        }
        const uint16_t bits = i < d_ ? a_.centroids[c * d_ + i] : a_.values[c * d_ + i - d_];
        const double stored = Decode(a_.test->bf16, bits);
        if (!std::isfinite(mean) && !std::isfinite(stored)) continue;
        const double allowed = rounding * 1.01 * std::abs(mean) + 2e-6 * magnitude + 4e-8;
        if (!(std::abs(stored - mean) <= allowed)) {
          return "mean " + std::to_string(c) + "[" + std::to_string(i) +
                 "]: " + std::to_string(stored) + " for " + std::to_string(mean);
        }
      }
    }
    return "";
  }
  // After one assignment each cluster holds its seed: every key is where its best seed is.
  std::string CheckFirstLabels() const {
    std::vector<float> seeds(size_t{a_.clusters} * d_);
    std::vector<uint32_t> home(a_.clusters);
    std::vector<uint32_t> seed_of(a_.sizes.size(), UINT32_MAX);
    for (uint32_t c = 0; c < a_.clusters; ++c) {
      const auto range = RangeOfSeed(a_.seed, c, a_.clusters, a_.tokens);
      const uint32_t t = range.begin + range.start;
      std::copy_n(&a_.units[size_t{t} * d_], d_, &seeds[size_t{c} * d_]);
      if (seed_of[labels_[t]] != UINT32_MAX) return "two seeds in one cluster";
      seed_of[labels_[t]] = c;
    }
    for (uint32_t t = 0; t < a_.tokens; ++t) {
      const float* unit = &a_.units[size_t{t} * d_];
      const float best = Dot(unit, &seeds[size_t{Nearest(a_, t, seeds, a_.clusters)} * d_], d_);
      const uint32_t own = seed_of[labels_[t]];
      if (own == UINT32_MAX) return "a cluster without its seed";
      if (Dot(unit, &seeds[size_t{own} * d_], d_) < best - 0.004f) return "not the best seed";
    }
    return "";
  }
  std::string CheckConverged(const std::vector<float>& directions) const {
    const auto clusters = static_cast<uint32_t>(a_.sizes.size());
    if (a_.iterations == a_.test->iterations) return "has not converged";
    for (uint32_t t = 0; t < a_.tokens; ++t) {
      const float* unit = &a_.units[size_t{t} * d_];
      const uint32_t best = Nearest(a_, t, directions, clusters);
      if (Dot(unit, &directions[size_t{labels_[t]} * d_], d_) <
          Dot(unit, &directions[size_t{best} * d_], d_) - 0.004f) {
        return "converged elsewhere than at its own centroid: " + std::to_string(t);
      }
    }
    return "";
  }

  const Answer& a_;
  const uint32_t d_;
  std::vector<uint32_t> labels_;
  double objective_ = 0.0;
  double reference_ = 0.0;  // none
};

Answer AnswerOf(const Case& test, const Run& run, const std::vector<unsigned char>& results,
                size_t p) {
  const KMeansProblem& problem = run.Problems()[p];
  Answer a;
  a.test = &test;
  a.tokens = problem.tokens;
  a.clusters = problem.clusters;
  a.seed = problem.seed;
  a.rows = run.Rows(p);
  SetUnits(a);
  const auto read = [&]<typename T>(std::vector<T>& to, const void* from, size_t count,
                                    size_t capacity) {
    to.resize(count);
    const unsigned char* bytes = results.data() + run.OffsetOf(from);
    std::memcpy(to.data(), bytes, count * sizeof(T));
    for (size_t i = count * sizeof(T); i < (capacity * sizeof(T) + 31) / 16 * 16; ++i) {
      a.poison_kept = a.poison_kept && bytes[i] == 0xAB;
    }
  };
  const size_t most = problem.clusters + problem.tokens / test.largest;
  std::vector<uint32_t> count;
  read(count, problem.count, 1, 1);
  std::vector<uint32_t> iterations;
  read(iterations, problem.iterations, 1, 1);
  a.iterations = iterations[0];
  const size_t found = std::min<size_t>(count[0], most);
  read(a.order, problem.order, problem.tokens, problem.tokens);
  read(a.sizes, problem.sizes, found, most);
  read(a.centroids, problem.centroids, found * test.head_dim, most * test.head_dim);
  read(a.values, problem.value_means, found * test.head_dim, most * test.head_dim);
  if (found != count[0]) a.sizes.clear();
  return a;
}

bool Verify(const Case& test, uint64_t seed) {
  Run run(test, seed);
  run.Poison();
  run.Launch(nullptr);
  Require(cudaDeviceSynchronize(), test.name);
  const std::vector<unsigned char> results = run.Results();
  run.Poison();
  run.Launch(nullptr);
  Require(cudaDeviceSynchronize(), test.name);
  const bool repeatable = run.Results() == results;
  std::vector<std::string> faults(test.shapes.size());
  std::vector<double> objectives(faults.size()), references(faults.size());
  std::vector<std::thread> threads;
  const size_t workers = std::min<size_t>(faults.size(), std::thread::hardware_concurrency());
  for (size_t w = 0; w < workers; ++w) {
    threads.emplace_back([&, w] {
      for (size_t p = w; p < faults.size(); p += workers) {
        const Answer answer = AnswerOf(test, run, results, p);
        Checker checker(answer);
        faults[p] = checker.Check();
        objectives[p] = checker.Objective();
        references[p] = checker.Reference();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  bool good = repeatable;
  double objective = 0.0, reference = 0.0, worst = 1.0;
  for (size_t p = 0; p < faults.size(); ++p) {
    objective += objectives[p] / static_cast<double>(faults.size());
    reference += references[p] / static_cast<double>(faults.size());
    worst = std::min(worst, objectives[p] / references[p]);
    if (faults[p].empty()) continue;
    good = false;
    std::printf("  problem %zu (%u tokens, k %u): %s\n", p, test.shapes[p].first,
                test.shapes[p].second, faults[p].c_str());
  }
  if (!repeatable) std::printf("  two runs differ\n");
  // One small problem may end in another local optimum; on the whole they must not be worse.
  if (objective < 0.995 * reference || worst < 0.9) good = false;
  std::printf("%-4s %-22s %s d %3u%s: objective %.5f, of reference %.5f, worst %.4f\n",
              good ? "ok" : "FAIL", test.name, test.bf16 ? "bf16" : "fp16", test.head_dim,
              test.center ? " centred" : "", objective, objective / reference, worst);
  return good;
}

bool Check(uint64_t seed) {
  bool good = true;
  const std::vector<std::pair<uint32_t, uint32_t>> mixed = {
      {1, 1}, {2, 1}, {7, 7}, {320, 4}, {257, 33}, {1000, 16}, {300, 300}, {640, 9}};
  for (const bool bf16 : {true, false}) {
    for (const uint32_t d : {64u, 96u, 128u, 256u}) {
      for (const bool center : {false, true}) {
        good &= Verify({"mixed", bf16, d, 8, 50, center, Data::kTopics, mixed}, seed);
        good &= Verify({"hostile", bf16, d, 6, 64, center, Data::kHostile, mixed}, seed + 1);
      }
      good &= Verify({"one iteration", bf16, d, 1, 4096, false, Data::kNormal, {{700, 40}}}, seed);
    }
    good &= Verify({"converged", bf16, 128, 300, 4096, false, Data::kTopics, {{1000, 12}}}, seed);
    good &= Verify({"few distinct",
                    bf16,
                    128,
                    10,
                    64,
                    false,
                    Data::kFewDistinct,
                    {{2000, 40}, {100, 90}, {500, 20}}},
                   seed);
    good &= Verify({"zero", bf16, 64, 5, 100, true, Data::kZero, {{500, 10}, {33, 33}}}, seed);
    good &= Verify({"not a number", bf16, 96, 5, 7, true, Data::kNaN, {{500, 10}, {33, 33}}}, seed);
  }
  good &= Verify({"many clusters", true, 64, 2, 1000, false, Data::kNormal, {{1700, 1601}}}, seed);
  good &= Verify({"pieces of one", true, 64, 2, 1, false, Data::kNormal, {{300, 5}}}, seed);
  std::vector<std::pair<uint32_t, uint32_t>> many(300, {64, 3});
  good &= Verify({"many problems", true, 128, 4, 20, true, Data::kTopics, many}, seed);
  return good;
}

// One case of each path through the kernels, for the slower tools.
bool CheckPaths(uint64_t seed) {
  const std::vector<std::pair<uint32_t, uint32_t>> mixed = {{1, 1}, {320, 4}, {257, 33}, {640, 9}};
  bool good = Verify({"resident", true, 128, 4, 50, true, Data::kHostile, mixed}, seed);
  good &= Verify({"not resident", false, 256, 4, 50, true, Data::kTopics, mixed}, seed);
  good &= Verify({"reseeds", true, 64, 10, 64, false, Data::kFewDistinct, {{600, 40}}}, seed);
  good &= Verify({"many clusters", true, 96, 2, 9, false, Data::kNormal, {{1700, 1601}}}, seed);
  return good;
}

bool CheckLarge(uint64_t seed) {
  bool good = true;
  for (const bool center : {false, true}) {
    good &= Verify({"segments", true, 128, 10, 320, center, Data::kTopics,
                    std::vector(16, std::pair{8192u, 102u})},
                   seed);
  }
  good &= Verify({"segments", false, 128, 10, 320, false, Data::kTopics,
                  std::vector(16, std::pair{8192u, 102u})},
                 seed);
  good &= Verify(
      {"long", true, 128, 10, 320, false, Data::kTopics, std::vector(4, std::pair{32768u, 400u})},
      seed);
  good &= Verify(
      {"fine", true, 128, 10, 64, false, Data::kTopics, std::vector(8, std::pair{8192u, 512u})},
      seed);
  good &= Verify({"longest", true, 128, 3, 64, false, Data::kTopics, {{65536, 4096}}}, seed);
  good &= Verify({"all seeds", true, 64, 1, 65536, false, Data::kNormal, {{8000, 8000}}}, seed);
  good &= Verify({"one cluster", true, 128, 2, 65536, false, Data::kTopics, {{65536, 1}}}, seed);
  good &= Verify({"longest zero", true, 64, 3, 65536, false, Data::kZero, {{65536, 65536}}}, seed);
  return good;
}

void Time(const Case& test, uint64_t seed, int repeats) {
  Run run(test, seed);
  cudaStream_t stream;
  Require(cudaStreamCreate(&stream), "stream");
  cudaEvent_t begin, end;
  Require(cudaEventCreate(&begin), "event");
  Require(cudaEventCreate(&end), "event");
  std::vector<float> times;
  const int warm_up = repeats > 1 ? 2 : 0;
  for (int i = 0; i < repeats + warm_up; ++i) {
    Require(cudaEventRecord(begin, stream), "record");
    run.Launch(stream);
    Require(cudaEventRecord(end, stream), "record");
    Require(cudaEventSynchronize(end), test.name);
    float ms;
    Require(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i >= warm_up) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  double flop = 0.0;
  for (const auto& [tokens, clusters] : test.shapes) {
    flop += 2.0 * tokens * clusters * test.head_dim * test.iterations;
  }
  const double ms = times[times.size() / 2];
  std::printf(
      "%-34s %4zu x %6u d %3u k %4u %s%s, %2u iterations: %8.3f ms (%.3f to %.3f)  %6.1f "
      "TFLOP/s  workspace %.1f MB\n",
      test.name, test.shapes.size(), test.shapes[0].first, test.head_dim, test.shapes[0].second,
      test.bf16 ? "bf16" : "fp16", test.center ? " centred" : "", test.iterations, ms,
      times.front(), times.back(), flop / ms * 1e-9,
      static_cast<double>(run.WorkspaceBytes()) * 1e-6);
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaStreamDestroy(stream);
}

Case Same(const char* name, size_t problems, uint32_t tokens, uint32_t clusters,
          uint32_t iterations = 10, bool center = false, bool bf16 = true, uint32_t d = 128) {
  return {name,
          bf16,
          d,
          iterations,
          320,
          center,
          Data::kTopics,
          std::vector(problems, std::pair{tokens, clusters})};
}

void Bench(uint64_t seed) {
  cudaDeviceProp properties;
  Require(cudaGetDeviceProperties(&properties, 0), "device");
  std::printf("%s, seed %llu\n", properties.name, static_cast<unsigned long long>(seed));
  Time(Same("32 layers x 8 heads", 256, 32768, 400), seed, 15);
  Time(Same("the same, fewer iterations", 256, 32768, 400, 2), seed, 15);
  Case normal = Same("the same, unclustered data", 256, 32768, 400);
  normal.data = Data::kNormal;
  Time(normal, seed, 15);
  Time(Same("32 layers x 8 heads, centred", 256, 32768, 400, 10, true), seed, 15);
  Time(Same("32 layers x 8 heads, fp16", 256, 32768, 400, 10, false, false), seed, 15);
  Time(Same("one layer", 8, 32768, 400), seed, 30);
  Time(Same("segments", 256, 8192, 102), seed, 30);
  Time(Same("segments, fine clusters", 256, 8192, 512), seed, 30);
  Time(Same("one layer of a segment", 8, 8192, 102), seed, 30);
  Time(Same("decode segments", 256, 320, 4), seed, 30);
  Time(Same("decode segments", 2048, 320, 4), seed, 30);
  Time(Same("longest segment", 1, 65536, 4096), seed, 10);
  Time(Same("segments", 256, 8192, 102, 10, false, true, 64), seed, 30);
  Time(Same("segments", 256, 8192, 102, 10, false, true, 96), seed, 30);
  Time(Same("segments", 128, 8192, 102, 10, false, true, 256), seed, 30);
}

int Main(int argc, char** argv) {
  bool check = false, paths = false, large = false, bench = false, profile = false;
  uint64_t seed = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    check |= arg == "--check";
    paths |= arg == "--paths";
    large |= arg == "--large";
    bench |= arg == "--bench";
    profile |= arg == "--profile";
    if (arg == "--seed" && i + 1 < argc) seed = std::strtoull(argv[++i], nullptr, 10);
  }
  bool good = true;
  if (check) good &= Check(seed);
  if (paths) good &= CheckPaths(seed);
  if (large) good &= CheckLarge(seed);
  if (bench) Bench(seed);
  if (profile) Time(Same("profile", 256, 32768, 400, 4), seed, 1);
  std::printf("%s\n", good ? "all good" : "FAILED");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace clusterkv::gpu::cuda

int main(int argc, char** argv) { return clusterkv::gpu::cuda::Main(argc, argv); }
