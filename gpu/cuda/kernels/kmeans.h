// Batched spherical k-means of keys on a GPU: what gpu::ClusterOps::Cluster enqueues.
//
//   describe ─► mean (if centred) ─► seed ─► assign ─► group ─► split ─► means
//                                              ▲         │
//                                              └─ update ┘  until no label of a problem changes, or
//                                                           `iterations`
//
// Cosine distance (ClusterKV section III-B; Dhillon and Modha 2001): a key goes to the centroid of
// greatest inner product, a centroid is the direction of the sum of its unit keys. The matrix of
// scores is never stored (FlashAssign of arXiv 2603.09229). Equal results for equal
// input, seed and device architecture: no sum depends on the order in which blocks run.
//
// Scores use the storage dtype for keys (raw) and unit centroids (rounded) with fp32 sums. A key
// without a direction (zero, or with a NaN or an infinity) gets some label and counts in no sum
// but the stored means.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace clusterkv::gpu::cuda {

// One k-means. Pointers are to device memory and 16-byte aligned; results are as
// gpu::ClusterProblem documents them. `max` is clusters + tokens / largest_cluster_tokens.
struct KMeansProblem {
  const void* rows = nullptr;  // storage dtype [tokens][2 * head_dim], K then V
  uint32_t tokens = 0;         // 1..65,536
  uint32_t clusters = 0;       // k, 1..tokens
  uint64_t seed = 0;
  uint32_t* order = nullptr;       // [tokens]
  uint32_t* sizes = nullptr;       // [max]
  void* centroids = nullptr;       // storage dtype [max][head_dim]: mean raw key
  void* value_means = nullptr;     // storage dtype [max][head_dim]
  uint32_t* count = nullptr;       // clusters found
  uint32_t* iterations = nullptr;  // assignments done; may be null
};

struct KMeansArgs {
  bool bf16 = false;                    // fp16 otherwise
  uint32_t head_dim = 0;                // 64, 96, 128 or 256
  uint32_t iterations = 0;              // assignments; 0 counts as 1
  uint32_t largest_cluster_tokens = 0;  // 0 counts as 1
  bool center_keys = false;
  const KMeansProblem* problems = nullptr;  // host memory, copied before LaunchKMeans returns
  uint32_t problem_count = 0;
};

// Device memory that LaunchKMeans needs until the stream has passed, 256-byte aligned; 0 for
// arguments that it refuses.
size_t KMeansWorkspaceBytes(const KMeansArgs& args);

// Enqueues and returns: no allocation, no wait, and legal in a stream capture.
// Errors: cudaErrorInvalidValue for a shape out of range; nothing is enqueued then. Those of the
// launches otherwise.
cudaError_t LaunchKMeans(const KMeansArgs& args, void* workspace, cudaStream_t stream);

}  // namespace clusterkv::gpu::cuda
