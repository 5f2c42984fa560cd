#include "service/piece_table.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gpu/segment_plan.h"
#include "tests/gpu/seed.h"
#include "tests/service/recorded_chunks.h"
#include "tests/service/temporary_pool.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kChunk = 16 << 10;
constexpr uint32_t kPoolChunks = 400;

struct Scenario {
  gpu::Shape shape;
  gpu::MethodOptions method;
  uint32_t max_tokens = 0;
};

std::string Describe(const Scenario& scenario) {
  const auto& [shape, method, max_tokens] = scenario;
  return "layers " + std::to_string(shape.layers) + " heads " + std::to_string(shape.kv_heads) +
         " sinks " + std::to_string(method.sink_tokens) + " window " +
         std::to_string(method.min_window_tokens) + " prompt segment " +
         std::to_string(method.prompt_segment_tokens) + " decode segment " +
         std::to_string(method.decode_segment_tokens) + " max_tokens " + std::to_string(max_tokens);
}

// Rows of 16 bytes, so that many tokens fit little memory.
Scenario MakeScenario(uint32_t layers, uint32_t heads, uint32_t max_tokens) {
  Scenario scenario;
  scenario.shape = {.layers = layers, .kv_heads = heads, .q_heads = heads, .head_dim = 4};
  scenario.max_tokens = max_tokens;
  return scenario;
}

// A PieceTable, and what ingest does with it: ranges are staged, and prompt ends finished, in the
// order of admission, but later.
class Ingest {
 public:
  Ingest(HostAccount& account, const Scenario& scenario)
      : scenario_(scenario),
        chunks_(account),
        memory_(account, chunks_),
        table_(memory_, scenario.shape, scenario.method, scenario.max_tokens) {}
  ~Ingest() {
    memory_.QuarantineAll();
    memory_.ReleaseAll();
    chunks_.Recycle();
  }

  absl::Status Admit(uint32_t layer, uint32_t layers, uint32_t begin, uint32_t end,
                     bool prompt_end) {
    auto admission = table_.Plan(layer, layers, end, prompt_end);
    if (!admission.ok()) return admission.status();
    for (uint32_t i = 0; i < layers; ++i) {
      EXPECT_EQ(table_.Covers(layer + i, end), admission->added[i].empty());
    }
    Work work{.layer = layer,
              .layers = layers,
              .prompt_end = prompt_end,
              .begin = begin,
              .end = end,
              .moves = admission->moves,
              .spans = {}};
    table_.Commit(*std::move(admission), layer, std::max(begin, scenario_.method.sink_tokens), end,
                  work.spans);
    if (!prompt_end) ExpectSamePlaces(work);
    queue_.push_back(std::move(work));
    return absl::OkStatus();
  }
  void StageOne() {
    const Work work = std::move(queue_.front());
    queue_.pop_front();
    ASSERT_EQ(work.spans.size(), work.layers * scenario_.shape.kv_heads);
    for (size_t i = 0; i < work.spans.size(); ++i) Stage(work, i);
    for (const RowCopy& move : work.moves) std::memcpy(move.destination, move.source, move.bytes);
    if (!work.prompt_end) return;
    for (uint32_t i = 0; i < work.layers; ++i) table_.FinishPromptEnd(work.layer + i);
  }
  void StageAll() {
    while (!queue_.empty()) StageOne();
  }
  bool idle() const { return queue_.empty(); }

  // Every position in [sinks, length) lies in one place with its row; segments lie in pieces.
  void ExpectAllInPlace(uint32_t prompt, uint32_t length) {
    std::vector<Extent> extents;
    const auto segments = gpu::AllSegments(scenario_.method, prompt, length);
    for (uint32_t layer = 0; layer < scenario_.shape.layers; ++layer) {
      uint32_t next = scenario_.method.sink_tokens;
      for (uint32_t index = 0; next < length; ++index) {
        const Piece& piece = table_.piece(layer, index);
        ASSERT_EQ(piece.begin, next) << "layer " << layer << " piece " << index;
        ASSERT_GT(piece.capacity, 0u);
        if (index < segments.size()) {
          ASSERT_EQ(segments[index].begin, piece.begin);
          ASSERT_EQ(segments[index].tokens(), piece.capacity);
        }
        next += piece.capacity;
        for (uint32_t head = 0; head < scenario_.shape.kv_heads; ++head) {
          extents.push_back(piece.heads[head]);
          ExpectRows(piece, layer, head, std::min(next, length));
        }
      }
    }
    ExpectDisjoint(std::move(extents));
  }

