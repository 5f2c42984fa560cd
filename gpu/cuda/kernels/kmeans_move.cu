// Later updates: the keys that joined a cluster are added to its sum, those that left subtracted,
// one block a cluster.
//
//   warp 0   members of this grouping that moved     joined ─┐
//   warp 1   members of the last that moved          left   ─┴► sum ± their unit keys ─► centroid
//
// Cost: each key that moved is read twice, and the flags of all members; after a few iterations a
// tenth of the keys moves. A cluster that changed by as many as it has, or by more than the lists
// hold, is summed anew. Rounding of the sums grows with the keys that pass through, by 2^-24 of a
// unit key or of the sum each: far below the rounding of the centroid.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/cuda/kernels/kmeans_reseed.cuh"
#include "gpu/cuda/kernels/kmeans_rows.cuh"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

constexpr int kThreads = 64;
constexpr uint32_t kMostMoved = 1024;  // a list

// The members with a flag in `moved`, in order, as far as the list holds; returns how many there
// are. One warp calls.
__device__ uint32_t ListMoved(const uint16_t* members, uint32_t count, const uint8_t* moved,
                              uint16_t* list) {
  const uint32_t lane = threadIdx.x % 32;
  uint32_t listed = 0;
#pragma unroll 4
  for (uint32_t base = 0; base < count; base += 32) {
    const bool inside = base + lane < count;
    const uint16_t token = inside ? __ldg(members + base + lane) : uint16_t{0};
    const bool has_moved = inside && __ldg(moved + token) != 0;
    const uint32_t all = __ballot_sync(0xFFFFFFFFu, has_moved);
    const uint32_t at = listed + __popc(all & ((1u << lane) - 1));
    if (has_moved && at < kMostMoved) list[at] = token;
    listed += __popc(all);
  }
  return listed;
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads)
    MoveKernel(const __grid_constant__ Batch batch, uint32_t first_cluster) {
  __shared__ float sum[kDim];
  __shared__ uint16_t lists[2][kMostMoved];
  __shared__ uint32_t counts[2];
  const uint32_t index = first_cluster + blockIdx.x;
  const uint32_t problem_index = batch.cluster_problem[index];
  const State state = batch.states[problem_index];
  if (state.done != 0) return;
  const Problem problem = batch.problems[problem_index];
  const uint32_t cluster = index - problem.first_cluster;
  const uint32_t warp = threadIdx.x / 32;
  const Grouping mine =
      GroupingOf(batch, problem_index, problem, warp == 0 ? state.grouping : 1 - state.grouping);
  const uint32_t my_begin = mine.begins[cluster];
  const uint32_t my_count = mine.begins[cluster + 1] - my_begin;
  const uint32_t moved =
      ListMoved(mine.members + my_begin, my_count, batch.moved + problem.first_token, lists[warp]);
  if (threadIdx.x % 32 == 0) counts[warp] = moved;
  __syncthreads();
  const uint32_t joined = counts[0];
  const uint32_t left = counts[1];
  const Grouping now = GroupingOf(batch, problem_index, problem, state.grouping);
  const uint32_t begin = now.begins[cluster];
  const uint32_t count = now.begins[cluster + 1] - begin;
  if (count == 0) {
    Reseed<T, kDim, kThreads>(batch, problem_index, problem, now.begins, cluster);
    return;
  }
  if (joined + left == 0) return;
  const float* mean = MeanOf<kDim>(batch, problem_index);
  const float* inverse_norms = batch.inverse_norms + problem.first_token;
  float* sums = batch.sums + size_t{index} * kDim;
  const bool anew = joined + left >= count || joined > kMostMoved || left > kMostMoved;
  const uint16_t* members = now.members + begin;
  const auto token = [&](uint32_t i) -> uint32_t {
    if (anew) return __ldg(members + i);
    return i < joined ? lists[0][i] : lists[1][i - joined];
  };
  const auto weight = [&](uint32_t i, uint32_t of) {
    const float inverse = __ldg(inverse_norms + of);
    return anew || i < joined ? inverse : -inverse;
  };
  SumRows<T, kDim, kThreads>(problem.rows, 4 * kDim, anew ? count : joined + left, token, weight,
                             mean, sum);
  for (int i = threadIdx.x; i < kDim; i += kThreads) {
    if (!anew) sum[i] += sums[i];
    sums[i] = sum[i];
  }
  __syncthreads();
  SetCentroid<T, kDim, kThreads>(batch, problem_index, problem.first_centroid + cluster, sum);
}

}  // namespace

cudaError_t Move(const Batch& batch, cudaStream_t stream) {
  const double bytes = static_cast<double>(batch.tokens) * batch.head_dim * 2.0;
  return ForShape(batch, [&]<typename T, int kDim>() {
    return InRanges(batch.clusters, bytes, kBytesPerLaunch, [&](uint32_t first, uint32_t count) {
      MoveKernel<T, kDim><<<count, kThreads, 0, stream>>>(batch, first);
    });
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
