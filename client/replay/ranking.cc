#include "client/replay/ranking.h"

#include <algorithm>

namespace clusterkv::client::replay {

void RankPrefixes(absl::Span<Ranked> items, absl::Span<const uint32_t> counts) {
  auto end = items.end();
  // From the largest on, each selection works on what the last one left.
  for (size_t i = counts.size(); i-- > 0;) {
    const auto nth = items.begin() + counts[i];
    if (nth >= end) continue;
    std::nth_element(items.begin(), nth, end, RanksBefore);
    end = nth;
  }
}

}  // namespace clusterkv::client::replay
