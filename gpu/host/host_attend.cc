// Attend: exact softmax attention over sinks + slot table + window, and the estimate of the
// clusters that were not selected. Online softmax over blocks of rows: one pass, fp32.
//
// Estimate (RetroInfer): a cluster of s tokens with mean key C and mean value M that is not
// attended counts as s tokens with key C and value M, that is with logit q·C + log s. Of a partly
// taken cluster s is the tokens not taken.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gpu/host/decode_steps.h"
#include "gpu/host/simd.h"

namespace clusterkv::gpu::host {
namespace {

constexpr size_t kBlock = 64;  // rows; K and V of a block stay in the L1 or L2 cache
constexpr size_t kMaxGroup = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Scratch {
  std::vector<float> queries;       // [group][head_dim], scaled
  std::vector<float> accumulators;  // [group][head_dim]
  std::vector<uint32_t> left;       // [clusters] tokens not attended, for the estimate
};

Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

// The attention of one KV head's query group over rows that come one by one.
class GroupAttention {
 public:
  GroupAttention(const StateLayout& layout, const GroupQueries& queries, Scratch& scratch)
      : dtype_(layout.dtype),
        dim_(layout.head_dim),
        group_(std::min<size_t>(layout.group_size, kMaxGroup)),
        queries_(scratch.queries),
        accumulators_(scratch.accumulators) {
    queries_.resize(group_ * dim_);
    accumulators_.assign(group_ * dim_, 0.0f);
    for (size_t g = 0; g < group_; ++g) {
      ToFloat(dtype_, queries.q + g * queries.head_stride, &queries_[g * dim_], dim_);
    }
    Scale(layout.softmax_scale, queries_.data(), group_ * dim_);
    std::fill_n(largest_, kMaxGroup, kMinusInfinity);
    std::fill_n(sums_, kMaxGroup, 0.0f);
  }

  // `bias` is added to the logit.
  void Add(const std::byte* k, const std::byte* v, float bias = 0.0f) {
    k_[count_] = k;
    v_[count_] = v;
    biases_[count_] = bias;
    if (++count_ == kBlock) Flush();
  }

  void AddRow(const std::byte* row) { Add(row, row + dim_ * SizeOf(dtype_)); }

  void Finish(const GroupTarget& target) {
    Flush();
    for (size_t g = 0; g < group_; ++g) {
      float* const out = target.out + g * target.head_stride;
      const float* const accumulator = &accumulators_[g * dim_];
      // Not `> 0`: a NaN must come out as NaN.
      const float factor = sums_[g] == 0.0f ? 0.0f : 1.0f / sums_[g];
      for (size_t i = 0; i < dim_; ++i) out[i] = accumulator[i] * factor;
      if (target.lse != nullptr) {
        target.lse[g] = sums_[g] == 0.0f ? kMinusInfinity : largest_[g] + std::log(sums_[g]);
      }
    }
  }

 private:
  void Flush() {
    if (count_ == 0) return;
    DotGroup(dtype_, queries_.data(), group_, k_, count_, dim_, logits_, kBlock);
    for (size_t g = 0; g < group_; ++g) {
      float* const logits = logits_ + g * kBlock;
      for (size_t r = 0; r < count_; ++r) logits[r] += biases_[r];
      const float largest = std::max(largest_[g], Max(logits, count_));
      if (largest > largest_[g]) {
        const float factor = std::exp(largest_[g] - largest);  // 0 for the first block
        Scale(factor, &accumulators_[g * dim_], dim_);
        sums_[g] *= factor;
        largest_[g] = largest;
      }
      // All -inf so far: exp(-inf) = 0, where -inf - -inf would be NaN.
      sums_[g] += ExpSum(largest == kMinusInfinity ? 0.0f : largest, logits, count_);
    }
    AddWeightedRows(dtype_, logits_, kBlock, group_, v_, count_, dim_, accumulators_.data());
    count_ = 0;
  }

  const DType dtype_;
  const size_t dim_;
  const size_t group_;
  std::vector<float>& queries_;
  std::vector<float>& accumulators_;
  float largest_[kMaxGroup];
  float sums_[kMaxGroup];
  size_t count_ = 0;  // rows gathered for the next block
  const std::byte* k_[kBlock];
  const std::byte* v_[kBlock];
  float biases_[kBlock];
  float logits_[kMaxGroup * kBlock];
};

void AddEstimate(const StateView& view, size_t head, uint32_t kv_head, std::vector<uint32_t>& left,
                 GroupAttention& attention) {
  const uint32_t clusters = view.VisibleClusters(head);
  left.resize(clusters);
  for (uint32_t c = 0; c < clusters; ++c) left[c] = view.ClusterTokens(view.clusters(head)[c]);
  const uint32_t count = std::min(view.selected_count(kv_head), view.layout().budget_tokens);
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t cluster = view.selected_cluster(kv_head)[i];
    if (cluster >= clusters) continue;
    left[cluster] -= std::min(left[cluster], view.selected_take(kv_head)[i]);
  }
  const size_t mean_bytes = view.mean_bytes();
  for (uint32_t c = 0; c < clusters; ++c) {
    if (left[c] == 0) continue;
    attention.Add(view.centroids(head) + c * mean_bytes, view.value_means(head) + c * mean_bytes,
                  std::log(static_cast<float>(left[c])));
  }
}

}  // namespace

void AttendHead(const StateView& view, uint32_t layer, uint32_t kv_head,
                const GroupQueries& queries, const GroupTarget& target) {
  const StateLayout& layout = view.layout();
  const size_t head = layout.head_index(layer, kv_head);
  const uint32_t length = view.latch().length;
  Scratch& scratch = ThreadScratch();
  GroupAttention attention(layout, queries, scratch);
  const uint32_t sinks = std::min(layout.sink_tokens, length);
  for (uint32_t position = 0; position < sinks; ++position) {
    attention.AddRow(view.sink(head, position));
  }
  const uint32_t slots = std::min(view.slot_count(kv_head), layout.budget_tokens);
  for (uint32_t i = 0; i < slots; ++i) {
    const uint32_t slot = view.slot_table(kv_head)[i];
    if (slot < layout.cache_tokens) attention.AddRow(view.cache(head, slot));
  }
  // After an overflow only the newest are still there.
  uint32_t position = view.WindowBegin();
  if (length > position)
    position = std::max(position, length - std::min(length, layout.window_slots));
  for (; position < length; ++position) attention.AddRow(view.window(head, position));
  if (layout.estimate != 0) AddEstimate(view, head, kv_head, scratch.left, attention);
  attention.Finish(target);
}

void AttendNothing(const StateLayout& layout, const GroupTarget& target) {
  for (size_t g = 0; g < layout.group_size; ++g) {
    std::fill_n(target.out + g * target.head_stride, layout.head_dim, 0.0f);
    if (target.lse != nullptr) target.lse[g] = kMinusInfinity;
  }
}

}  // namespace clusterkv::gpu::host
