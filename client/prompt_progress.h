// How far the prompt of one sequence has been handed over: per layer, since layers may run ahead of
// each other.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "client/client.h"

namespace clusterkv::client {

// Not thread-safe.
class PromptProgress {
 public:
  PromptProgress(uint32_t layers, uint32_t max_tokens) : max_tokens_(max_tokens), layers_(layers) {}

  // May this range come next? Errors: INVALID_ARGUMENT (count, layers), OUT_OF_RANGE,
  // FAILED_PRECONDITION (position; a prompt that has ended, or ends elsewhere).
  absl::Status Check(const IngestRange& range) const;
  // The range was handed over. REQUIRES: Check was OK.
  void Advance(const IngestRange& range);
  // Has all of the range been handed over?
  bool Has(const IngestRange& range) const;

  // Tokens of the layer that is furthest behind.
  uint32_t tokens() const;
  // Known once one layer has ended.
  std::optional<uint32_t> prompt_tokens() const { return prompt_tokens_; }
  // All layers have ended.
  bool ended() const;

 private:
  const uint32_t max_tokens_;
  std::vector<uint32_t> layers_;  // next position
  std::optional<uint32_t> prompt_tokens_;
};

}  // namespace clusterkv::client
