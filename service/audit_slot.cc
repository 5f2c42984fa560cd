#include "service/audit_slot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "gpu/audit_layout.h"
#include "gpu/copy_back.h"
#include "gpu/status_macros.h"

namespace clusterkv::service {
namespace {

absl::Status EndAt(uint32_t cut, AuditStep& step) {
  uint32_t end = step.candidates_begin;
  size_t segments = 0;
  for (; end < cut && segments < step.runs.front().size(); ++segments) {
    end += step.runs.front()[segments].tokens;
  }
  if (end != cut) {
    return absl::InvalidArgumentError(
        fmt::format("cut {} is not where a published segment ends", cut));
  }
  for (std::vector<AuditRun>& runs : step.runs) runs.resize(segments);
  step.candidates_end = cut;
  return absl::OkStatus();
}

// What one KV head chose: the first rows of clusters, whose rows lie one behind the other in the
// runs.
class Chosen {
 public:
  Chosen(const AuditStep& step, size_t head, uint32_t budget_tokens)
      : head_(head),
        runs_(step.runs[head]),
        begin_(step.candidates_begin),
        left_(budget_tokens),
        seen_(step.candidates_end - begin_) {}

  absl::Status Add(uint32_t cluster, uint32_t first_row, uint32_t take) {
    const size_t rows = seen_.size();
    if (first_row > rows || take > rows - first_row) {
      return Refuse(cluster, fmt::format("rows {} to {} are not among the {} before the cut",
                                         first_row, uint64_t{first_row} + take, rows));
    }
    if (take > left_) return Refuse(cluster, "more tokens than the budget");
    left_ -= take;
    for (const AuditRun& run : runs_) {
      const uint32_t skipped = std::min(first_row, run.tokens);
      const uint32_t taken = std::min(take, run.tokens - skipped);
      for (const uint32_t position : absl::MakeConstSpan(run.positions + skipped, taken)) {
        const size_t candidate = position - begin_;
        if (candidate >= rows || seen_[candidate]) {
          return Refuse(cluster,
                        fmt::format("position {} is no candidate or is there twice", position));
        }
        seen_[candidate] = true;
        positions_.push_back(position);
      }
      first_row -= skipped;
      take -= taken;
    }
    return absl::OkStatus();
  }

  std::vector<uint32_t> Take() && { return std::move(positions_); }

 private:
  absl::Status Refuse(uint32_t cluster, const std::string& why) const {
    return absl::InvalidArgumentError(
        fmt::format("KV head {}: cluster {}: {}", head_, cluster, why));
  }

  const size_t head_;
  const std::vector<AuditRun>& runs_;
  const uint32_t begin_;
  uint32_t left_;
  std::vector<bool> seen_;
  std::vector<uint32_t> positions_;
};

absl::StatusOr<std::vector<uint32_t>> ReadChosen(gpu::Stream& stream, const AuditSource& source,
                                                 const AuditStep& step, uint32_t head,
                                                 uint32_t count) {
  const gpu::StateLayout& state = *source.layout;
  const gpu::AuditLayout layout(state);
  const uint32_t published = source.published_clusters[head];
  if (count > std::min(layout.choices, published)) {
    return absl::InvalidArgumentError(fmt::format("KV head {}: {} clusters, of {} at most {}", head,
                                                  count, published, layout.choices));
  }
  const auto copy = [&](uint64_t offset) {
    return gpu::CopyBack<uint32_t>(stream, source.slot + offset + head * layout.choices_bytes(),
                                   count);
  };
  CKV_ASSIGN_OR_RETURN(const std::vector<uint32_t> clusters, copy(layout.clusters));
  CKV_ASSIGN_OR_RETURN(const std::vector<uint32_t> takes, copy(layout.takes));
  const size_t first = state.head_index(source.layer, head) * state.max_clusters;
  CKV_ASSIGN_OR_RETURN(
      const std::vector<gpu::ClusterEntry> entries,
      gpu::CopyBack<gpu::ClusterEntry>(
          stream, source.state + state.clusters + first * sizeof(gpu::ClusterEntry), published));
  Chosen chosen(step, head, state.budget_tokens);
  for (uint32_t i = 0; i < count; ++i) {
    if (clusters[i] >= published) {
      return absl::InvalidArgumentError(
          fmt::format("KV head {}: cluster {} of {}", head, clusters[i], published));
    }
    CKV_RETURN_IF_ERROR(chosen.Add(clusters[i], entries[clusters[i]].first_row, takes[i]));
  }
  return std::move(chosen).Take();
}

}  // namespace

absl::Status ReadAuditSlot(gpu::Stream& stream, const AuditSource& source, AuditStep& step) {
  const gpu::AuditLayout layout(*source.layout);
  CKV_ASSIGN_OR_RETURN(const std::vector<std::byte> front,
                       gpu::CopyBack<std::byte>(stream, source.slot, layout.clusters));
  uint32_t cut = 0;
  std::memcpy(&cut, &front[layout.cut], sizeof(cut));
  CKV_RETURN_IF_ERROR(EndAt(cut, step));
  step.lse.resize(layout.q_heads);
  std::memcpy(step.lse.data(), &front[layout.lse], layout.q_heads * sizeof(float));
  const std::byte* const queries = &front[layout.queries];
  step.queries.assign(queries, queries + layout.q_heads * layout.query_bytes);
  for (uint32_t head = 0; head < layout.kv_heads; ++head) {
    uint32_t count = 0;
    std::memcpy(&count, &front[layout.counts + head * sizeof(count)], sizeof(count));
    CKV_ASSIGN_OR_RETURN(step.chosen.emplace_back(), ReadChosen(stream, source, step, head, count));
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::service
