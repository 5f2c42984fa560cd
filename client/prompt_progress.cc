#include "client/prompt_progress.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace clusterkv::client {

absl::Status PromptProgress::Check(const IngestRange& range) const {
  if (range.count == 0) return absl::InvalidArgumentError("count is 0; allowed: at least 1");
  if (range.layer_count == 0 || range.layer_begin >= layers_.size() ||
      range.layer_count > layers_.size() - range.layer_begin) {
    return absl::InvalidArgumentError(absl::StrCat("layers ", range.layer_begin, " + ",
                                                   range.layer_count, "; allowed: within ",
                                                   layers_.size()));
  }
  const uint64_t end = uint64_t{range.position} + range.count;
  if (end > max_tokens_) {
    return absl::OutOfRangeError(
        absl::StrCat("positions up to ", end, " of a sequence of ", max_tokens_, " max_tokens"));
  }
  for (uint32_t i = 0; i < range.layer_count; ++i) {
    const uint32_t layer = range.layer_begin + i;
    if (prompt_tokens_.has_value() && layers_[layer] == *prompt_tokens_) {
      return absl::FailedPreconditionError(
          absl::StrCat("the prompt of layer ", layer, " has ended at ", *prompt_tokens_));
    }
    if (layers_[layer] != range.position) {
      return absl::FailedPreconditionError(absl::StrCat(
          "layer ", layer, ": position ", range.position, "; expected ", layers_[layer]));
    }
  }
  if (prompt_tokens_.has_value() &&
      (end > *prompt_tokens_ || range.end_of_prompt != (end == *prompt_tokens_))) {
    return absl::FailedPreconditionError(
        absl::StrCat("positions up to ", end, range.end_of_prompt ? ", the prompt's end," : "",
                     " but the prompt of another layer has ", *prompt_tokens_, " tokens"));
  }
  return absl::OkStatus();
}

void PromptProgress::Advance(const IngestRange& range) {
  const uint32_t end = range.position + range.count;
  for (uint32_t i = 0; i < range.layer_count; ++i) layers_[range.layer_begin + i] = end;
  if (range.end_of_prompt) prompt_tokens_ = end;
}

bool PromptProgress::Has(const IngestRange& range) const {
  for (uint32_t i = 0; i < range.layer_count; ++i) {
    if (layers_[range.layer_begin + i] < range.position + range.count) return false;
  }
  return true;
}

uint32_t PromptProgress::tokens() const {
  return *std::min_element(layers_.begin(), layers_.end());
}

bool PromptProgress::ended() const {
  return prompt_tokens_.has_value() && tokens() == *prompt_tokens_;
}

}  // namespace clusterkv::client
