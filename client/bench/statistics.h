// What many samples of one time come to.
#pragma once

#include <vector>

namespace clusterkv::client::bench {

struct Summary {
  double median = 0.0;
  double p99 = 0.0;
  double best = 0.0;
};

// At least one sample. The median of an even number is the mean of the middle two; p99 is the
// nearest rank, so of up to 100 samples the worst.
Summary Summarize(std::vector<double> samples);

}  // namespace clusterkv::client::bench
