#include "client/bench/fma_peak.h"

#include <cstddef>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "client/bench/fma_peak.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::client::bench::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr size_t kSteps = 10'000'000;

// Twelve independent chains hide the latency; x = 0.5 x + 0.25 stays near 0.5.
double Chains(float* sink) {
  const hn::ScalableTag<float> d;
  const auto half = hn::Set(d, 0.5f), quarter = hn::Set(d, 0.25f);
  auto a = hn::Iota(d, 0.0f), b = hn::Iota(d, 1.0f), c = hn::Iota(d, 2.0f);
  auto e = hn::Iota(d, 3.0f), f = hn::Iota(d, 4.0f), g = hn::Iota(d, 5.0f);
  auto h = hn::Iota(d, 6.0f), i = hn::Iota(d, 7.0f), j = hn::Iota(d, 8.0f);
  auto k = hn::Iota(d, 9.0f), l = hn::Iota(d, 10.0f), m = hn::Iota(d, 11.0f);
  for (size_t step = 0; step < kSteps; ++step) {
    a = hn::MulAdd(a, half, quarter), b = hn::MulAdd(b, half, quarter);
    c = hn::MulAdd(c, half, quarter), e = hn::MulAdd(e, half, quarter);
    f = hn::MulAdd(f, half, quarter), g = hn::MulAdd(g, half, quarter);
    h = hn::MulAdd(h, half, quarter), i = hn::MulAdd(i, half, quarter);
    j = hn::MulAdd(j, half, quarter), k = hn::MulAdd(k, half, quarter);
    l = hn::MulAdd(l, half, quarter), m = hn::MulAdd(m, half, quarter);
  }
  a = hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, e)), hn::Add(hn::Add(f, g), hn::Add(h, i)));
  a = hn::Add(a, hn::Add(hn::Add(j, k), hn::Add(l, m)));
  *sink = hn::GetLane(hn::SumOfLanes(d, a));
  return 2.0 * 12.0 * static_cast<double>(kSteps) * static_cast<double>(hn::Lanes(d));
}

}  // namespace
}  // namespace clusterkv::client::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace clusterkv::client::bench {

HWY_EXPORT(Chains);

double MultiplyAdds() {
  volatile float kept = 0.0f;  // so that the chains are not dropped
  float sink = 0.0f;
  const double done = HWY_DYNAMIC_DISPATCH(Chains)(&sink);
  kept = sink;
  (void)kept;
  return done;
}

}  // namespace clusterkv::client::bench

#endif  // HWY_ONCE
