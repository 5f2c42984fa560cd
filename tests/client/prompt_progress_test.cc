#include "client/prompt_progress.h"

#include <gtest/gtest.h>

namespace clusterkv::client {
namespace {

IngestRange Range(uint32_t position, uint32_t count, uint32_t layer_begin, uint32_t layer_count,
                  bool end = false) {
  return {.position = position,
          .count = count,
          .layer_begin = layer_begin,
          .layer_count = layer_count,
          .end_of_prompt = end};
}

TEST(PromptProgress, CountsTheLayerThatIsFurthestBehind) {
  PromptProgress progress(2, 100);
  progress.Advance(Range(0, 10, 0, 2));
  progress.Advance(Range(10, 5, 1, 1));
  EXPECT_EQ(progress.tokens(), 10u);
  EXPECT_TRUE(progress.Has(Range(10, 5, 1, 1)));
  EXPECT_FALSE(progress.Has(Range(10, 5, 0, 2)));
}

TEST(PromptProgress, RefusesGapsAndRepeats) {
  PromptProgress progress(2, 100);
  progress.Advance(Range(0, 10, 0, 2));
  EXPECT_TRUE(absl::IsFailedPrecondition(progress.Check(Range(9, 1, 0, 2))));
  EXPECT_TRUE(absl::IsFailedPrecondition(progress.Check(Range(11, 1, 0, 2))));
  EXPECT_TRUE(progress.Check(Range(10, 90, 0, 2)).ok());
}

TEST(PromptProgress, RefusesWhatIsOutOfBounds) {
  const PromptProgress progress(2, 100);
  EXPECT_TRUE(absl::IsInvalidArgument(progress.Check(Range(0, 0, 0, 2))));
  EXPECT_TRUE(absl::IsInvalidArgument(progress.Check(Range(0, 1, 0, 3))));
  EXPECT_TRUE(absl::IsInvalidArgument(progress.Check(Range(0, 1, 2, 1))));
  EXPECT_TRUE(absl::IsInvalidArgument(progress.Check(Range(0, 1, 1, 0xffffffff))));
  EXPECT_TRUE(absl::IsOutOfRange(progress.Check(Range(0, 101, 0, 2))));
  EXPECT_TRUE(absl::IsOutOfRange(progress.Check(Range(0xffffffff, 2, 0, 2))));
}

TEST(PromptProgress, EndsWhenAllLayersHaveTheSameEnd) {
  PromptProgress progress(2, 100);
  progress.Advance(Range(0, 10, 0, 1, true));
  EXPECT_FALSE(progress.ended());
  EXPECT_EQ(progress.prompt_tokens(), 10u);
  EXPECT_TRUE(absl::IsFailedPrecondition(progress.Check(Range(10, 1, 0, 1))));
  EXPECT_TRUE(absl::IsFailedPrecondition(progress.Check(Range(0, 11, 1, 1, true))));
  EXPECT_TRUE(absl::IsFailedPrecondition(progress.Check(Range(0, 10, 1, 1))));
  EXPECT_TRUE(absl::IsFailedPrecondition(progress.Check(Range(0, 9, 1, 1, true))));
  ASSERT_TRUE(progress.Check(Range(0, 9, 1, 1)).ok());
  progress.Advance(Range(0, 9, 1, 1));
  ASSERT_TRUE(progress.Check(Range(9, 1, 1, 1, true)).ok());
  progress.Advance(Range(9, 1, 1, 1, true));
  EXPECT_TRUE(progress.ended());
}

}  // namespace
}  // namespace clusterkv::client
