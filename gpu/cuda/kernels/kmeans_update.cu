// The first update: each centroid becomes the direction of the sum of its unit keys, one block a
// cluster. Cost: the keys are read once, in runs of one key. kmeans_move.cu keeps the sums.
#include "gpu/cuda/kernels/kmeans_batch.cuh"
#include "gpu/cuda/kernels/kmeans_centroid.cuh"
#include "gpu/cuda/kernels/kmeans_reseed.cuh"
#include "gpu/cuda/kernels/kmeans_rows.cuh"

namespace clusterkv::gpu::cuda::kmeans {
namespace {

template <typename T, int kDim>
__global__ void __launch_bounds__(kClusterThreads)
    UpdateKernel(const __grid_constant__ Batch batch, uint32_t first_cluster) {
  __shared__ float sum[kDim];
  const uint32_t index = first_cluster + blockIdx.x;
  const uint32_t problem_index = batch.cluster_problem[index];
  const Problem problem = batch.problems[problem_index];
  const uint32_t cluster = index - problem.first_cluster;
  const Grouping grouping = GroupingOf(batch, problem_index, problem, 0);
  const uint32_t begin = grouping.begins[cluster];
  const uint32_t end = grouping.begins[cluster + 1];
  if (begin == end) {
    Reseed<T, kDim, kClusterThreads>(batch, problem_index, problem, grouping.begins, cluster);
    return;
  }
  const uint16_t* members = grouping.members + begin;
  const float* inverse_norms = batch.inverse_norms + problem.first_token;
  SumRows<T, kDim, kClusterThreads>(
      problem.rows, 4 * kDim, end - begin, [=](uint32_t i) { return __ldg(members + i); },
      [=](uint32_t, uint32_t token) { return __ldg(inverse_norms + token); },
      MeanOf<kDim>(batch, problem_index), sum);
  for (int i = threadIdx.x; i < kDim; i += kClusterThreads) {
    batch.sums[size_t{index} * kDim + i] = sum[i];
  }
  SetCentroid<T, kDim, kClusterThreads>(batch, problem_index, problem.first_centroid + cluster,
                                        sum);
}

}  // namespace

cudaError_t Update(const Batch& batch, cudaStream_t stream) {
  const double bytes = static_cast<double>(batch.tokens) * batch.head_dim * 2.0;
  return ForShape(batch, [&]<typename T, int kDim>() {
    return InRanges(batch.clusters, bytes, kBytesPerLaunch, [&](uint32_t first, uint32_t count) {
      UpdateKernel<T, kDim><<<count, kClusterThreads, 0, stream>>>(batch, first);
    });
  });
}

}  // namespace clusterkv::gpu::cuda::kmeans
