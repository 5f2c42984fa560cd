// Reads back what Select chose, as token positions: for reports and served fetch.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/state_layout.h"

namespace clusterkv::gpu {

// Of the layer that `slot` decoded last: [kv_heads][budget_tokens], token positions, clusters in
// falling score, -1 beyond the last. Waits for the stream. `layer` is that layer; `budget_tokens`
// what Select was given.
// Errors: those of the stream; DATA_LOSS if the state holds values out of bounds.
absl::StatusOr<std::vector<int32_t>> ReadSelection(Stream& stream, const BatchSlot& slot,
                                                   uint32_t layer, uint32_t budget_tokens);

}  // namespace clusterkv::gpu
