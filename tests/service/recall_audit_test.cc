#include "service/recall_audit.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace clusterkv::service {
namespace {

constexpr uint32_t kDim = 64;
constexpr uint32_t kSinks = 2;

// One KV head, two query heads, fp32. Key of position p: `keys[p - kSinks]` in the first component;
// the queries are 1 and -1 there, so that their scores are the keys and their negatives.
class RecallAuditTest : public testing::Test {
 protected:
  AuditStep Step(const std::vector<float>& keys, const std::vector<uint32_t>& chosen) {
    AuditStep step;
    step.shape = {
        .layers = 1, .kv_heads = 1, .q_heads = 2, .head_dim = kDim, .dtype = gpu::DType::kFp32};
    step.softmax_scale = 1;
    step.candidates_begin = kSinks;
    step.candidates_end = kSinks + static_cast<uint32_t>(keys.size());
    // Two segments, the rows of the second in reverse, as clustering leaves them in any order.
    rows_.assign(keys.size() * 2 * kDim, 0.0f);
    positions_.resize(keys.size());
    const size_t half = keys.size() / 2;
    for (size_t i = 0; i < keys.size(); ++i) {
      const size_t row = i < half ? i : keys.size() - 1 - (i - half);
      rows_[row * 2 * kDim] = keys[i];
      positions_[row] = kSinks + static_cast<uint32_t>(i);
    }
    const auto run = [&](size_t first, size_t count) {
      return AuditRun{.rows = reinterpret_cast<const std::byte*>(rows_.data() + first * 2 * kDim),
                      .positions = positions_.data() + first,
                      .tokens = static_cast<uint32_t>(count)};
    };
    step.runs = {{run(0, half), run(half, keys.size() - half)}};
    std::vector<float> queries(2 * kDim);
    queries[0] = 1;
    queries[kDim] = -1;
    step.queries.resize(queries.size() * sizeof(float));
    std::memcpy(step.queries.data(), queries.data(), step.queries.size());
    step.lse = {0, 0};
    step.chosen = {chosen};
    return step;
  }

  std::vector<float> rows_;
  std::vector<uint32_t> positions_;
};

TEST_F(RecallAuditTest, ComparesWithEachQueryHeadsOwnBest) {
  // Best of the first head: positions 2 and 5; of the second: 3 and 4.
  const AuditStep step = Step({4, 1, 2, 3}, {2, 4});
  const AuditResult result = RunAudit(step);
  EXPECT_EQ(result.heads, 2u);
  EXPECT_EQ(result.recall_sum, 0.5 + 0.5);
  EXPECT_EQ(RunAudit(Step({4, 1, 2, 3}, {2, 5})).recall_sum, 1.0 + 0.0);
  EXPECT_EQ(RunAudit(Step({4, 1, 2, 3}, {2, 3, 4, 5})).recall_sum, 2.0);
  EXPECT_EQ(RunAudit(Step({4, 1, 2, 3}, {})).recall_sum, 2.0) << "nothing was to be chosen";
}

TEST_F(RecallAuditTest, MassOfWhatWasNotChosenIsMissed) {
  AuditStep step = Step({4, 1, 2, 3}, {2});
  step.lse = {3.5f, -2};
  const AuditResult result = RunAudit(step);
  const double first = std::exp(1) + std::exp(2) + std::exp(3);
  const double second = std::exp(-1) + std::exp(-2) + std::exp(-3);
  EXPECT_EQ(result.mass_heads, 2u);
  EXPECT_NEAR(result.missed_mass_sum,
              first / (first + std::exp(3.5)) + second / (second + std::exp(-2)), 1e-6);
  EXPECT_EQ(RunAudit(Step({4, 1, 2, 3}, {2, 3, 4, 5})).missed_mass_sum, 0.0);
}

TEST_F(RecallAuditTest, LargeScoresDoNotOverflow) {
  AuditStep step = Step({1000, 999, 0, 0}, {2});
  step.lse = {1000, 0};
  const AuditResult result = RunAudit(step);
  const double missed = std::exp(-1) / (std::exp(-1) + 1);
  EXPECT_NEAR(result.missed_mass_sum, missed + 2.0 / 3, 1e-6);
}

TEST_F(RecallAuditTest, EstimatesTellNoMass) {
  AuditStep step = Step({4, 1, 2, 3}, {2});
  step.exact_lse = false;
  EXPECT_EQ(RunAudit(step).mass_heads, 0u);
  EXPECT_EQ(RunAudit(step).heads, 2u);
}

TEST_F(RecallAuditTest, ValuesThatAreNoNumbersDoNoHarm) {
  AuditStep step =
      Step({4, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 3},
           {2, 3});
  step.lse = {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()};
  const AuditResult result = RunAudit(step);
  EXPECT_EQ(result.heads, 2u);
  EXPECT_EQ(result.mass_heads, 0u);
  EXPECT_TRUE(result.recall_sum >= 0 && result.recall_sum <= 2);
}

TEST_F(RecallAuditTest, NothingPublishedMissesNothing) {
  const AuditStep step = Step({}, {});
  EXPECT_EQ(RunAudit(step).recall_sum, 2.0);
  EXPECT_EQ(RunAudit(step).missed_mass_sum, 0.0);
}

}  // namespace
}  // namespace clusterkv::service