  PieceTable& table() { return table_; }
  SessionMemory& memory() { return memory_; }
  RecordedChunks& chunks() { return chunks_; }

 private:
  struct Work {
    uint32_t layer, layers;
    bool prompt_end;
    uint32_t begin, end;
    std::vector<RowCopy> moves;
    std::vector<std::vector<RowSpan>> spans;
  };

  // Token by token as in spans.
  void ExpectSamePlaces(const Work& work) const {
    const uint32_t heads = scenario_.shape.kv_heads;
    for (size_t i = 0; i < work.spans.size(); ++i) {
      const auto layer = static_cast<uint32_t>(work.layer + i / heads);
      EXPECT_TRUE(table_.Covers(layer, work.end));
      for (const RowSpan& span : work.spans[i]) {
        for (uint32_t token = 0; token < span.tokens; ++token) {
          std::vector<std::byte*> places;
          table_.AppendPlaces(layer, span.position + token, places);
          ASSERT_EQ(places.size(), heads);
          EXPECT_EQ(places[i % heads], span.data + token * scenario_.shape.row_bytes());
        }
      }
    }
  }

  static uint64_t Token(uint32_t layer, uint32_t head, uint32_t position) {
    return (uint64_t{layer + 1} << 48) | (uint64_t{head + 1} << 32) | position;
  }

  void Stage(const Work& work, size_t index) {
    const auto heads = scenario_.shape.kv_heads;
    const uint32_t layer = work.layer + static_cast<uint32_t>(index / heads);
    const uint32_t head = static_cast<uint32_t>(index % heads);
    uint32_t next = std::max(work.begin, scenario_.method.sink_tokens);
    for (const RowSpan& span : work.spans[index]) {
      ASSERT_EQ(span.position, next);
      // The same cuts for all heads: one copy takes them together.
      ASSERT_EQ(span.tokens,
                work.spans[0][static_cast<size_t>(&span - &work.spans[index][0])].tokens);
      for (uint32_t i = 0; i < span.tokens; ++i, ++next) {
        const uint64_t row[2] = {Token(layer, head, next), ~Token(layer, head, next)};
        std::memcpy(span.data + i * sizeof(row), row, sizeof(row));
      }
    }
    ASSERT_EQ(next, std::max(work.end, scenario_.method.sink_tokens));
  }
  void ExpectRows(const Piece& piece, uint32_t layer, uint32_t head, uint32_t end) {
    const std::byte* const rows = table_.rows(piece, head);
    for (uint32_t position = piece.begin; position < end; ++position) {
      uint64_t row[2];
      std::memcpy(row, rows + (position - piece.begin) * sizeof(row), sizeof(row));
      ASSERT_EQ(row[0], Token(layer, head, position));
      ASSERT_EQ(row[1], ~Token(layer, head, position));
    }
    // Room for the positions of all its tokens before the rows.
    ASSERT_GE(piece.rows_offset, piece.capacity * sizeof(uint32_t));
    ASSERT_GE(piece.heads[head].bytes, piece.rows_offset + piece.capacity * 16);
  }
  void ExpectDisjoint(std::vector<Extent> extents) {
    std::ranges::sort(extents, {}, [](const Extent& e) { return std::pair(e.chunk, e.offset); });
    uint64_t bytes = 0;
    for (size_t i = 0; i < extents.size(); ++i) {
      bytes += extents[i].bytes;
      ASSERT_LE(extents[i].offset + extents[i].bytes, kChunk);
      if (i == 0 || extents[i].chunk != extents[i - 1].chunk) continue;
      ASSERT_LE(extents[i - 1].offset + extents[i - 1].bytes, extents[i].offset);
    }
    ASSERT_EQ(table_.bytes(), bytes);
  }

