#include "client/bench/forced_misses.h"

#include <algorithm>
#include <random>

namespace clusterkv::client::bench {
namespace {

// Clusters that are not selected, from a random one on, until they would fill the cache alone.
std::vector<uint32_t> Fillers(const std::vector<uint32_t>& cluster_tokens,
                              const std::vector<uint32_t>& selected, uint32_t cache_tokens,
                              std::mt19937_64& random) {
  std::vector<bool> taken(cluster_tokens.size());
  for (const uint32_t cluster : selected) taken[cluster] = true;
  std::vector<uint32_t> fillers;
  const size_t first = random() % cluster_tokens.size();
  uint32_t tokens = 0;
  for (size_t i = 0; i < cluster_tokens.size() && tokens < cache_tokens; ++i) {
    const size_t cluster = (first + i) % cluster_tokens.size();
    if (taken[cluster]) continue;
    fillers.push_back(static_cast<uint32_t>(cluster));
    tokens += cluster_tokens[cluster];
  }
  return fillers;
}

}  // namespace

CacheEdits ForceMisses(const BatchState& state, uint32_t sequences, const Selections& selections,
                       uint32_t percent, uint64_t seed) {
  const gpu::StateLayout& layout = state.layout();
  CacheEdits edits;
  edits.layout = layout;
  for (const gpu::BatchSlot& slot : state.slots(sequences)) edits.states.push_back(slot.state);
  std::mt19937_64 random(seed);
  uint64_t selected = 0, missed = 0;
  for (size_t item = 0; item < selections.size(); ++item) {
    // What rounding keeps back from one selection goes to the next.
    selected += selections[item].size();
    const uint64_t wanted = (selected * percent + 50) / 100;
    std::vector<uint32_t> victims = selections[item];
    std::shuffle(victims.begin(), victims.end(), random);
    victims.resize(std::min<uint64_t>(victims.size(), wanted - missed));
    missed += victims.size();
    edits.evict.Add(victims);
    const auto head = static_cast<uint32_t>(item % layout.kv_heads);
    edits.fill.Add(percent == 0 ? std::vector<uint32_t>()
                                : Fillers(state.context().cluster_tokens(head), selections[item],
                                          layout.cache_tokens, random));
  }
  return edits;
}

}  // namespace clusterkv::client::bench
