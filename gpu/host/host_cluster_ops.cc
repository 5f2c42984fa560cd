#include "gpu/host/host_cluster_ops.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/cluster_checks.h"
#include "gpu/host/host_stream.h"
#include "gpu/host/kmeans.h"
#include "gpu/host/state_view.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::host {
namespace {

// std::function copies what it holds; argument lists are moved once instead.
template <typename Args, typename Body>
absl::Status EnqueueWith(Stream& stream, Args args, Body body) {
  auto* const host_stream = dynamic_cast<HostStream*>(&stream);
  if (host_stream == nullptr) {
    return absl::InvalidArgumentError("the stream is not one of the host backend");
  }
  return host_stream->Enqueue(
      [shared = std::make_shared<const Args>(std::move(args)), body] { return body(*shared); });
}

// One (layer, KV head): K and V lie apart in the ring and side by side in a row.
void StageHead(const StageArgs& args, size_t index) {
  const size_t half = args.head_dim * SizeOf(args.dtype);
  const size_t token = half * args.kv_heads;
  const size_t layer = index / args.kv_heads;
  const size_t head = index % args.kv_heads;
  const size_t plane = args.range_tokens * token;
  const size_t layer_stride = args.layer_stride == 0 ? 2 * plane : args.layer_stride;
  const std::byte* k = args.range + layer * layer_stride + args.first_token * token + head * half;
  const std::byte* v = k + plane;
  std::byte* row = args.destinations[index];
  for (uint32_t i = 0; i < args.count; ++i, k += token, v += token, row += 2 * half) {
    std::memcpy(row, k, half);
    std::memcpy(row + half, v, half);
  }
}

// False if an order points outside its run.
bool PermuteRun(const PermuteProblem& problem, size_t row_bytes) {
  for (uint32_t i = 0; i < problem.tokens; ++i) {
    const uint32_t source = problem.order[i];
    if (source >= problem.tokens) return false;
    std::memcpy(problem.workspace + i * row_bytes, problem.rows + source * row_bytes, row_bytes);
    problem.positions[i] = problem.first_position + source;
  }
  std::memcpy(problem.destination, problem.workspace, problem.tokens * row_bytes);
  return true;
}

// The metadata of one (layer, KV head). False if the sizes do not add up to the segment.
bool PublishHead(const PublishArgs& args, size_t head) {
  const StateView view(args.state, *args.layout);
  const PublishProblem& problem = args.problems[head];
  const uint32_t first_row = args.segment_begin - args.layout->sink_tokens;
  const uint32_t segment_tokens = args.segment_end - args.segment_begin;
  const auto row_units = static_cast<uint32_t>(args.layout->row_bytes() / 16);
  ClusterEntry* const entries = view.clusters(head) + problem.cluster_begin;
  uint32_t tokens = 0;
  for (uint32_t c = 0; c < problem.cluster_count; ++c) {
    const uint32_t size = problem.sizes[c];
    if (size == 0 || size > segment_tokens - tokens) return false;
    entries[c] = {.first_row = first_row + tokens,
                  .tokens = size,
                  .chunk = problem.chunk,
                  .chunk_offset = problem.rows_offset + tokens * row_units};
    tokens += size;
  }
  if (tokens != segment_tokens) return false;
  const size_t mean_bytes = view.mean_bytes();
  std::memcpy(view.centroids(head) + problem.cluster_begin * mean_bytes, problem.centroids,
              problem.cluster_count * mean_bytes);
  std::memcpy(view.value_means(head) + problem.cluster_begin * mean_bytes, problem.value_means,
              problem.cluster_count * mean_bytes);
  view.segment_runs(head)[args.segment] = {
      .cluster_end = problem.cluster_begin + problem.cluster_count,
      .chunk = problem.chunk,
      .positions_offset = problem.positions_offset,
      .first_row = first_row};
  return true;
}

}  // namespace

absl::Status HostClusterOps::Initialize(Stream& stream, std::byte* state, const StateLayout& layout,
                                        uint32_t generation) {
  if (state == nullptr) return absl::InvalidArgumentError("the state is null");
  return EnqueueWith(stream, layout, [this, state, generation](const StateLayout& own) {
    const StateView view(state, own);
    pool_.ParallelFor(own.head_index(own.layers, 0), [&](size_t head) {
      uint32_t* const free_slots = view.free_slots(head);
      // The stack's top is its end: slots go out from 0 on.
      for (uint32_t i = 0; i < own.cache_tokens; ++i) free_slots[i] = own.cache_tokens - 1 - i;
      view.free_count(head) = own.cache_tokens;
    });
    view.latch().cut = own.sink_tokens;
    StateHeader& header = view.header();
    header.magic = kStateMagic;
    header.version = own.version;
    // Last: with the generation the block is a sequence's.
    std::atomic_ref(header.generation).store(generation, std::memory_order_release);
    return absl::OkStatus();
  });
}

absl::Status HostClusterOps::Stage(Stream& stream, StageArgs args) {
  CKV_RETURN_IF_ERROR(CheckStage(args));
  return EnqueueWith(stream, std::move(args), [this](const StageArgs& own) {
    pool_.ParallelFor(own.destinations.size(), [&](size_t i) { StageHead(own, i); });
    return absl::OkStatus();
  });
}

absl::Status HostClusterOps::Cluster(Stream& stream, ClusterArgs args) {
  CKV_RETURN_IF_ERROR(CheckCluster(args));
  return EnqueueWith(stream, std::move(args), [this](const ClusterArgs& own) {
    ClusterProblems(pool_, own);
    return absl::OkStatus();
  });
}

absl::Status HostClusterOps::Permute(Stream& stream, PermuteArgs args) {
  CKV_RETURN_IF_ERROR(CheckPermute(args));
  return EnqueueWith(stream, std::move(args), [this](const PermuteArgs& own) {
    std::atomic<bool> valid{true};
    pool_.ParallelFor(own.problems.size(), [&](size_t i) {
      if (!PermuteRun(own.problems[i], own.row_bytes)) valid = false;
    });
    return valid ? absl::OkStatus()
                 : absl::InternalError("the order of a run points outside the run");
  });
}

absl::Status HostClusterOps::Publish(Stream& stream, PublishArgs args) {
  CKV_RETURN_IF_ERROR(CheckPublish(args));
  return EnqueueWith(stream, std::move(args), [this](const PublishArgs& own) {
    std::atomic<bool> valid{true};
    pool_.ParallelFor(own.problems.size(), [&](size_t head) {
      if (!PublishHead(own, head)) valid = false;
    });
    if (!valid) {
      return absl::InternalError(
          absl::StrCat("cluster sizes of segment ", own.segment, " do not add up to its tokens"));
    }
    const StateView view(own.state, *own.layout);
    view.segment_ends()[own.segment] = own.segment_end;
    view.published_segments().store(own.segment + 1, std::memory_order_release);
    return absl::OkStatus();
  });
}

}  // namespace clusterkv::gpu::host
