#include "client/bench/published_context.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "client/bench/cores.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr size_t kAlignment = 256;
constexpr uint32_t kTokensPerPiece = 1024;
constexpr size_t kCopyPiece = size_t{16} << 20;

size_t Aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Half a decode segment beyond the least window: what a window holds on average.
uint32_t PromptTokens(const ContextOptions& options) {
  return options.tokens - std::min(options.tokens / 2, options.method.decode_segment_tokens / 2);
}

}  // namespace

absl::StatusOr<std::unique_ptr<PublishedContext>> PublishedContext::Create(
    Backend& backend, const ContextOptions& options) {
  std::unique_ptr<PublishedContext> context(new PublishedContext(backend, options));
  CKV_RETURN_IF_ERROR(context->Prepare());
  return context;
}

uint32_t* PublishedContext::sizes(const SegmentResults& results, uint32_t kv_head) const {
  return reinterpret_cast<uint32_t*>(results.memory->data() +
                                     kv_head * Aligned(results.max_clusters * sizeof(uint32_t)));
}

std::byte* PublishedContext::centroids(const SegmentResults& results, uint32_t kv_head) const {
  return reinterpret_cast<std::byte*>(sizes(results, options_.shape.kv_heads)) +
         kv_head * results.max_clusters * mean_bytes();
}

std::byte* PublishedContext::value_means(const SegmentResults& results, uint32_t kv_head) const {
  return centroids(results, options_.shape.kv_heads + kv_head);
}

absl::Status PublishedContext::Prepare() {
  const gpu::Shape& shape = options_.shape;
  segments_ = gpu::AllSegments(options_.method, PromptTokens(options_), options_.tokens);
  if (segments_.empty()) {
    return absl::InvalidArgumentError("--contexts: a context has no token beyond its window");
  }
  model_ = std::make_unique<KeyModel>(shape, options_.tokens, options_.seed);
  cluster_tokens_.resize(shape.kv_heads);
  for (const gpu::Segment& segment : segments_) {
    SegmentResults& results = results_.emplace_back();
    results.max_clusters = gpu::MaxClustersOfSegment(options_.method, segment.tokens());
    results.counts.resize(shape.kv_heads);
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      results.rows.push_back(layer_bytes_);
      layer_bytes_ += segment.tokens() * shape.row_bytes();
      results.positions.push_back(layer_bytes_);
      layer_bytes_ += Aligned(segment.tokens() * sizeof(uint32_t));
    }
  }
  copies_ = static_cast<uint32_t>(
      std::clamp<uint64_t>(options_.store_bytes / layer_bytes_, 1, shape.layers));
  gpu::host::ThreadPool threads(UsableCores());
  CKV_ASSIGN_OR_RETURN(store_,
                       PinnedRegion::Create(backend_.device(), threads, copies_ * layer_bytes_));
  struct Piece {
    size_t segment;
    uint32_t head, begin, count;
  };
  std::vector<Piece> pieces;
  for (size_t s = 0; s < segments_.size(); ++s) {
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      for (uint32_t begin = 0; begin < segments_[s].tokens(); begin += kTokensPerPiece) {
        const uint32_t count = std::min(kTokensPerPiece, segments_[s].tokens() - begin);
        pieces.push_back({s, head, begin, count});
      }
    }
  }
  threads.ParallelFor(pieces.size(), [&](size_t i) {
    const Piece& piece = pieces[i];
    std::byte* const run = store_->data() + results_[piece.segment].rows[piece.head];
    model_->WriteRows(piece.head, segments_[piece.segment].begin + piece.begin, piece.count,
                      run + piece.begin * shape.row_bytes());
  });
  for (size_t s = 0; s < segments_.size(); ++s) {
    CKV_RETURN_IF_ERROR(ClusterSegment(segments_[s], results_[s]));
    CKV_RETURN_IF_ERROR(ReadSizes(results_[s]));
  }
  const size_t layer_pieces = (layer_bytes_ + kCopyPiece - 1) / kCopyPiece;
  threads.ParallelFor((copies_ - 1) * layer_pieces, [&](size_t i) {
    const size_t begin = i % layer_pieces * kCopyPiece;
    std::memcpy(store_->data() + (1 + i / layer_pieces) * layer_bytes_ + begin,
                store_->data() + begin, std::min(kCopyPiece, layer_bytes_ - begin));
  });
  return absl::OkStatus();
}

