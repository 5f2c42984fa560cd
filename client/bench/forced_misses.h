// Cache edits that make a share of a step's clusters miss, and evict others as a full cache does.
#pragma once

#include <cstdint>

#include "client/bench/batch_state.h"
#include "client/bench/cache_edits.h"

namespace clusterkv::client::bench {

// Before each run `percent` of every selection goes, the share exact over all of them; the rest of
// the cache fills up with clusters that were used long ago, so that the run evicts as many tokens
// as it misses. The selections are those of the first `sequences`.
CacheEdits ForceMisses(const BatchState& state, uint32_t sequences, const Selections& selections,
                       uint32_t percent, uint64_t seed);

}  // namespace clusterkv::client::bench
