#include "client/bench/statistics.h"

#include <algorithm>
#include <cstddef>

namespace clusterkv::client::bench {

Summary Summarize(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const size_t count = samples.size();
  Summary summary;
  summary.best = samples.front();
  summary.median = (samples[(count - 1) / 2] + samples[count / 2]) / 2;
  summary.p99 = samples[(99 * count + 99) / 100 - 1];
  return summary;
}

}  // namespace clusterkv::client::bench