  const Scenario scenario_;
  RecordedChunks chunks_;
  SessionMemory memory_;
  PieceTable table_;
  std::deque<Work> queue_;
};

class PieceTableTest : public testing::Test {
 protected:
  TemporaryPool pool_{kPoolChunks, kChunk};
};

TEST_F(PieceTableTest, PromptFillsPiecesFromTheSinksOn) {
  Scenario scenario = MakeScenario(1, 1, 1000);
  scenario.method.sink_tokens = 4;
  scenario.method.prompt_segment_tokens = 10;
  Ingest ingest(pool_.account(), scenario);
  ASSERT_TRUE(ingest.Admit(0, 1, 0, 3, false).ok());  // sinks alone
  EXPECT_EQ(ingest.table().bytes(), 0u);
  ASSERT_TRUE(ingest.Admit(0, 1, 3, 25, false).ok());
  ingest.StageAll();
  EXPECT_EQ(ingest.table().piece(0, 2).begin, 24u);
  EXPECT_EQ(ingest.table().piece(0, 2).capacity, 10u);
  EXPECT_EQ(ingest.table().bytes(), 3 * 512u);
}

TEST_F(PieceTableTest, PromptEndMovesTheWindowIntoDecodePieces) {
  Scenario scenario = MakeScenario(1, 2, 100);
  scenario.method.sink_tokens = 4;
  scenario.method.min_window_tokens = 12;
  scenario.method.prompt_segment_tokens = 10;
  scenario.method.decode_segment_tokens = 8;
  Ingest ingest(pool_.account(), scenario);
  ASSERT_TRUE(ingest.Admit(0, 1, 0, 30, true).ok());  // window [18, 30)
  ingest.StageAll();
  EXPECT_EQ(ingest.table().piece(0, 1).begin, 14u);
  EXPECT_EQ(ingest.table().piece(0, 1).capacity, 4u);
  EXPECT_EQ(ingest.table().piece(0, 2).begin, 18u);
  EXPECT_EQ(ingest.table().piece(0, 3).begin, 26u);
  ingest.ExpectAllInPlace(30, 30);
}

TEST_F(PieceTableTest, PromptShorterThanTheSinksHasNoPieces) {
  Scenario scenario = MakeScenario(1, 1, 100);
  scenario.method.sink_tokens = 16;
  scenario.method.decode_segment_tokens = 8;
  Ingest ingest(pool_.account(), scenario);
  ASSERT_TRUE(ingest.Admit(0, 1, 0, 5, true).ok());
  ASSERT_TRUE(ingest.Admit(0, 1, 5, 15, false).ok());
  EXPECT_EQ(ingest.table().bytes(), 0u);
  ASSERT_TRUE(ingest.Admit(0, 1, 15, 30, false).ok());
  ingest.StageAll();
  EXPECT_EQ(ingest.table().piece(0, 0).begin, 16u);
  ingest.ExpectAllInPlace(5, 30);
}

TEST_F(PieceTableTest, LastPieceEndsAtMaxTokens) {
  Scenario scenario = MakeScenario(1, 1, 21);
  scenario.method.sink_tokens = 0;
  scenario.method.prompt_segment_tokens = 10;
  Ingest ingest(pool_.account(), scenario);
  ASSERT_TRUE(ingest.Admit(0, 1, 0, 21, false).ok());
  EXPECT_EQ(ingest.table().piece(0, 2).capacity, 1u);
}

