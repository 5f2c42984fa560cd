#include "gpu/host/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gpu/host/simd.h"
#include "gpu/kmeans_seed.h"
#include "gpu/segment_plan.h"
#include "gtest/gtest.h"
#include "hwy/targets.h"
#include "tests/gpu/seed.h"

namespace clusterkv::gpu::host {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::Ge;
using ::testing::Le;

// Rows (K, V) of one problem, in storage and as what the storage says.
struct Data {
  Data(DType type, uint32_t dim, std::vector<float> values) : dtype(type), head_dim(dim) {
    rows.resize(values.size() * SizeOf(dtype));
    FromFloat(dtype, values.data(), rows.data(), values.size());
    decoded.resize(values.size());
    ToFloat(dtype, rows.data(), decoded.data(), values.size());
  }
  uint32_t tokens() const { return static_cast<uint32_t>(decoded.size() / (2 * head_dim)); }
  const float* key(size_t token) const { return &decoded[token * 2 * head_dim]; }

  DType dtype;
  uint32_t head_dim;
  std::vector<std::byte> rows;
  std::vector<float> decoded;
};

struct Options {
  uint32_t clusters = 1;
  uint32_t iterations = 10;
  uint32_t largest = 1u << 30;
  bool center = false;
  uint64_t seed = 1;
  int threads = 2;
};

struct Result {
  std::vector<uint32_t> order, sizes;
  std::vector<float> centroids, value_means;  // [sizes.size()][head_dim]
  uint32_t iterations = 0;                    // done
  // Of each token.
  std::vector<uint32_t> Labels() const {
    std::vector<uint32_t> labels(order.size());
    size_t i = 0;
    for (size_t k = 0; k < sizes.size(); ++k) {
      for (uint32_t n = 0; n < sizes[k]; ++n) labels[order[i++]] = static_cast<uint32_t>(k);
    }
    return labels;
  }
  bool operator==(const Result&) const = default;
};

// All data with the same head_dim and dtype, in one call.
std::vector<Result> Cluster(const std::vector<const Data*>& data, const Options& options) {
  ClusterArgs args;
  args.head_dim = data[0]->head_dim;
  args.dtype = data[0]->dtype;
  args.iterations = options.iterations;
  args.largest_cluster_tokens = options.largest;
  args.center_keys = options.center;
  std::vector<Result> results(data.size());
  std::vector<uint32_t> counts(data.size());
  std::vector<std::vector<std::byte>> centroids(data.size()), value_means(data.size());
  for (size_t p = 0; p < data.size(); ++p) {
    ClusterProblem problem;
    problem.rows = data[p]->rows.data();
    problem.tokens = data[p]->tokens();
    problem.clusters = std::min(options.clusters, problem.tokens);
    problem.seed = options.seed;
    const size_t max = problem.clusters + problem.tokens / options.largest;
    results[p].order.resize(problem.tokens);
    results[p].sizes.resize(max);
    centroids[p].resize(max * args.head_dim * SizeOf(args.dtype));
    value_means[p].resize(centroids[p].size());
    problem.order = results[p].order.data();
    problem.sizes = results[p].sizes.data();
    problem.centroids = centroids[p].data();
    problem.value_means = value_means[p].data();
    problem.count = &counts[p];
    problem.iterations = &results[p].iterations;
    args.problems.push_back(problem);
  }
  ThreadPool pool(options.threads);
  ClusterProblems(pool, args);
  for (size_t p = 0; p < data.size(); ++p) {
    EXPECT_LE(counts[p], results[p].sizes.size());
    results[p].sizes.resize(counts[p]);
    const size_t n = counts[p] * args.head_dim;
    results[p].centroids.resize(n);
    results[p].value_means.resize(n);
    ToFloat(args.dtype, centroids[p].data(), results[p].centroids.data(), n);
    ToFloat(args.dtype, value_means[p].data(), results[p].value_means.data(), n);
  }
  return results;
}

Result Cluster(const Data& data, const Options& options) { return Cluster({&data}, options)[0]; }

// Topics of unequal sizes around a common offset, with norms that vary.
struct Topics {
  uint32_t tokens = 2048;
  uint32_t head_dim = 64;
  uint32_t topics = 100;
  float noise = 0.7f;
  float offset = 0.3f;
  DType dtype = DType::kFp32;
};

Data MakeData(const Topics& shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> uniform;
  std::vector<float> offset(shape.head_dim), topics(shape.topics * shape.head_dim);
  for (float& x : offset) x = shape.offset * normal(random);
  for (float& x : topics) x = normal(random);
  std::vector<float> values;
  for (uint32_t t = 0; t < shape.tokens; ++t) {
    const float u = uniform(random);
    const auto topic =
        std::min(shape.topics - 1, static_cast<uint32_t>(u * u * static_cast<float>(shape.topics)));
    const float scale = std::exp(0.3f * normal(random));
    for (uint32_t i = 0; i < shape.head_dim; ++i) {
      const float x = topics[topic * shape.head_dim + i] + shape.noise * normal(random);
      values.push_back(offset[i] + scale * x);
    }
    for (uint32_t i = 0; i < shape.head_dim; ++i) values.push_back(normal(random));
  }
  return Data(shape.dtype, shape.head_dim, std::move(values));
}

// Unit keys in double precision; the mean key is subtracted first if so asked.
std::vector<double> UnitKeys(const Data& data, bool center) {
  const size_t n = data.tokens(), d = data.head_dim;
  std::vector<double> mean(d, 0.0), units(n * d);
  for (size_t t = 0; center && t < n; ++t) {
    for (size_t i = 0; i < d; ++i) mean[i] += data.key(t)[i] / static_cast<double>(n);
  }
  for (size_t t = 0; t < n; ++t) {
    double norm = 0.0;
    for (size_t i = 0; i < d; ++i) {
      units[t * d + i] = data.key(t)[i] - mean[i];
      norm += units[t * d + i] * units[t * d + i];
    }
    for (size_t i = 0; norm > 0.0 && i < d; ++i) units[t * d + i] /= std::sqrt(norm);
  }
  return units;
}

// Directions of the clusters, [k][dim], and the mean cosine of the keys to them.
double Directions(const std::vector<double>& units, size_t d, const std::vector<uint32_t>& labels,
                  std::vector<double>& directions) {
  std::fill(directions.begin(), directions.end(), 0.0);
  for (size_t t = 0; t < labels.size(); ++t) {
    for (size_t i = 0; i < d; ++i) directions[labels[t] * d + i] += units[t * d + i];
  }
  double total = 0.0;
  for (size_t k = 0; k < directions.size() / d; ++k) {
    double norm = 0.0;
    for (size_t i = 0; i < d; ++i) norm += directions[k * d + i] * directions[k * d + i];
    norm = std::sqrt(norm);
    total += norm;
    for (size_t i = 0; norm > 0.0 && i < d; ++i) directions[k * d + i] /= norm;
  }
  return total / static_cast<double>(labels.size());
}

double Objective(const std::vector<double>& units, size_t d, const Result& result) {
  std::vector<double> directions(result.sizes.size() * d);
  return Directions(units, d, result.Labels(), directions);
}

std::pair<double, uint32_t> BestDirection(const double* unit, const std::vector<double>& directions,
                                          size_t d) {
  std::pair<double, uint32_t> best{-2.0, 0};
  for (size_t k = 0; k < directions.size() / d; ++k) {
    double score = 0.0;
    for (size_t i = 0; i < d; ++i) score += unit[i] * directions[k * d + i];
    if (score > best.first) best = {score, static_cast<uint32_t>(k)};
  }
  return best;
}

// From the same start, local optima are comparable.
std::vector<uint32_t> SeedTokens(size_t tokens, size_t k, uint64_t seed) {
  std::vector<uint32_t> chosen;
  for (uint32_t c = 0; c < k; ++c) {
    const SeedRange range =
        RangeOfSeed(seed, c, static_cast<uint32_t>(k), static_cast<uint32_t>(tokens));
    chosen.push_back(range.begin + range.start);
  }
  return chosen;
}

// Plain Lloyd; returns its mean cosine.
double ReferenceObjective(const std::vector<double>& units, size_t d, size_t k, uint32_t iterations,
                          uint64_t seed) {
  std::vector<uint32_t> labels(units.size() / d);
  std::vector<double> directions;
  for (const uint32_t token : SeedTokens(labels.size(), k, seed)) {
    const double* unit = &units[token * d];
    directions.insert(directions.end(), unit, unit + d);
  }
  double objective = 0.0;
  for (uint32_t iteration = 0; iteration < iterations; ++iteration) {
    for (size_t t = 0; t < labels.size(); ++t) {
      labels[t] = BestDirection(&units[t * d], directions, d).second;
    }
    objective = Directions(units, d, labels, directions);
  }
  return objective;
}

double Epsilon(DType dtype) {
  return dtype == DType::kBf16 ? 1.0 / 256 : dtype == DType::kFp16 ? 1.0 / 2048 : 1e-6;
}

// Everything that a result must be, whatever the clusters.
void ExpectWellFormed(const Data& data, const Options& options, const Result& result) {
  const size_t d = data.head_dim;
  ASSERT_THAT(result.sizes, Each(Ge(1u)));
  ASSERT_THAT(result.sizes, Each(Le(options.largest)));
  ASSERT_EQ(std::accumulate(result.sizes.begin(), result.sizes.end(), 0u), data.tokens());
  std::vector<bool> seen(data.tokens());
  size_t begin = 0;
  for (size_t k = 0; k < result.sizes.size(); ++k) {
    std::vector<double> mean(2 * d, 0.0), magnitude(2 * d, 0.0);
    for (size_t i = begin; i < begin + result.sizes[k]; ++i) {
      const uint32_t token = result.order[i];
      ASSERT_LT(token, data.tokens());
      ASSERT_FALSE(seen[token]);
      seen[token] = true;
      ASSERT_TRUE(i == begin || result.order[i - 1] < token);
      for (size_t j = 0; j < 2 * d; ++j) {
        mean[j] += double{data.key(token)[j]} / result.sizes[k];
        magnitude[j] += std::abs(double{data.key(token)[j]}) / result.sizes[k];
      }
    }
    begin += result.sizes[k];
    for (size_t j = 0; j < 2 * d; ++j) {
      const float got = j < d ? result.centroids[k * d + j] : result.value_means[k * d + j - d];
      if (!std::isfinite(magnitude[j])) continue;
      ASSERT_NEAR(got, mean[j],
                  Epsilon(data.dtype) * std::abs(mean[j]) + 4e-6 * magnitude[j] + 1e-7)
          << "cluster " << k << ", channel " << j;
    }
  }
}

class KmeansShapes : public ::testing::TestWithParam<std::tuple<uint32_t, DType>> {};

TEST_P(KmeansShapes, ReachesTheObjectiveOfPlainLloyd) {
  const auto [dim, dtype] = GetParam();
  SCOPED_TRACE(SeedTrace(TestSeed()));
  for (uint64_t round = 0; round < 3; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    Topics shape{.tokens = 500, .head_dim = dim, .topics = 30, .dtype = dtype};
    shape.noise = round == 1 ? 0.5f : 1.2f;
    const Data data = MakeData(shape, TestSeed() + round);
    const bool center = round == 2;
    const std::vector<double> units = UnitKeys(data, center);
    for (uint64_t start = 1; start <= 2; ++start) {
      const Options options{.clusters = 25, .center = center, .seed = start};
      const Result result = Cluster(data, options);
      ExpectWellFormed(data, options, result);
      EXPECT_GE(Objective(units, dim, result),
                0.995 * ReferenceObjective(units, dim, 25, 10, start))
          << "start " << start;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, KmeansShapes,
                         ::testing::Combine(::testing::Values(64, 96, 128, 256),
                                            ::testing::Values(DType::kBf16, DType::kFp16,
                                                              DType::kFp32)),
                         [](const auto& test) {
                           return DTypeName(std::get<1>(test.param)) +
                                  std::to_string(std::get<0>(test.param));
                         });

TEST(Kmeans, ReachesTheObjectiveOfPlainLloydOnLargerInputs) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  for (uint64_t seed = TestSeed(); seed < TestSeed() + 2; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Data data = MakeData({.tokens = 2500, .topics = 100, .dtype = DType::kFp16}, seed);
    const std::vector<double> units = UnitKeys(data, false);
    const Options options{.clusters = 80, .seed = seed};
    const Result result = Cluster(data, options);
    ExpectWellFormed(data, options, result);
    EXPECT_GE(Objective(units, 64, result), 0.995 * ReferenceObjective(units, 64, 80, 10, seed));
  }
}

TEST(KmeansSeeds, AreOneOfEachOfEqualRanges) {
  for (const auto& [tokens, clusters] :
       {std::pair{1u, 1u}, {10u, 3u}, {77u, 77u}, {32768u, 409u}}) {
    uint32_t end = 0;
    for (uint32_t c = 0; c < clusters; ++c) {
      const SeedRange range = RangeOfSeed(5, c, clusters, tokens);
      EXPECT_EQ(range.begin, end) << "cluster " << c << " of " << clusters;
      EXPECT_GE(range.size, tokens / clusters);
      EXPECT_LE(range.size, tokens / clusters + 1);
      EXPECT_LT(range.start, range.size);
      end += range.size;
    }
    EXPECT_EQ(end, tokens);
  }
}

TEST(KmeansSeeds, AreDrawnEvenlyAndByTheSeed) {
  constexpr uint32_t kSize = 10, kClusters = 10000;
  std::vector<uint32_t> drawn(kSize);
  uint32_t same = 0;
  for (uint32_t c = 0; c < kClusters; ++c) {
    const uint32_t start = RangeOfSeed(1, c, kClusters, kSize * kClusters).start;
    ++drawn[start];
    same += start == RangeOfSeed(2, c, kClusters, kSize * kClusters).start ? 1 : 0;
  }
  // 1,000 of each, and as many by chance the same: five standard deviations are 150.
  for (const uint32_t count : drawn) EXPECT_NEAR(count, 1000, 150);
  EXPECT_NEAR(same, 1000, 150);
}

TEST(Kmeans, FirstPassGivesEachKeyToTheNearestOfDistinctSeeds) {
  const Data data = MakeData({.tokens = 1000, .head_dim = 96, .topics = 50}, 23);
  const std::vector<double> units = UnitKeys(data, false);
  const std::vector<uint32_t> seeds = SeedTokens(1000, 45, 7);
  std::vector<double> directions;
  for (const uint32_t s : seeds) {
    directions.insert(directions.end(), &units[s * 96], &units[s * 96] + 96);
  }
  const Result result = Cluster(data, {.clusters = 45, .iterations = 1, .seed = 7});
  ASSERT_EQ(result.sizes.size(), 45u);  // every seed is its own nearest
  const std::vector<uint32_t> labels = result.Labels();
  for (size_t t = 0; t < 1000; ++t) {
    EXPECT_EQ(labels[t], BestDirection(&units[t * 96], directions, 96).second) << "token " << t;
  }
}

TEST(Kmeans, EveryInstructionSetReachesTheSameObjective) {
  const Data data = MakeData({.tokens = 900, .topics = 50, .dtype = DType::kFp16}, 24);
  const std::vector<double> units = UnitKeys(data, false);
  const double reference = ReferenceObjective(units, 64, 30, 10, 1);
  const auto all = static_cast<uint64_t>(hwy::SupportedTargets() & HWY_TARGETS);
  for (uint64_t rest = all; rest != 0; rest &= rest - 1) {
    const auto target = static_cast<int64_t>(rest & (~rest + 1));  // the lowest that is left
    hwy::SetSupportedTargetsForTest(target);
    const Options options{.clusters = 30};
    const Result result = Cluster(data, options);
    ExpectWellFormed(data, options, result);
    EXPECT_GE(Objective(units, 64, result), 0.995 * reference) << hwy::TargetName(target);
  }
  hwy::SetSupportedTargetsForTest(0);
}

TEST(Kmeans, LabelsAreTheNearestCentroidOnceNothingChanges) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  for (uint64_t seed = TestSeed(); seed < TestSeed() + 3; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Data data = MakeData({.tokens = 1500, .topics = 40}, seed);
    const Result result = Cluster(data, {.clusters = 33, .iterations = 1000, .seed = seed});
    const std::vector<double> units = UnitKeys(data, false);
    const std::vector<uint32_t> labels = result.Labels();
    std::vector<double> directions(result.sizes.size() * 64);
    Directions(units, 64, labels, directions);
    for (size_t t = 0; t < labels.size(); ++t) {
      double own = 0.0;
      for (size_t i = 0; i < 64; ++i) own += units[t * 64 + i] * directions[labels[t] * 64 + i];
      ASSERT_GE(own, BestDirection(&units[t * 64], directions, 64).first - 1e-5) << "token " << t;
    }
  }
}

TEST(Kmeans, CountsTheIterationsThatItTook) {
  const Data data = MakeData({.tokens = 1500, .topics = 40}, 23);
  const Result converged = Cluster(data, {.clusters = 33, .iterations = 1000});
  ASSERT_GT(converged.iterations, 2u);
  ASSERT_LT(converged.iterations, 1000u);
  // The last of them changed nothing.
  const Result same = Cluster(data, {.clusters = 33, .iterations = converged.iterations - 1});
  EXPECT_EQ(same.iterations, converged.iterations - 1);
  EXPECT_EQ(same.Labels(), converged.Labels());
  const Result before = Cluster(data, {.clusters = 33, .iterations = converged.iterations - 2});
  EXPECT_NE(before.Labels(), converged.Labels());
}

TEST(Kmeans, MoreIterationsNeverLowerTheObjective) {
  const Data data = MakeData({.tokens = 1000, .topics = 60}, 41);
  const std::vector<double> units = UnitKeys(data, false);
  double last = 0.0;
  for (uint32_t iterations = 1; iterations <= 12; ++iterations) {
    const Result result = Cluster(data, {.clusters = 50, .iterations = iterations});
    const double objective = Objective(units, 64, result);
    EXPECT_GE(objective, last - 1e-6) << iterations << " iterations";
    last = objective;
  }
}

TEST(Kmeans, ResultDependsOnNeitherThreadsNorCompany) {
  const Data small = MakeData({.tokens = 321, .head_dim = 128, .dtype = DType::kBf16}, 51);
  const Data large = MakeData({.tokens = 3000, .head_dim = 128, .dtype = DType::kBf16}, 52);
  const std::vector<const Data*> both{&small, &large, &small};
  const Options options{.clusters = 70, .largest = 60, .center = true, .threads = 1};
  const std::vector<Result> expected = Cluster(both, options);
  EXPECT_EQ(expected[0], expected[2]);
  for (int threads : {1, 2, 5}) {
    Options other = options;
    other.threads = threads;
    EXPECT_EQ(Cluster(both, other), expected) << threads << " threads";
    EXPECT_EQ(Cluster(small, other), expected[0]) << threads << " threads";
    EXPECT_EQ(Cluster(large, other), expected[1]) << threads << " threads";
  }
}

TEST(Kmeans, MoreProblemsThanOneBatchHoldsAreTheSame) {
  // 40 problems of 2 MB in fp32.
  const Data data = MakeData({.tokens = 2048, .head_dim = 256, .dtype = DType::kFp16}, 53);
  const Options options{.clusters = 4, .iterations = 2};
  const Result expected = Cluster(data, options);
  EXPECT_THAT(Cluster(std::vector<const Data*>(40, &data), options), Each(expected));
}

TEST(Kmeans, SeedsAreRepeatableAndDistinct) {
  const Data data = MakeData({.tokens = 1000}, 61);
  EXPECT_EQ(Cluster(data, {.clusters = 30, .seed = 1}), Cluster(data, {.clusters = 30, .seed = 1}));
  EXPECT_NE(Cluster(data, {.clusters = 30, .seed = 1}).order,
            Cluster(data, {.clusters = 30, .seed = 2}).order);
}

TEST(Kmeans, NormOfAKeyDoesNotMoveIt) {
  Data data = MakeData({.tokens = 600, .topics = 20}, 62);
  std::vector<float> scaled = data.decoded;
  for (size_t t = 0; t < 600; ++t) {
    // Powers of two: exact.
    for (size_t i = 0; i < 64; ++i) scaled[t * 128 + i] *= t % 3 == 0 ? 0x1p-70f : 0x1p+60f;
  }
  const Data other(DType::kFp32, 64, scaled);
  EXPECT_EQ(Cluster(data, {.clusters = 20, .iterations = 1}).Labels(),
            Cluster(other, {.clusters = 20, .iterations = 1}).Labels());
}

TEST(Kmeans, SplitsLargeClustersInPositionOrder) {
  const Data data = MakeData({.tokens = 100}, 71);
  const Options options{.clusters = 1, .largest = 30};
  const Result result = Cluster(data, options);
  ExpectWellFormed(data, options, result);
  EXPECT_THAT(result.sizes, ElementsAre(25, 25, 25, 25));
  EXPECT_TRUE(std::is_sorted(result.order.begin(), result.order.end()));
}

TEST(Kmeans, NeverPassesTheBoundOfTheLayout) {
  SCOPED_TRACE(SeedTrace(TestSeed()));
  std::mt19937_64 random(TestSeed());
  for (int round = 0; round < 40; ++round) {
    const uint32_t tokens = 1 + static_cast<uint32_t>(random() % 500);
    MethodOptions method;
    method.tokens_per_cluster = 1 + static_cast<uint32_t>(random() % 40);
    // Few topics: some clusters take nearly everything.
    const uint32_t topics = 1 + static_cast<uint32_t>(random() % 4);
    const Data data = MakeData({.tokens = tokens, .topics = topics, .noise = 0.01f},
                               TestSeed() + static_cast<uint64_t>(round));
    const Options options{.clusters = ClustersOfSegment(method, tokens),
                          .largest = method.largest_cluster_tokens(),
                          .seed = static_cast<uint64_t>(round)};
    SCOPED_TRACE("round " + std::to_string(round) + ", " + std::to_string(tokens) + " tokens");
    const Result result = Cluster(data, options);
    ExpectWellFormed(data, options, result);
    EXPECT_LE(result.sizes.size(), MaxClustersOfSegment(method, tokens));
  }
}

TEST(Kmeans, CentringClustersWhatACommonOffsetLeaves) {
  // Of the keys themselves the cosine of any two is above 0.999.
  const Topics shape{.tokens = 1200, .topics = 12, .noise = 0.2f, .offset = 40.0f};
  const Data data = MakeData(shape, 81);
  const std::vector<double> units = UnitKeys(data, true);
  for (uint64_t seed = 1; seed <= 8; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const Result plain = Cluster(data, {.clusters = 24, .seed = seed});
    const Options options{.clusters = 24, .center = true, .seed = seed};
    const Result centred = Cluster(data, options);
    ExpectWellFormed(data, options, centred);
    EXPECT_NE(plain.Labels(), centred.Labels());
    EXPECT_GE(Objective(units, 64, centred), 0.995 * ReferenceObjective(units, 64, 24, 10, seed));
  }
}

TEST(KmeansDegenerate, OneTokenIsOneCluster) {
  const Data data = MakeData({.tokens = 1, .dtype = DType::kFp16}, 91);
  const Result result = Cluster(data, {.clusters = 1});
  ExpectWellFormed(data, {}, result);
  EXPECT_THAT(result.sizes, ElementsAre(1));
}

TEST(KmeansDegenerate, AsManyClustersAsTokensKeepsEachAlone) {
  const Data data = MakeData({.tokens = 77}, 92);
  const Result result = Cluster(data, {.clusters = 77});
  ExpectWellFormed(data, {}, result);
  EXPECT_EQ(result.sizes, std::vector<uint32_t>(77, 1));
}

TEST(KmeansDegenerate, ZeroKeysAreOneCluster) {
  const Data data(DType::kFp16, 64, std::vector<float>(2 * 64 * 50, 0.0f));
  for (bool center : {false, true}) {
    const Result result = Cluster(data, {.clusters = 8, .iterations = 1000, .center = center});
    ExpectWellFormed(data, {}, result);
    EXPECT_THAT(result.sizes, ElementsAre(50));
  }
}

TEST(KmeansDegenerate, DuplicatesAreOneCluster) {
  std::vector<float> values;
  for (int t = 0; t < 60; ++t) {
    for (int i = 0; i < 128; ++i) values.push_back(0.37f * static_cast<float>(i - 20));
  }
  const Data data(DType::kBf16, 64, values);
  const Result result = Cluster(data, {.clusters = 10, .iterations = 1000});
  ExpectWellFormed(data, {}, result);
  EXPECT_THAT(result.sizes, ElementsAre(60));
  // Centred, they have no direction at all.
  EXPECT_THAT(Cluster(data, {.clusters = 10, .center = true}).sizes, ElementsAre(60));
}

TEST(KmeansDegenerate, FewDistinctKeysAmongManyClustersAreAllFound) {
  // 5 directions, 40 times each: random seeds miss some or meet the same one twice.
  std::vector<float> values;
  for (size_t t = 0; t < 200; ++t) {
    for (size_t i = 0; i < 128; ++i) values.push_back(i % 5 == t % 5 ? 1.0f : 0.0f);
  }
  const Data data(DType::kFp32, 64, values);
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const Result result = Cluster(data, {.clusters = 8, .seed = seed});
    ExpectWellFormed(data, {}, result);
    EXPECT_EQ(result.sizes, std::vector<uint32_t>(5, 40)) << "seed " << seed;
  }
}

