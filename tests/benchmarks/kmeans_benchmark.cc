// Time of the host k-means, beside the FMA peak of the same cores in the same run.
//
//   kmeans_benchmark [--problems 8] [--tokens 8192] [--head-dim 128] [--clusters 256]
//                    [--iterations 10] [--dtype fp16] [--threads 0 (all cores)] [--runs 7]
//                    [--center 0] [--seed 1]

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "tests/benchmarks/kmeans_benchmark.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace clusterkv::gpu::host::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// 12 chains of FMA; the result keeps the compiler from dropping them. *flops: what was done.
float FmaChains(size_t steps, double* flops) {
  const hn::ScalableTag<float> d;
  // x = 0.5 x + 0.25 stays near 0.5; Iota makes the chains differ.
  const auto half = hn::Set(d, 0.5f), quarter = hn::Set(d, 0.25f);
  auto a = hn::Iota(d, 0.0f), b = hn::Iota(d, 1.0f), c = hn::Iota(d, 2.0f);
  auto e = hn::Iota(d, 3.0f), f = hn::Iota(d, 4.0f), g = hn::Iota(d, 5.0f);
  auto h = hn::Iota(d, 6.0f), i = hn::Iota(d, 7.0f), j = hn::Iota(d, 8.0f);
  auto k = hn::Iota(d, 9.0f), l = hn::Iota(d, 10.0f), m = hn::Iota(d, 11.0f);
  for (size_t step = 0; step < steps; ++step) {
    a = hn::MulAdd(a, half, quarter), b = hn::MulAdd(b, half, quarter);
    c = hn::MulAdd(c, half, quarter), e = hn::MulAdd(e, half, quarter);
    f = hn::MulAdd(f, half, quarter), g = hn::MulAdd(g, half, quarter);
    h = hn::MulAdd(h, half, quarter), i = hn::MulAdd(i, half, quarter);
    j = hn::MulAdd(j, half, quarter), k = hn::MulAdd(k, half, quarter);
    l = hn::MulAdd(l, half, quarter), m = hn::MulAdd(m, half, quarter);
  }
  *flops = 2.0 * 12.0 * static_cast<double>(steps) * static_cast<double>(hn::Lanes(d));
  a = hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, e)), hn::Add(hn::Add(f, g), hn::Add(h, i)));
  a = hn::Add(a, hn::Add(hn::Add(j, k), hn::Add(l, m)));
  return hn::GetLane(hn::SumOfLanes(d, a));
}

const char* TargetName() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace clusterkv::gpu::host::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include "gpu/host/kmeans.h"
#include "gpu/host/simd.h"

