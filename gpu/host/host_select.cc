// Select: which clusters a KV head attends to (ClusterKV section III-C, shared by its query heads).
#include <algorithm>
#include <vector>

#include "gpu/cluster_worth.h"
#include "gpu/host/decode_steps.h"
#include "gpu/host/score_order.h"
#include "gpu/host/simd.h"

namespace clusterkv::gpu::host {
namespace {

constexpr size_t kBlock = 256;  // centroids scored at a time; their rows stay in the L2 cache

// Reused by each thread of the pool: a step allocates only while sequences grow.
struct Scratch {
  std::vector<float> queries;   // [group][head_dim], scaled
  std::vector<float> scores;    // [group][clusters]
  std::vector<uint64_t> order;  // a heap of keys
};

Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

void ScoreCentroids(const StateView& view, size_t head, uint32_t clusters,
                    const GroupQueries& queries, Scratch& scratch) {
  const StateLayout& layout = view.layout();
  const size_t dim = layout.head_dim;
  const size_t group = layout.group_size;
  scratch.queries.resize(group * dim);
  for (size_t g = 0; g < group; ++g) {
    ToFloat(layout.dtype, queries.q + g * queries.head_stride, &scratch.queries[g * dim], dim);
  }
  Scale(layout.softmax_scale, scratch.queries.data(), group * dim);
  scratch.scores.resize(group * clusters);
  const std::byte* const centroids = view.centroids(head);
  const std::byte* rows[kBlock];
  for (size_t begin = 0; begin < clusters; begin += kBlock) {
    const size_t count = std::min<size_t>(kBlock, clusters - begin);
    for (size_t r = 0; r < count; ++r) rows[r] = centroids + (begin + r) * view.mean_bytes();
    DotGroup(layout.dtype, scratch.queries.data(), group, rows, count, dim, &scratch.scores[begin],
             clusters);
  }
}

// Scores of the whole group into the first query head's.
void CombineGroup(GroupRule rule, size_t group, size_t clusters, float* scores) {
  if (rule == GroupRule::kSoftmax) {
    for (size_t g = 0; g < group; ++g) {
      float* const own = scores + g * clusters;
      const float sum = ExpSum(Max(own, clusters), own, clusters);
      Scale(1.0f / sum, own, clusters);
    }
  }
  for (size_t g = 1; g < group; ++g) {
    const float* const own = scores + g * clusters;
    for (size_t c = 0; c < clusters; ++c) {
      scores[c] = rule == GroupRule::kMax ? std::max(scores[c], own[c]) : scores[c] + own[c];
    }
  }
  if (rule == GroupRule::kMean) Scale(1.0f / static_cast<float>(group), scores, clusters);
}

// Orders as (score falling, id rising) does; NaN goes last.
uint64_t Key(float score, uint32_t cluster) {
  return uint64_t{OrderedBits(score)} << 32 | (0xffffffffu - cluster);
}

uint32_t ClusterOfKey(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace

void SelectHead(const StateView& view, uint32_t layer, uint32_t kv_head,
                const GroupQueries& queries, uint32_t budget_tokens) {
  const StateLayout& layout = view.layout();
  const size_t head = layout.head_index(layer, kv_head);
  const uint32_t clusters = view.VisibleClusters(head);
  uint32_t left = std::min(budget_tokens, layout.budget_tokens);
  uint32_t selected = 0;
  if (clusters > 0 && left > 0) {
    Scratch& scratch = ThreadScratch();
    ScoreCentroids(view, head, clusters, queries, scratch);
    CombineGroup(layout.group, layout.group_size, clusters, scratch.scores.data());
    std::vector<uint64_t>& order = scratch.order;
    order.resize(clusters);
    float* const mean_scores = view.mean_scores(head);
    for (uint32_t c = 0; c < clusters; ++c) {
      order[c] = Key(scratch.scores[c], c);
      mean_scores[c] = NextMeanScore(mean_scores[c], scratch.scores[c]);
    }
    std::make_heap(order.begin(), order.end());
    const ClusterEntry* const entries = view.clusters(head);
    // Each cluster taken has at least one token, so the lists' budget_tokens entries suffice.
    for (auto end = order.end(); left > 0 && end != order.begin(); --end) {
      std::pop_heap(order.begin(), end);
      const uint32_t cluster = ClusterOfKey(*(end - 1));
      const uint32_t take = std::min(left, view.ClusterTokens(entries[cluster]));
      if (take == 0) continue;
      view.selected_cluster(kv_head)[selected] = cluster;
      view.selected_take(kv_head)[selected] = take;
      ++selected;
      left -= take;
    }
  }
  view.selected_count(kv_head) = selected;
}

}  // namespace clusterkv::gpu::host
