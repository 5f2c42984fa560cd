#include "gpu/cuda/kernels/state_access.cuh"
#include "tests/gpu/cuda/latch_litmus_kernels.h"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kNewest = 8;  // segments that a step checks

__device__ uint32_t Word(uint32_t segment, uint32_t head, uint32_t place) {
  uint32_t x = segment * 0x9E3779B9u ^ head * 0x85EBCA6Bu ^ place * 0xC2B2AE35u;
  x ^= x >> 16;
  return x * 0x7FEB352Du ^ segment;
}

__global__ void FillSegmentKernel(std::byte* rows, std::byte* means, uint32_t* sizes,
                                  uint32_t tokens, uint32_t row_bytes, uint32_t segment) {
  const uint32_t head = blockIdx.x;
  auto* const row_words = reinterpret_cast<uint32_t*>(rows + size_t{head} * tokens * row_bytes);
  for (uint32_t i = threadIdx.x; i < tokens * row_bytes / 4; i += blockDim.x) {
    row_words[i] = Word(segment, head, i);
  }
  // Centroid, then value mean, of the one cluster.
  auto* const mean_words = reinterpret_cast<uint32_t*>(means + size_t{head} * row_bytes);
  for (uint32_t i = threadIdx.x; i < row_bytes / 4; i += blockDim.x) {
    mean_words[i] = Word(segment, head, 0x10000 + i);
  }
  if (threadIdx.x == 0) sizes[head] = tokens;
}

__global__ void CheckStepKernel(std::byte* state, const __grid_constant__ StateBlock block,
                                const std::byte* const* host_chunks, uint32_t first_position,
                                uint32_t tokens, LitmusCounts* counts) {
  const DeviceSlot slot = {.state = state, .block = block};
  const DeviceState view(slot);
  const uint32_t segments = view.latch().segments;
  const uint32_t head = blockIdx.x;
  unsigned long long words = 0, wrong = 0;
  const auto check = [&](uint32_t actual, uint32_t expected) {
    ++words;
    if (actual != expected) ++wrong;
  };
  if (threadIdx.x == 0) {
    check(view.latch().cut, segments == 0 ? block.sink_tokens : first_position + segments * tokens);
  }
  const auto row_bytes = static_cast<uint32_t>(view.row_bytes());
  for (uint32_t back = 1; back <= min(segments, kNewest); ++back) {
    const uint32_t segment = segments - back;
    const SegmentRun run = view.segment_runs(head)[segment];
    const ClusterEntry entry = view.clusters(head)[segment];
    if (threadIdx.x == 0) {
      check(view.segment_ends()[segment], first_position + (segment + 1) * tokens);
      check(run.cluster_end, segment + 1);
      check(run.first_row, segment * tokens);
      check(entry.first_row, segment * tokens);
      check(entry.tokens, tokens);
    }
    const size_t half = view.mean_bytes();
    const auto* const centroid =
        reinterpret_cast<const uint32_t*>(view.centroids(head) + segment * half);
    const auto* const mean =
        reinterpret_cast<const uint32_t*>(view.value_means(head) + segment * half);
    for (uint32_t i = threadIdx.x; i < half / 4; i += blockDim.x) {
      check(centroid[i], Word(segment, head, 0x10000 + i));
      check(mean[i], Word(segment, head, 0x10000 + static_cast<uint32_t>(half / 4) + i));
    }
    // Within the pool's bounds even if the entry is torn.
    if (entry.chunk != 0 || entry.first_row != segment * tokens) continue;
    const auto* const rows = reinterpret_cast<const volatile uint32_t*>(
        host_chunks[0] + size_t{16} * entry.chunk_offset);
    for (uint32_t i = threadIdx.x; i < tokens * row_bytes / 4; i += blockDim.x) {
      check(rows[i], Word(segment, head, i));
    }
  }
  atomicAdd(&counts->words, words);
  if (wrong > 0) atomicAdd(&counts->wrong_words, wrong);
  if (head != 0 || threadIdx.x != 0) return;
  ++counts->steps;
  if (segments < counts->last_segments) ++counts->steps_back;
  if (segments > counts->last_segments) counts->segments_seen += segments - counts->last_segments;
  counts->last_segments = segments;
}

}  // namespace

cudaError_t LaunchFillSegment(std::byte* rows, std::byte* means, uint32_t* sizes, uint32_t heads,
                              uint32_t tokens, uint32_t row_bytes, uint32_t segment,
                              cudaStream_t stream) {
  FillSegmentKernel<<<heads, 128, 0, stream>>>(rows, means, sizes, tokens, row_bytes, segment);
  return cudaGetLastError();
}

cudaError_t LaunchCheckStep(std::byte* state, const StateBlock& block,
                            const std::byte* const* host_chunks, uint32_t first_position,
                            uint32_t tokens, LitmusCounts* counts, cudaStream_t stream) {
  CheckStepKernel<<<block.layers * block.kv_heads, 128, 0, stream>>>(
      state, block, host_chunks, first_position, tokens, counts);
  return cudaGetLastError();
}

}  // namespace clusterkv::gpu::cuda