Scenario RandomScenario(std::mt19937_64& random) {
  const auto upto = [&](uint32_t most) { return static_cast<uint32_t>(random() % (most + 1)); };
  Scenario scenario = MakeScenario(1 + upto(2), 1 + upto(2), 1 + upto(250));
  scenario.method.sink_tokens = upto(12);
  scenario.method.min_window_tokens = random() % 3 == 0 ? 0 : upto(30);
  scenario.method.prompt_segment_tokens = 1 + upto(random() % 2 == 0 ? 60 : 9);
  scenario.method.decode_segment_tokens = 1 + upto(random() % 2 == 0 ? 20 : 3);
  return scenario;
}

// Ingests the tokens up to `length`, of which `prompt` are prompt, in random ranges of random
// layers. `accepted`: of each layer, before and after.
void IngestAtRandom(Ingest& ingest, std::vector<uint32_t>& accepted, uint32_t prompt,
                    uint32_t length, std::mt19937_64& random) {
  while (std::ranges::min(accepted) < length) {
    const bool decoding = std::ranges::min(accepted) >= prompt;
    const uint32_t limit = decoding ? length : prompt;
    const auto layer = static_cast<uint32_t>(random() % accepted.size());
    if (accepted[layer] >= limit) continue;
    const uint32_t begin = accepted[layer];
    uint32_t layers = 1;
    while (layer + layers < accepted.size() && accepted[layer + layers] == begin &&
           random() % 4 != 0) {
      ++layers;
    }
    const auto end = static_cast<uint32_t>(begin + 1 + random() % (limit - begin));
    const absl::Status admitted =
        ingest.Admit(layer, layers, begin, end, !decoding && end == prompt);
    ASSERT_TRUE(admitted.ok()) << admitted;
    for (uint32_t i = 0; i < layers; ++i) accepted[layer + i] = end;
    while (!ingest.idle() && random() % 3 != 0) ingest.StageOne();
  }
  ingest.StageAll();
}

TEST_F(PieceTableTest, RandomHistoriesKeepEveryTokenInOnePlace) {
  const uint64_t seed = gpu::TestSeed();
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 400; ++round) {
    const Scenario scenario = RandomScenario(random);
    const auto length = static_cast<uint32_t>(1 + random() % scenario.max_tokens);
    const auto prompt = static_cast<uint32_t>(1 + random() % length);
    SCOPED_TRACE("round " + std::to_string(round) + ": " + Describe(scenario) + " prompt " +
                 std::to_string(prompt) + " length " + std::to_string(length));
    {
      Ingest ingest(pool_.account(), scenario);
      std::vector<uint32_t> accepted(scenario.shape.layers);
      ASSERT_NO_FATAL_FAILURE(IngestAtRandom(ingest, accepted, prompt, length, random));
      ASSERT_NO_FATAL_FAILURE(ingest.ExpectAllInPlace(prompt, length));
      ingest.table().FreeAll();
      ASSERT_EQ(ingest.table().bytes(), 0u);
      ASSERT_EQ(ingest.memory().lent_bytes(), 0u);
    }
    ASSERT_EQ(pool_->status().free_bytes(), pool_->status().total_bytes);
  }
}

TEST_F(PieceTableTest, AnAbandonedHistoryFreesAllItHad) {
  const uint64_t seed = gpu::TestSeed() + 1;
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 100; ++round) {
    Scenario scenario = RandomScenario(random);
    scenario.max_tokens = 200;
    Ingest ingest(pool_.account(), scenario);
    ASSERT_TRUE(ingest.Admit(0, 1, 0, 50, false).ok());
    // The prompt's end is committed, but never finished.
    ASSERT_TRUE(ingest.Admit(0, 1, 50, 120, true).ok());
    const uint32_t last = scenario.shape.layers - 1;  // another one, or the same in decode
    ASSERT_TRUE(ingest.Admit(last, 1, last == 0 ? 120 : 0, 150, false).ok());
    ingest.table().FreeAll();
    ASSERT_EQ(ingest.table().bytes(), 0u);
    ASSERT_EQ(ingest.memory().lent_bytes(), 0u);
  }
}

