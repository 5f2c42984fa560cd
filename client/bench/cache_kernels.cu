// Not timed: it has to be right, not fast.
#include "client/bench/cache_kernels.h"
#include "gpu/cuda/kernels/state_access.cuh"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kThreads = 128;

// One block an item; its threads share the rows of a cluster.
__global__ void CacheEditKernel(const __grid_constant__ CacheEditLaunch args) {
  const uint32_t heads = args.block.layers * args.block.kv_heads;
  const uint32_t item = blockIdx.x;
  const size_t head = item % heads;
  const gpu::cuda::DeviceSlot slot = {.state = args.states[item / heads], .block = args.block};
  const gpu::cuda::DeviceState state(slot);
  const gpu::ClusterEntry* const entries = state.clusters(head);
  uint32_t* const last_used = state.last_used(head);
  uint32_t* const slots = state.slot_of_row(head);
  uint32_t* const free_slots = state.free_slots(head);
  uint32_t free = state.free_count(head);
  for (uint32_t i = args.evict_begins[item]; i < args.evict_begins[item + 1]; ++i) {
    const uint32_t cluster = args.evict[i];
    const gpu::ClusterEntry entry = entries[cluster];
    const bool resident = last_used[cluster] != 0;
    __syncthreads();  // all have read
    if (!resident) continue;
    if (threadIdx.x == 0) last_used[cluster] = 0;
    for (uint32_t row = threadIdx.x; row < entry.tokens; row += kThreads) {
      free_slots[free + row] = slots[entry.first_row + row];
    }
    free += entry.tokens;
  }
  __syncthreads();
  for (uint32_t i = args.fill_begins[item]; i < args.fill_begins[item + 1]; ++i) {
    const uint32_t cluster = args.fill[i];
    const gpu::ClusterEntry entry = entries[cluster];
    const bool fits = last_used[cluster] == 0 && entry.tokens <= free;
    __syncthreads();
    if (!fits) continue;
    if (threadIdx.x == 0) last_used[cluster] = 1;
    for (uint32_t row = threadIdx.x; row < entry.tokens; row += kThreads) {
      slots[entry.first_row + row] = free_slots[free - 1 - row];
    }
    free -= entry.tokens;
  }
  if (threadIdx.x == 0) state.free_count(head) = free;
}

__global__ void ReadKernel(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t sum = 0;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint4 word = data[i];
    sum += word.x ^ word.y ^ word.z ^ word.w;
  }
  if (sum == 0x9e3779b9u) *sink = sum;  // as good as never, but the loads stay
}

}  // namespace

cudaError_t LaunchCacheEdit(const CacheEditLaunch& args, cudaStream_t stream) {
  const uint32_t items = args.state_count * args.block.layers * args.block.kv_heads;
  CacheEditKernel<<<items, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchRead(const std::byte* data, size_t bytes, uint32_t* sink, cudaStream_t stream) {
  ReadKernel<<<1024, 256, 0, stream>>>(reinterpret_cast<const uint4*>(data), bytes / 16, sink);
  return cudaGetLastError();
}

}  // namespace clusterkv::client::bench