namespace clusterkv::gpu::host {
namespace {

HWY_EXPORT(FmaChains);
HWY_EXPORT(TargetName);

struct Options {
  size_t problems = 8;
  uint32_t tokens = 8192;
  uint32_t head_dim = 128;
  uint32_t clusters = 256;
  uint32_t iterations = 10;
  DType dtype = DType::kFp16;
  int threads = 0;
  size_t runs = 7;
  bool center = false;
  uint64_t seed = 1;
};

struct Output {
  std::vector<uint32_t> order, sizes;
  std::vector<std::byte> centroids, value_means;
  uint32_t count = 0;
};

double Seconds(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Best of several, in GFLOP/s, over all threads at once.
double PeakGflops(ThreadPool& pool) {
  const size_t threads = static_cast<size_t>(pool.threads());
  std::vector<double> flops(threads);
  std::vector<float> results(threads);
  double best = 0.0;
  for (int run = 0; run < 5; ++run) {
    const double seconds = Seconds([&] {
      pool.ParallelFor(threads, [&](size_t i) {
        results[i] = HWY_DYNAMIC_DISPATCH(FmaChains)(20'000'000, &flops[i]);
      });
    });
    double total = 0.0;
    for (const double f : flops) total += f;
    best = std::max(best, total / seconds / 1e9);
  }
  if (results[0] < 0.0f) std::puts("");  // never; the result is used
  return best;
}

// Keys as a head has them: a common offset with a few strong channels, topics, and noise.
std::vector<std::byte> MakeRows(const Options& options) {
  std::mt19937_64 random(options.seed);
  std::normal_distribution<float> normal;
  const size_t row = 2 * options.head_dim;
  const size_t topics = 2 * options.clusters;
  std::vector<float> offset(options.head_dim), topic(topics * options.head_dim), values(row);
  for (float& x : offset) x = normal(random) * (random() % 32 == 0 ? 8.0f : 0.5f);
  for (float& x : topic) x = normal(random);
  std::vector<std::byte> rows(options.problems * options.tokens * row * SizeOf(options.dtype));
  for (size_t t = 0; t < options.problems * options.tokens; ++t) {
    const float* center = &topic[random() % topics * options.head_dim];
    for (size_t i = 0; i < options.head_dim; ++i) {
      values[i] = offset[i] + center[i] + 0.8f * normal(random);
      values[options.head_dim + i] = normal(random);
    }
    FromFloat(options.dtype, values.data(), &rows[t * row * SizeOf(options.dtype)], row);
  }
  return rows;
}

ClusterArgs MakeArgs(const Options& options, const std::vector<std::byte>& rows,
                     std::vector<Output>& outputs) {
  ClusterArgs args;
  args.head_dim = options.head_dim;
  args.dtype = options.dtype;
  args.iterations = options.iterations;
  args.largest_cluster_tokens = std::max(1u, 4 * (options.tokens / options.clusters));
  args.center_keys = options.center;
  outputs.resize(options.problems);
  const size_t max = options.clusters + options.tokens / args.largest_cluster_tokens;
  for (size_t p = 0; p < options.problems; ++p) {
    Output& out = outputs[p];
    out.order.resize(options.tokens);
    out.sizes.resize(max);
    out.centroids.resize(max * options.head_dim * SizeOf(options.dtype));
    out.value_means.resize(out.centroids.size());
    ClusterProblem problem;
    problem.rows = rows.data() + p * (rows.size() / options.problems);
    problem.tokens = options.tokens;
    problem.clusters = options.clusters;
    problem.seed = options.seed + p;
    problem.order = out.order.data();
    problem.sizes = out.sizes.data();
    problem.centroids = out.centroids.data();
    problem.value_means = out.value_means.data();
    problem.count = &out.count;
    args.problems.push_back(problem);
  }
  return args;
}

// Passes over the points, in all: a problem stops after the first that changes nothing, so that a
// lower limit which gives the same result tells.
size_t PassesRun(ThreadPool& pool, ClusterArgs args, std::vector<Output>& outputs) {
  const uint32_t limit = args.iterations;
  std::vector<size_t> passes(outputs.size(), limit);
  std::vector<std::vector<uint32_t>> last(outputs.size());
  for (size_t p = 0; p < outputs.size(); ++p) last[p] = outputs[p].order;
  for (args.iterations = limit - 1; args.iterations > 0; --args.iterations) {
    ClusterProblems(pool, args);
    bool any = false;
    for (size_t p = 0; p < outputs.size(); ++p) {
      if (passes[p] != args.iterations + 1 || outputs[p].order != last[p]) continue;
      passes[p] = std::max(args.iterations, 2u);  // pass i repeated pass i - 1 at the earliest
      any = true;
    }
    if (!any) break;
  }
  size_t total = 0;
  for (const size_t p : passes) total += p;
  return total;
}

bool Parse(int argc, char** argv, Options& options) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string key = argv[i], text = argv[i + 1];
    const auto number = static_cast<uint32_t>(std::strtoul(text.c_str(), nullptr, 10));
    if (key == "--problems") {
      options.problems = number;
    } else if (key == "--tokens") {
      options.tokens = number;
    } else if (key == "--head-dim") {
      options.head_dim = number;
    } else if (key == "--clusters") {
      options.clusters = number;
    } else if (key == "--iterations") {
      options.iterations = number;
    } else if (key == "--threads") {
      options.threads = static_cast<int>(number);
    } else if (key == "--runs") {
      options.runs = number;
    } else if (key == "--center") {
      options.center = number != 0;
    } else if (key == "--seed") {
      options.seed = number;
    } else if (const auto dtype = ParseDType(text); key == "--dtype" && dtype.ok()) {
      options.dtype = *dtype;
    } else {
      return false;
    }
  }
  return argc % 2 == 1 && options.problems > 0 && options.runs > 0 && options.clusters > 0 &&
         options.iterations > 0 && options.clusters <= options.tokens;
}

int Main(int argc, char** argv) {
  Options options;
  if (!Parse(argc, argv, options)) {
    std::fputs("usage: see the head of kmeans_benchmark.cc\n", stderr);
    return 2;
  }
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  ThreadPool pool(options.threads > 0 ? options.threads : cores);
  const std::vector<std::byte> rows = MakeRows(options);
  std::vector<Output> outputs;
  const ClusterArgs args = MakeArgs(options, rows, outputs);

  double peak = PeakGflops(pool);
  ClusterProblems(pool, args);  // warms up
  std::vector<double> seconds;
  for (size_t run = 0; run < options.runs; ++run) {
    seconds.push_back(Seconds([&] { ClusterProblems(pool, args); }));
  }
  peak = std::max(peak, PeakGflops(pool));
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  const size_t passes = PassesRun(pool, args, outputs);
  const double gflop =
      2e-9 * static_cast<double>(passes) * options.tokens * options.clusters * options.head_dim;
  std::printf("%zu problems of %u x %u %s, k %u, at most %u iterations, %d threads, %s\n",
              options.problems, options.tokens, options.head_dim, DTypeName(options.dtype),
              options.clusters, options.iterations, pool.threads(),
              HWY_DYNAMIC_DISPATCH(TargetName)());
  std::printf("passes run        %zu of %zu\n", passes, options.problems * options.iterations);
  std::printf("time              median %.3f s, best %.3f, worst %.3f of %zu runs\n", median,
              seconds.front(), seconds.back(), options.runs);
  std::printf("achieved          %.1f GFLOP/s (median), %.1f (best), for %.1f GFLOP of distances\n",
              gflop / median, gflop / seconds.front(), gflop);
  std::printf("FMA peak          %.1f GFLOP/s in this run\n", peak);
  std::printf("ratio             %.2f (median), %.2f (best)\n", gflop / median / peak,
              gflop / seconds.front() / peak);
  return 0;
}

}  // namespace
}  // namespace clusterkv::gpu::host

int main(int argc, char** argv) { return clusterkv::gpu::host::Main(argc, argv); }

#endif  // HWY_ONCE