TEST(KmeansDegenerate, KeysThatAreNotFiniteNeitherCrashNorMoveTheOthers) {
  for (DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
    std::vector<float> values = MakeData({.tokens = 500, .dtype = dtype}, 93).decoded;
    for (size_t t = 0; t < 500; t += 50) {
      values[t * 128 + 3] = t % 100 == 0 ? std::numeric_limits<float>::quiet_NaN()
                                         : -std::numeric_limits<float>::infinity();
    }
    const Data data(dtype, 64, values);
    for (bool center : {false, true}) {
      const Options options{.clusters = 20, .center = center};
      const Result result = Cluster(data, options);
      ExpectWellFormed(data, options, result);
      EXPECT_THAT(result.sizes, ::testing::SizeIs(Ge(15u)));
    }
  }
}

TEST(KmeansDegenerate, ExtremesOfFp32HaveDirections) {
  for (float scale : {1e-25f, 1e25f}) {
    std::vector<float> values;
    for (size_t t = 0; t < 200; ++t) {
      for (size_t i = 0; i < 128; ++i) values.push_back(i % 4 == t % 4 ? scale : 0.0f);
    }
    const Data data(DType::kFp32, 64, values);
    EXPECT_EQ(Cluster(data, {.clusters = 8}).sizes, std::vector<uint32_t>(4, 50));
  }
}

}  // namespace
}  // namespace clusterkv::gpu::host