absl::Status PublishedContext::ClusterSegment(const gpu::Segment& segment,
                                              SegmentResults& results) {
  const gpu::Shape& shape = options_.shape;
  gpu::Device& device = backend_.device();
  const size_t run_bytes = segment.tokens() * shape.row_bytes();
  const size_t order_bytes = Aligned(segment.tokens() * sizeof(uint32_t));
  CKV_ASSIGN_OR_RETURN(
      results.memory,
      device.Allocate(shape.kv_heads * (Aligned(results.max_clusters * sizeof(uint32_t)) +
                                        2 * results.max_clusters * mean_bytes())));
  CKV_ASSIGN_OR_RETURN(const auto rows, device.Allocate(shape.kv_heads * run_bytes));
  CKV_ASSIGN_OR_RETURN(const auto workspace, device.Allocate(shape.kv_heads * run_bytes));
  CKV_ASSIGN_OR_RETURN(const auto order, device.Allocate(shape.kv_heads * order_bytes));
  CKV_ASSIGN_OR_RETURN(const auto counts, device.Allocate(shape.kv_heads * sizeof(uint32_t)));
  gpu::ClusterArgs cluster;
  cluster.head_dim = shape.head_dim;
  cluster.dtype = shape.dtype;
  cluster.iterations = options_.method.kmeans_iterations;
  cluster.largest_cluster_tokens = options_.method.largest_cluster_tokens();
  cluster.center_keys = options_.method.center_keys;
  gpu::PermuteArgs permute;
  permute.row_bytes = shape.row_bytes();
  for (uint32_t head = 0; head < shape.kv_heads; ++head) {
    std::byte* const run = store_->data() + results.rows[head];
    auto* const own_order = reinterpret_cast<uint32_t*>(order->data() + head * order_bytes);
    std::byte* const device_rows = rows->data() + head * run_bytes;
    const bool in_place = device.computes_on_host_memory();
    cluster.problems.push_back(
        {.rows = run,
         .device_rows = in_place ? nullptr : device_rows,
         .tokens = segment.tokens(),
         .clusters = gpu::ClustersOfSegment(options_.method, segment.tokens()),
         .seed = options_.seed + segment.begin + head,
         .order = own_order,
         .sizes = sizes(results, head),
         .centroids = centroids(results, head),
         .value_means = value_means(results, head),
         .count = reinterpret_cast<uint32_t*>(counts->data()) + head});
    permute.problems.push_back(
        {.rows = in_place ? run : device_rows,
         .destination = run,
         .workspace = workspace->data() + head * run_bytes,
         .order = own_order,
         .tokens = segment.tokens(),
         .first_position = segment.begin,
         .positions = reinterpret_cast<uint32_t*>(store_->data() + results.positions[head])});
  }
  gpu::Stream& stream = backend_.stream();
  CKV_RETURN_IF_ERROR(device.cluster_ops().Cluster(stream, std::move(cluster)));
  CKV_RETURN_IF_ERROR(device.cluster_ops().Permute(stream, std::move(permute)));
  CKV_RETURN_IF_ERROR(
      stream.CopyAsync(results.counts.data(), counts->data(), shape.kv_heads * sizeof(uint32_t)));
  return stream.Synchronize();
}

absl::Status PublishedContext::ReadSizes(const SegmentResults& results) {
  for (uint32_t head = 0; head < options_.shape.kv_heads; ++head) {
    std::vector<uint32_t> found(results.counts[head]);
    CKV_RETURN_IF_ERROR(backend_.stream().CopyAsync(found.data(), sizes(results, head),
                                                    found.size() * sizeof(uint32_t)));
    CKV_RETURN_IF_ERROR(backend_.stream().Synchronize());
    cluster_tokens_[head].insert(cluster_tokens_[head].end(), found.begin(), found.end());
  }
  return absl::OkStatus();
}

absl::Status PublishedContext::PublishTo(std::byte* state, const gpu::StateLayout& layout) const {
  std::vector<uint32_t> clusters(options_.shape.kv_heads);  // so far
  for (size_t s = 0; s < segments_.size(); ++s) {
    const SegmentResults& results = results_[s];
    gpu::PublishArgs args;
    args.state = state;
    args.layout = &layout;
    args.segment = static_cast<uint32_t>(s);
    args.segment_begin = segments_[s].begin;
    args.segment_end = segments_[s].end;
    for (uint32_t layer = 0; layer < layout.layers; ++layer) {
      const size_t copy = layer % copies_ * layer_bytes_;
      for (uint32_t head = 0; head < layout.kv_heads; ++head) {
        args.problems.push_back(
            {.cluster_begin = clusters[head],
             .cluster_count = results.counts[head],
             .sizes = sizes(results, head),
             .centroids = centroids(results, head),
             .value_means = value_means(results, head),
             .chunk = 0,
             .rows_offset = static_cast<uint32_t>((copy + results.rows[head]) / 16),
             .positions_offset = static_cast<uint32_t>((copy + results.positions[head]) / 16)});
      }
    }
    CKV_RETURN_IF_ERROR(
        backend_.device().cluster_ops().Publish(backend_.stream(), std::move(args)));
    for (uint32_t head = 0; head < layout.kv_heads; ++head) clusters[head] += results.counts[head];
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
