// How good a choice of tokens is, as the contract defines it: recall, output_error, mass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "client/replay/ranking.h"
#include "client/replay/step_attention.h"
#include "client/replay/step_range.h"
#include "client/replay/trace.h"

namespace clusterkv::client::replay {

// A sum over query heads (and, further out, steps and sequences); `count` says of how many.
struct Measures {
  double recall = 0.0;
  double output_error = 0.0;
  double mass = 0.0;
  uint64_t count = 0;

  Measures& operator+=(const Measures& other);
  // Divided by count; zeros stay zeros.
  Measures Mean() const;
};

// ‖output − exact‖₂ / ‖exact‖₂. Where the exact output is zero: 0 if the other is, too, else 1.
double RelativeError(absl::Span<const float> output, absl::Span<const double> exact);

// Measures attention over sinks + choice + window for lists whose prefixes are the choices of
// step.counts(). One thread at a time.
class PrefixMeter {
 public:
  // What all choices at this step share.
  void SetStep(const StepAttention& step);
  // Adds the measures of the first counts[i] of `positions` to sums[i], one for each query head.
  void Measure(absl::Span<const uint32_t> positions, absl::Span<Measures> sums);

 private:
  void AddRecall(absl::Span<const uint32_t> positions, absl::Span<Measures> sums);

  const StepAttention* step_ = nullptr;
  WeightedSum always_;  // sinks and window
  WeightedSum sum_;
  std::vector<uint32_t> positions_;
  std::vector<double> weights_;  // [group][positions_]
  std::vector<float> output_;
  std::vector<uint64_t> found_;  // [counts]
};

// What the measures of a foreign choice need of exact attention, kept small enough to keep for
// every step.
struct ExactHead {
  std::vector<float> output;         // o*
  double largest = 0.0;              // score
  double total_weight = 0.0;         // sum of exp(score - largest)
  std::vector<Ranked> last_own_top;  // per count: the lowest ranked of the head's own top n
};

// [q_heads of one KV head] from a computed step.
void StoreExact(const StepAttention& step, absl::Span<ExactHead> heads);

// Measures a choice that was made elsewhere together with the output that came of it.
// One thread at a time.
class ChoiceMeter {
 public:
  // `positions`: the chosen candidates. `outputs` [group][head_dim]. `count_index`: which of the
  // counts of `heads` the choice has. Adds one for each query head of the group.
  void Measure(const Trace& trace, const HeadRows& rows, absl::Span<const float> queries,
               const StepRange& range, absl::Span<const ExactHead> heads,
               absl::Span<const int32_t> positions, size_t count_index,
               absl::Span<const float> outputs, Measures& sum);

 private:
  std::vector<const std::byte*> keys_;
  std::vector<float> scores_;  // [group][keys_]
  std::vector<double> exact_;
};

}  // namespace clusterkv::client::replay
