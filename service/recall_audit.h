// How good one layer of one decode step was, against exact attention over the host store: recall
// and missed attention mass, per query head.
//
// Recall is |chosen ∩ the query head's own top n by q·k among the candidates| / n, n = number
// chosen; 1 where nothing was chosen. Missed mass is the share of the exact softmax over all tokens
// that lies on candidates which were not chosen: what was attended is known by its log-sum-exp
// alone. Queries and log-sum-exps are a worker's word: any value does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gpu/shape.h"

namespace clusterkv::service {

// The rows of one published segment of one KV head, in any order.
struct AuditRun {
  const std::byte* rows = nullptr;      // K then V
  const uint32_t* positions = nullptr;  // of the rows
  uint32_t tokens = 0;
};

struct AuditStep {
  gpu::Shape shape;
  float softmax_scale = 0;
  bool exact_lse = true;  // false: the log-sum-exps count estimates, too, and tell no mass
  uint32_t candidates_begin = 0, candidates_end = 0;  // positions, all of them in the runs
  std::vector<std::vector<AuditRun>> runs;            // [kv_heads]
  std::vector<std::byte> queries;                     // dtype [q_heads][head_dim]
  std::vector<float> lse;                             // [q_heads], of what was attended
  std::vector<std::vector<uint32_t>> chosen;          // [kv_heads], candidates, each once
};

struct AuditResult {
  uint64_t heads = 0;  // query heads
  double recall_sum = 0;
  uint64_t mass_heads = 0;  // query heads of which the mass is known
  double missed_mass_sum = 0;
};

// Takes about a nanosecond a candidate and query head on one core.
AuditResult RunAudit(const AuditStep& step);

}  // namespace clusterkv::service