TEST(PieceTable, ARefusedRangeTakesNothing) {
  const uint64_t seed = gpu::TestSeed() + 2;
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  TemporaryPool pool(3, kChunk);
  int refused = 0;
  for (int round = 0; round < 200; ++round) {
    Scenario scenario = RandomScenario(random);
    scenario.shape.layers = 3;
    scenario.shape.kv_heads = 3;
    scenario.max_tokens = 2000;
    const auto before = static_cast<uint32_t>(1 + random() % 100);
    const auto end = static_cast<uint32_t>(before + 1 + random() % 1000);
    SCOPED_TRACE("round " + std::to_string(round) + ": " + Describe(scenario));
    Ingest ingest(pool.account(), scenario);
    if (!ingest.memory().AddReservation(static_cast<double>(random() % 3)).ok()) continue;
    if (!ingest.Admit(0, 3, 0, before, false).ok()) continue;
    ingest.StageAll();
    const uint64_t bytes = ingest.table().bytes();
    const HostPoolStatus status = pool->status();
    auto admission = ingest.table().Plan(0, 3, end, random() % 2 == 0);
    if (admission.ok()) {
      ingest.table().Discard(*admission);
    } else {
      ++refused;
      ASSERT_EQ(admission.status().code(), absl::StatusCode::kResourceExhausted);
    }
    ASSERT_EQ(ingest.table().bytes(), bytes);
    ingest.chunks().GiveUpRevoked(ingest.memory());
    // What was reserved may have been lent meanwhile; nobody else has less.
    ASSERT_EQ(pool->status().free_bytes(), status.free_bytes());
    ASSERT_EQ(pool->status().used_bytes + pool->status().reserved_bytes,
              status.used_bytes + status.reserved_bytes);
    // And the sequence goes on from where it was.
    if (ingest.Admit(0, 3, before, before + 1, true).ok()) {
      ingest.StageAll();
      ASSERT_NO_FATAL_FAILURE(ingest.ExpectAllInPlace(before + 1, before + 1));
    }
  }
  EXPECT_GT(refused, 20);
}

TEST_F(PieceTableTest, ReservedMemoryIsEnough) {
  const uint64_t seed = gpu::TestSeed() + 3;
  SCOPED_TRACE(gpu::SeedTrace(seed));
  std::mt19937_64 random(seed);
  for (int round = 0; round < 400; ++round) {
    const Scenario scenario = RandomScenario(random);
    const auto length = static_cast<uint32_t>(1 + random() % scenario.max_tokens);
    const auto prompt = static_cast<uint32_t>(1 + random() % length);
    const double needed = PieceTable::ChunksNeeded(scenario.shape, scenario.method, length,
                                                   scenario.max_tokens, kChunk);
    SCOPED_TRACE("round " + std::to_string(round) + ": " + Describe(scenario) + " prompt " +
                 std::to_string(prompt) + " length " + std::to_string(length));
    Ingest ingest(pool_.account(), scenario);
    ASSERT_TRUE(ingest.memory().AddReservation(needed).ok());
    // Decoding starts when the prompt has been staged: its last piece is cut by then.
    std::vector<uint32_t> accepted(scenario.shape.layers);
    ASSERT_NO_FATAL_FAILURE(IngestAtRandom(ingest, accepted, prompt, prompt, random));
    ASSERT_NO_FATAL_FAILURE(IngestAtRandom(ingest, accepted, prompt, length, random));
    // As many as were ever lent: none is asked back as long as the reservation needs it.
    EXPECT_LE(static_cast<double>(ingest.chunks().lent), std::ceil(needed));
  }
}

TEST(PieceTable, NeedsNothingForSinksAlone) {
  const Scenario scenario = MakeScenario(2, 2, 100);
  EXPECT_EQ(PieceTable::ChunksNeeded(scenario.shape, scenario.method, 16, 100, kChunk), 0);
  EXPECT_GT(PieceTable::ChunksNeeded(scenario.shape, scenario.method, 17, 100, kChunk), 0);
}

}  // namespace
}  // namespace clusterkv::service
