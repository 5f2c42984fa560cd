// DecodeLayer: select, fetch and attend of a layer in one launch (Hopper and later).
//
// A team of blocks, a thread block cluster, has one KV head of one slot:
//
//   every block:  scores its share of the centroids ─► maxima and sums to all blocks
//                 its running means; its keys, sizes, residence ─► the first block
//   the first:    prefix to the budget ─► touch, evict, slots for misses ─► a list of rows
//   every block:  attends to its share of sinks, window, resident rows; then of the missed ones,
//                 which come from the host store into the tile and go on to their slots
//                 partial outputs ─► the blocks that own the elements ─► output, log-sum-exp
//
// What passes between the blocks lies in their shared memory. Some of the missed rows are on their
// way over PCIe while other warps attend to the resident ones (LayerTiles). The outcome is that of
// Select, Fetch and Attend, but the slot table, which stays empty. Cost: the bytes of centroids and
// rows; at batch 1 the latency of four barriers and about six dependent reads of device memory.
#include <algorithm>

#include "gpu/cuda/kernels/centroid_scores.cuh"
#include "gpu/cuda/kernels/decode_kernels.h"
#include "gpu/cuda/kernels/layer_choice.cuh"
#include "gpu/cuda/kernels/layer_team.cuh"
#include "gpu/cuda/kernels/overlapped_launch.cuh"

