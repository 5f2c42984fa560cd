// Exact attention of one step over one (layer, KV head), and what all methods share of it: every
// score q·k and weight is computed once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "client/replay/ranking.h"
#include "client/replay/step_range.h"
#include "client/replay/trace.h"

namespace clusterkv::client::replay {

// K and V rows of one (layer, KV head), by token position.
struct HeadRows {
  HeadRows(const Trace& trace, size_t layer, uint32_t kv_head);

  const std::byte* Key(size_t position) const { return k + position * stride; }
  const std::byte* Value(size_t position) const { return v + position * stride; }

  const std::byte* k;
  const std::byte* v;
  size_t stride;  // bytes between tokens
};

// Queries of the heads that share a KV head at one step, fp32, times softmax_scale:
// [group][head_dim].
void LoadQueries(const Trace& trace, size_t layer, uint32_t kv_head, uint32_t step,
                 std::vector<float>& queries);

// Where a query head's own top n begins and ends, for each of the rising counts n.
class OwnTop {
 public:
  // Of candidate scores; `counts` at most their number.
  void Compute(absl::Span<const float> scores, absl::Span<const uint32_t> counts);

  // Index of the first count whose top n holds the candidate; counts.size() if none does.
  uint8_t level(uint32_t candidate) const { return levels_[candidate]; }
  // The lowest ranked of each count's top n; an index of UINT32_MAX where n is 0.
  const std::vector<Ranked>& last() const { return last_; }

 private:
  std::vector<Ranked> ranked_;
  std::vector<uint8_t> levels_;
  std::vector<Ranked> last_;
};

// Adds up weights and weighted values of scattered tokens, for all query heads of a group.
class WeightedSum {
 public:
  void Reset(size_t group, size_t head_dim);
  // weights[g * stride + i] belongs to positions[i].
  void Add(gpu::DType dtype, const HeadRows& rows, absl::Span<const uint32_t> positions,
           const double* weights, size_t stride);

  double weight(size_t g) const { return weight_[g]; }
  // Not divided by the weight; [head_dim].
  absl::Span<const double> value(size_t g) const;

 private:
  size_t group_ = 0;
  size_t head_dim_ = 0;
  std::vector<double> weight_;
  std::vector<double> value_;
  std::vector<double> largest_;  // weight in the block, per query head
  std::vector<float> block_weights_;
  std::vector<float> block_values_;
  std::vector<const std::byte*> pointers_;
};

// Buffers are kept from step to step. One thread at a time.
class StepAttention {
 public:
  // `queries` as LoadQueries gives them; `counts` rising, at most the candidates.
  void Compute(const Trace& trace, const HeadRows& rows, absl::Span<const float> queries,
               const StepRange& range, absl::Span<const uint32_t> counts);

  const StepRange& range() const { return range_; }
  const HeadRows& rows() const { return *rows_; }
  gpu::DType dtype() const { return dtype_; }
  size_t group() const { return group_; }
  size_t head_dim() const { return head_dim_; }
  absl::Span<const uint32_t> counts() const { return counts_; }
  // Of query head g of the group, [length]. weights are exp(score - largest score).
  absl::Span<const float> scores(size_t g) const;
  absl::Span<const double> weights(size_t g) const;
  double largest(size_t g) const { return largest_[g]; }
  double total_weight(size_t g) const { return totals_[g]; }
  // o*, [head_dim].
  absl::Span<const double> output(size_t g) const;
  const OwnTop& own_top(size_t g) const { return own_tops_[g]; }
  // False where scores overflowed fp32: then nothing here means anything.
  bool finite() const { return finite_; }

 private:
  void ComputeWeights();
  void ComputeOutput();

  StepRange range_;
  const HeadRows* rows_ = nullptr;
  gpu::DType dtype_ = gpu::DType::kFp32;
  size_t group_ = 0;
  size_t head_dim_ = 0;
  bool finite_ = true;
  std::vector<uint32_t> counts_;
  std::vector<const std::byte*> pointers_;  // [length]
  std::vector<float> scores_;               // [group][length]
  std::vector<double> weights_;             // [group][length]
  std::vector<double> largest_;             // [group]
  std::vector<double> totals_;              // [group]
  std::vector<double> output_;              // [group][head_dim]
  std::vector<OwnTop> own_tops_;            // [group]
  std::vector<uint32_t> positions_;         // 0, 1, 2, ...
  WeightedSum sum_;
};

}  // namespace clusterkv::client::replay
