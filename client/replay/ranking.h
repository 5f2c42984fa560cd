// Falling order with ties broken by the lower index, which makes every choice repeatable.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace clusterkv::client::replay {

struct Ranked {
  double score = 0.0;
  uint32_t index = 0;
};

inline bool RanksBefore(const Ranked& a, const Ranked& b) {
  return a.score > b.score || (a.score == b.score && a.index < b.index);
}

// Reorders `items` so that, for each of `counts` (rising; at most all items), the first `count` are
// the highest ranked. Within these prefixes the order is open: they cost linear time.
void RankPrefixes(absl::Span<Ranked> items, absl::Span<const uint32_t> counts);

}  // namespace clusterkv::client::replay
