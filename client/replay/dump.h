// What --dump-outputs writes: clusterkv's outputs and selections of one sequence at one budget.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "client/replay/trace.h"

namespace clusterkv::client::replay {

class OutputDump {
 public:
  OutputDump(const Trace& trace, uint32_t steps, uint32_t budget);

  // `outputs` [q_heads][head_dim]; `selected` [kv_heads][budget], -1 beyond the last.
  void Set(size_t layer, uint32_t step, absl::Span<const float> outputs,
           absl::Span<const int32_t> selected);
  // layers.{L}.o F32 [steps, q_heads, head_dim], layers.{L}.selected I32 [steps, kv_heads, budget].
  absl::Status Write(const std::string& path) const;

 private:
  const Trace& trace_;
  const uint32_t steps_;
  const uint32_t budget_;
  std::vector<std::vector<float>> outputs_;     // per layer
  std::vector<std::vector<int32_t>> selected_;  // per layer
};

}  // namespace clusterkv::client::replay