namespace clusterkv::gpu::cuda {
namespace layer {
namespace {

// Bytes of the area, unless tiles take more: so that two blocks fit a multiprocessor, or one.
constexpr uint32_t kMostArea = 92 << 10;
constexpr uint32_t kMostAreaAlone = 176 << 10;
constexpr uint32_t kMostShared = 227 << 10;  // of a block
template <int kHeadDim>
constexpr uint32_t kResident = kHeadDim <= 128 ? 2 : 1;  // blocks of a multiprocessor

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

template <typename Storage, int kHeadDim>
__global__ void __launch_bounds__(kThreads, kResident<kHeadDim>)
    DecodeLayerKernel(const BatchTable* table, uint32_t layer, QueryLaunch queries, uint32_t group,
                      uint32_t launch_budget, OutputLaunch target, LayerBytes bytes,
                      uint32_t* fault) {
  FollowPredecessor();
  cg::cluster_group team = cg::this_cluster();
  team.barrier_arrive();  // waited for before the first write to another block
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<LayerShared<kHeadDim>*>(shared_bytes);
  auto* const list = reinterpret_cast<uint32_t*>(shared_bytes + bytes.list);
  auto* const partials = reinterpret_cast<float4*>(shared_bytes + bytes.partials);
  unsigned char* const area = shared_bytes + bytes.area;
  const uint32_t rank = blockIdx.x, kv_head = blockIdx.y;

  StartGroupQueries<kHeadDim, kThreads>(queries, blockIdx.z, kv_head, group, shared.queries);
  const Entry entry = EnterSlot(table, blockIdx.z, shared.slot);
  if (entry == Entry::kSkip) return;  // all blocks of the team do
  const DeviceState state(shared.slot.slot);
  const StateBlock& block = state.block();
  const size_t head = HeadIndex(block, layer, kv_head);
  const size_t item = size_t{blockIdx.z} * gridDim.y + kv_head;
  const DecodeScratch& scratch = table->scratch;
  // A block that finds the state stale goes on with no clusters: all must meet at the barriers, and
  // the first one's finding counts.
  const uint32_t clusters =
      entry == Entry::kCurrent
          ? min(state.VisibleClusters(head, shared.slot.latch.segments), scratch.clusters)
          : 0;
  if (rank == 0 && threadIdx.x == 0 && entry == Entry::kCurrent) {
    shared.evict.freed = state.free_count(head);
  }
  if (rank == 0 && threadIdx.x == 32) shared.chunks_of = scratch.chunk_steps[blockIdx.z];
  const uint32_t budget = min(launch_budget, block.budget_tokens);
  const uint32_t share = (clusters + gridDim.x - 1) / gridDim.x;
  const uint32_t begin = min(clusters, rank * share);
  const uint32_t end = min(clusters, begin + share);
  const Choice choice = LayOut(area, bytes.total - bytes.area, ChosenRoom(launch_budget), clusters,
                               begin, share, group, scratch, item);
  const ClusterEntry* const entries = state.clusters(head);
  const uint32_t* const last_used = state.last_used(head);
  float* const mean_scores = state.mean_scores(head);
  // Of the thread's first cluster, now already: the centroids take as long.
  ClusterEntry first_entry = {};
  uint32_t first_used = 0;
  float first_mean = 0.0f;
  if (begin + threadIdx.x < end) {
    first_entry = entries[begin + threadIdx.x];
    first_used = last_used[begin + threadIdx.x];
    first_mean = mean_scores[begin + threadIdx.x];
  }
  WaitCopies<0>();
  __syncthreads();
  const float scale = block.softmax_scale * kLog2E;
  ScoreCentroids<Storage, kHeadDim, kThreads>(
      state.centroids(head), begin, end, shared.queries, scale,
      [&](uint32_t g, uint32_t cluster, float score) {
        if (g < group) choice.scores[size_t{g} * choice.stride + cluster - choice.base] = score;
      });
  __syncthreads();
  team.barrier_wait();
  if (block.group == GroupRule::kSoftmax) {
    SendScoreSums(choice, begin, end, group, team, shared);
    team.sync();
    ForReceived(shared, group, -FLT_MAX, [&](uint32_t g, float2 of_all, uint32_t r, float) {
      if (r != 0) return;
      shared.largest[g] = of_all.x;
      shared.inverse_sum[g] = 1.0f / of_all.y;
    });
    __syncthreads();
  }
  {
    // The first block's arrays lie where this one's would, if it were the first.
    uint32_t* const keys = choice.in_shared ? team.map_shared_rank(choice.keys, 0) : choice.keys;
    for (uint32_t c = begin + threadIdx.x; c < end; c += kThreads) {
      const bool first = c == begin + threadIdx.x;
      const ClusterEntry cluster = first ? first_entry : entries[c];
      const uint32_t resident = (first ? first_used : last_used[c]) != 0 ? 0 : kMissed;
      const float combined =
          CombineScores(block.group, choice.scores + (c - choice.base), choice.stride, group,
                        shared.largest, shared.inverse_sum);
      // As Select, which scores nothing without a budget.
      if (budget > 0) {
        const float mean = first ? first_mean : mean_scores[c];
        mean_scores[c] = NextMeanCombined(block.group, mean, combined);
      }
      keys[c] = OrderedKey(combined);
      keys[clusters + c] = state.ClusterTokens(cluster);
      keys[2 * clusters + c] = (cluster.first_row & ~kMissed) | resident;
      if (block.estimate != 0) scratch.taken[item * scratch.clusters + c] = 0;
    }
  }
  team.sync();
  if (rank == 0) {
    LayerPlan plan = {};
    if (entry == Entry::kCurrent) {
      plan = Choose(state, layer, kv_head, budget, clusters, choice, scratch, item, list, fault,
                    shared);
    } else {
      plan.stale = 1;
    }
    if (threadIdx.x < gridDim.x) *team.map_shared_rank(&shared.plan, threadIdx.x) = plan;
  }
  team.sync();

  WarpAttention<Storage, kHeadDim> attention;
  if (shared.plan.stale == 0) {
    const RowFinder finder = {.state = state,
                              .plan = shared.plan,
                              .list = team.map_shared_rank(list, 0),
                              .misses = scratch.misses + item * scratch.clusters,
                              .taken = scratch.taken + item * scratch.clusters,
                              .fault = fault,
                              .head = head,
                              .layer = layer,
                              .sinks = min(block.sink_tokens, shared.slot.latch.length),
                              .estimates = block.estimate != 0 ? clusters : 0,
                              .window = FindWindow(block, shared.slot.latch)};
    attention.Attend(LayerTiles(finder), finder, shared.queries, scale,
                     reinterpret_cast<const std::byte*>(&state.header()),
                     reinterpret_cast<Tile<kHeadDim>*>(area)[threadIdx.x / 32]);
  }
  auto* const outputs = reinterpret_cast<float*>(area);
  ShareOutputs(attention, group, outputs, shared.sums);
  // Of a query head's chunks of four elements each block owns every gridDim.x-th.
  constexpr uint32_t kChunks = kHeadDim / 4;
  const uint32_t shift = __ffs(static_cast<int>(gridDim.x)) - 1;
  const uint32_t own_chunks = OwnChunks(kHeadDim, gridDim.x);
  for (uint32_t i = threadIdx.x; i < group * kChunks; i += kThreads) {
    const uint32_t g = i / kChunks, chunk = i % kChunks;
    *team.map_shared_rank(&partials[(rank * group + g) * own_chunks + (chunk >> shift)],
                          chunk & (gridDim.x - 1)) =
        CombineWarps<kHeadDim>(outputs, shared.sums, g, chunk);
  }
  for (uint32_t r = threadIdx.x / kMaxGroup; r < gridDim.x; r += kThreads / kMaxGroup) {
    const uint32_t g = threadIdx.x % kMaxGroup;
    if (g < group) *team.map_shared_rank(&shared.received[rank][g], r) = shared.sums.block[g];
  }
  team.sync();
  ForReceived(shared, group, -INFINITY, [&](uint32_t g, float2 of_all, uint32_t r, float largest) {
    // Not `> 0`: a NaN must come out as NaN.
    const float inverse = of_all.y == 0.0f ? 0.0f : 1.0f / of_all.y;
    shared.factors[r][g] = largest == -INFINITY ? 0.0f : exp2f(largest - of_all.x) * inverse;
    if (r == 0 && rank == 0 && target.lse != nullptr) {
      target.lse[blockIdx.z * target.lse_batch_stride + kv_head * group + g] =
          of_all.y == 0.0f ? -INFINITY : (of_all.x + log2f(of_all.y)) / kLog2E;
    }
  });
  __syncthreads();
  const uint32_t g = threadIdx.x % kMaxGroup;
  if (g >= group) return;
  float* const out =
      target.out + blockIdx.z * target.batch_stride + (kv_head * group + g) * target.head_stride;
  for (uint32_t own = threadIdx.x / kMaxGroup; own < own_chunks; own += kThreads / kMaxGroup) {
    const uint32_t chunk = own * gridDim.x + rank;
    if (chunk >= kChunks) break;
    float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (uint32_t r = 0; r < gridDim.x; ++r) {
      AddScaled(value, shared.factors[r][g], partials[(r * group + g) * own_chunks + own]);
    }
    out[4 * chunk] = value.x;
    out[4 * chunk + 1] = value.y;
    out[4 * chunk + 2] = value.z;
    out[4 * chunk + 3] = value.w;
  }
}

#else

template <typename Storage, int kHeadDim>
__global__ void DecodeLayerKernel(const BatchTable*, uint32_t, QueryLaunch, uint32_t, uint32_t,
                                  OutputLaunch, LayerBytes, uint32_t*) {}

#endif
// As many blocks as surely fit the device at once, with so many resident on a multiprocessor: those
// that a team may lie on are not always a multiple of its size.
uint32_t TeamSize(const BatchShape& shape, uint32_t resident) {
  const uint32_t room = resident * static_cast<uint32_t>(shape.multiprocessors);
  const uint32_t heads = shape.kv_heads * shape.count;
  uint32_t blocks = kMostBlocks;
  if (heads * blocks > room / 4 * 3) blocks = 8;
  while (blocks > 2 && heads * blocks > room / 8 * 7) blocks /= 2;
  return heads * blocks > room ? 1 : blocks;
}

template <typename Storage, int kHeadDim>
cudaError_t Launch(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                   uint32_t budget, const OutputLaunch& target, uint32_t clusters,
                   cudaStream_t stream) {
  constexpr auto kTiles = static_cast<uint32_t>(kWarps * sizeof(Tile<kHeadDim>));
  const uint32_t chosen = 8 * ChosenRoom(budget);
  uint32_t resident = kResident<kHeadDim>, blocks = 0, wanted = 0;
  const auto plan = [&] {
    blocks = TeamSize(shape, resident);
    const uint32_t share = (clusters + blocks - 1) / blocks;
    wanted = std::max(kTiles, chosen + 12 * clusters + 4 * shape.group * share);
  };
  plan();
  uint32_t most = std::max(kMostArea, kTiles);
  if (wanted > most) {
    // Very many clusters: rather half the blocks than a choice in device memory.
    resident = 1;
    plan();
    most = std::max(kMostAreaAlone, kTiles);
  }
  LayerBytes bytes;
  bytes.list = RoundUp(sizeof(LayerShared<kHeadDim>));
  bytes.partials = RoundUp(bytes.list + 4 * budget);
  bytes.area = RoundUp(bytes.partials + 16 * blocks * shape.group * OwnChunks(kHeadDim, blocks));
  bytes.total = std::min(kMostShared, bytes.area + std::max(chosen, std::min(wanted, most)));
  const auto kernel = DecodeLayerKernel<Storage, kHeadDim>;
  const cudaError_t sized = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes.total));
  if (sized != cudaSuccess) return sized;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (allowed != cudaSuccess) return allowed;
  const dim3 grid(blocks, shape.kv_heads, shape.count);
  return LaunchOverlapped(shape.overlap, blocks, kernel, grid, kThreads, bytes.total, stream,
                          shape.table, layer, queries, shape.group, budget, target, bytes,
                          shape.fault);
}

template <typename Storage>
cudaError_t LaunchFor(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                      uint32_t budget, const OutputLaunch& target, uint32_t clusters,
                      cudaStream_t stream) {
  switch (shape.head_dim) {
    case 64:
      return Launch<Storage, 64>(shape, layer, queries, budget, target, clusters, stream);
    case 96:
      return Launch<Storage, 96>(shape, layer, queries, budget, target, clusters, stream);
    case 128:
      return Launch<Storage, 128>(shape, layer, queries, budget, target, clusters, stream);
    case 256:
      return Launch<Storage, 256>(shape, layer, queries, budget, target, clusters, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace layer

cudaError_t LaunchDecodeLayer(const BatchShape& shape, uint32_t layer, const QueryLaunch& queries,
                              uint32_t budget_tokens, const OutputLaunch& target, uint32_t clusters,
                              cudaStream_t stream) {
  return shape.bf16 ? layer::LaunchFor<Bf16>(shape, layer, queries, budget_tokens, target, clusters,
                                             stream)
                    : layer::LaunchFor<Fp16>(shape, layer, queries, budget_tokens, target, clusters,
                                             stream);
}

}  // namespace clusterkv::gpu::cuda
