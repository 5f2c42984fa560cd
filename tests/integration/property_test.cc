// Retrieve-all equals dense: with the budget at or over the context, attention over sinks, clusters
// and window is attention over everything, for any history of chunk sizes, decode steps, batches,
// releases and publishes, direct and served, with a daemon in another process.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "client/client.h"
#include "client/replay/private_daemon.h"
#include "tests/gpu/seed.h"
#include "tests/integration/dense_sequence.h"

namespace clusterkv {
namespace {

using client::BatchOptions;
using client::Client;
using client::DecodeBatch;
using client::FetchMode;
using client::IngestRange;
using client::Sequence;
using testing::DenseSequence;

constexpr uint32_t kMaxTokens = 1400;

uint32_t Pick(std::mt19937_64& random, std::vector<uint32_t> choices) {
  return choices[random() % choices.size()];
}

uint32_t Between(std::mt19937_64& random, uint32_t low, uint32_t high) {
  return low + static_cast<uint32_t>(random() % (high - low + 1));
}

double Tolerance(gpu::DType dtype) { return dtype == gpu::DType::kFp32 ? 1e-5 : 1e-3; }

constexpr size_t kMaxMembers = 3;

// Memory that the client's device reaches in place.
class Pinned {
 public:
  Pinned(Client& client, size_t bytes) : memory_(*client.device().AllocatePinned(bytes)) {}
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(memory_->data());
  }

 private:
  std::unique_ptr<gpu::DeviceMemory> memory_;
};

struct Live {
  std::unique_ptr<Sequence> sequence;
  std::unique_ptr<DenseSequence> dense;
  uint32_t first_steps = 0;
};

// One history: sequences of one shape and mode that come, decode together in changing batches, and
// go.
class History {
 public:
  History(Client& client, uint64_t seed) : client_(client), random_(seed) {
    shape_.layers = Between(random_, 1, 3);
    shape_.kv_heads = Between(random_, 1, 3);
    shape_.q_heads = shape_.kv_heads * Pick(random_, {1, 2, 3, 5});
    shape_.head_dim = Pick(random_, {64, 96, 128, 256});
    // fp32 is for the host backend only.
    shape_.dtype = static_cast<gpu::DType>(Between(random_, 1, client.backend() == "host" ? 3 : 2));
    method_.sink_tokens = Pick(random_, {0, 1, 16, 40});
    method_.min_window_tokens = Pick(random_, {0, 1, 17, 64});
    method_.decode_segment_tokens = Pick(random_, {1, 7, 32, 320});
    method_.prompt_segment_tokens = Pick(random_, {16, 100, 333, 8192});
    method_.tokens_per_cluster = Pick(random_, {1, 4, 16, 80});
    method_.kmeans_iterations = Between(random_, 1, 8);
    method_.group = static_cast<gpu::GroupRule>(Between(random_, 1, 3));
    method_.center_keys = random_() % 2 == 0;
    method_.budget_tokens = kMaxTokens;
    method_.seed = random_();
    mode_ = random_() % 2 == 0 ? FetchMode::kDirect : FetchMode::kServed;
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) tensors_.emplace_back(client, shape_);
  }

  void Run() {
    const uint32_t rounds = Between(random_, 1, 3);
    for (uint32_t round = 0; round < rounds && !::testing::Test::HasFatalFailure(); ++round) {
      while (live_.size() < kMaxMembers && random_() % 3 != 0) Join();
      if (live_.empty()) Join();
      if (::testing::Test::HasFatalFailure()) return;
      Decode(Between(random_, 1, 40));
      if (::testing::Test::HasFatalFailure()) return;
      if (random_() % 2 == 0) Leave();
    }
  }

  std::string Describe() const {
    return std::string(mode_ == FetchMode::kDirect ? "direct " : "served ") +
           gpu::DTypeName(shape_.dtype) + " layers " + std::to_string(shape_.layers) + " heads " +
           std::to_string(shape_.kv_heads) + "/" + std::to_string(shape_.q_heads) + " dim " +
           std::to_string(shape_.head_dim) + " sinks " + std::to_string(method_.sink_tokens) +
           " window " + std::to_string(method_.min_window_tokens) + " segments " +
           std::to_string(method_.prompt_segment_tokens) + "/" +
           std::to_string(method_.decode_segment_tokens) + " cluster " +
           std::to_string(method_.tokens_per_cluster);
  }
  double worst() const { return worst_; }
  uint64_t steps() const { return steps_; }

 private:
  // Of one layer of a step, for kMaxMembers sequences.
  struct LayerTensors {
    LayerTensors(Client& client, const gpu::Shape& shape)
        : k(client, kMaxMembers * shape.kv_heads * shape.row_bytes() / 2),
          v(client, kMaxMembers * shape.kv_heads * shape.row_bytes() / 2),
          q(client, kMaxMembers * shape.q_heads * shape.row_bytes() / 2),
          out(client, kMaxMembers * shape.q_heads * shape.head_dim * sizeof(float)),
          lse(client, kMaxMembers * shape.q_heads * sizeof(float)) {}
    Pinned k, v, q, out, lse;
  };

  void Join() {
    auto made = client_.RegisterSequence(
        {.shape = shape_, .method = method_, .max_tokens = kMaxTokens, .mode = mode_});
    ASSERT_TRUE(made.ok()) << made.status();
    Live live{.sequence = *std::move(made), .dense = std::make_unique<DenseSequence>(shape_)};
    live.dense->AddTokens(Between(random_, 1, random_() % 2 == 0 ? 60 : 1100), random_);
    Ingest(live);
    live_.push_back(std::move(live));
  }

  // In chunks of random sizes, by groups of layers that run ahead of each other.
  void Ingest(Live& live) {
    const uint32_t prompt = live.dense->length();
    std::vector<uint32_t> next(shape_.layers);
    const uint32_t group = Between(random_, 1, shape_.layers);
    const uint32_t largest = Pick(random_, {1 + prompt / 8, 64, 512, 2000});
    while (true) {
      std::vector<uint32_t> open;
      for (uint32_t layer = 0; layer < shape_.layers; layer += group) {
        if (next[layer] < prompt) open.push_back(layer);
      }
      if (open.empty()) break;
      const uint32_t layer = open[random_() % open.size()];
      const uint32_t layers = std::min(group, shape_.layers - layer);
      const uint32_t count = std::min(Between(random_, 1, largest), prompt - next[layer]);
      const auto k = live.dense->Keys(layer, layers, next[layer], count);
      const auto v = live.dense->Values(layer, layers, next[layer], count);
      const size_t head = shape_.head_dim * gpu::SizeOf(shape_.dtype);
      const absl::Status ingested =
          live.sequence->Ingest(IngestRange{.position = next[layer],
                                            .count = count,
                                            .layer_begin = layer,
                                            .layer_count = layers,
                                            .end_of_prompt = next[layer] + count == prompt},
                                gpu::KvSource{.k = k.data(),
                                              .v = v.data(),
                                              .layer_stride = count * shape_.kv_heads * head,
                                              .token_stride = shape_.kv_heads * head,
                                              .head_stride = head});
      ASSERT_TRUE(ingested.ok()) << ingested;
      next[layer] += count;
    }
    const auto published = live.sequence->WaitPublished(prompt);
    ASSERT_TRUE(published.ok()) << published.status();
  }

  void Leave() {
    const size_t index = random_() % live_.size();
    if (random_() % 2 == 0) {
      const absl::Status released = live_[index].sequence->Release();
      ASSERT_TRUE(released.ok()) << released;
    }
    live_.erase(live_.begin() + static_cast<ptrdiff_t>(index));  // or by its destructor
  }

  void Decode(uint32_t steps) {
    std::vector<Live*> members;
    for (Live& live : live_) {
      if (members.empty() || random_() % 4 != 0) members.push_back(&live);
    }
    std::vector<Sequence*> sequences;
    for (Live* live : members) sequences.push_back(live->sequence.get());
    auto batch = client_.CreateBatch(sequences, BatchOptions{});
    ASSERT_TRUE(batch.ok()) << batch.status();
    for (uint32_t step = 0; step < steps; ++step) {
      if (members.front()->dense->length() + 1 >= kMaxTokens) return;
      Step(**batch, members);
      if (::testing::Test::HasFatalFailure()) return;
      if (random_() % 5 == 0) {  // else publishing races with decoding
        Live& waiting = *members[random_() % members.size()];
        const auto published = waiting.sequence->WaitPublished(waiting.dense->length());
        ASSERT_TRUE(published.ok()) << published.status();
      }
    }
  }

  void Step(DecodeBatch& batch, const std::vector<Live*>& members) {
    absl::Status begun = batch.Begin();
    if (absl::IsResourceExhausted(begun)) {  // a window is full: the daemon has to catch up
      for (Live* live : members) {
        const auto published = live->sequence->WaitPublished(live->dense->length());
        ASSERT_TRUE(published.ok()) << published.status();
      }
      begun = batch.Begin();
    }
    ASSERT_TRUE(begun.ok()) << begun;
    for (Live* live : members) live->dense->AddTokens(1, random_);
    const size_t head = shape_.head_dim * gpu::SizeOf(shape_.dtype);
    const size_t out_floats = size_t{shape_.q_heads} * shape_.head_dim;
    // Everything stays until End: direct fetch reads it when its stream gets there.
    std::vector<std::vector<std::vector<std::byte>>> q(shape_.layers);
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      const LayerTensors& tensors = tensors_[layer];
      for (size_t i = 0; i < members.size(); ++i) {
        const uint32_t position = members[i]->dense->length() - 1;
        const auto place = [&](const Pinned& to, const std::vector<std::byte>& from) {
          std::ranges::copy(from, to.as<std::byte>() + i * from.size());
        };
        place(tensors.k, members[i]->dense->Keys(layer, 1, position, 1));
        place(tensors.v, members[i]->dense->Values(layer, 1, position, 1));
        q[layer].push_back(members[i]->dense->RandomQuery(random_));
        place(tensors.q, q[layer].back());
      }
      const absl::Status appended =
          batch.Append(layer, gpu::KvSource{.k = tensors.k.as<std::byte>(),
                                            .v = tensors.v.as<std::byte>(),
                                            .batch_stride = shape_.kv_heads * head,
                                            .head_stride = head});
      ASSERT_TRUE(appended.ok()) << appended;
      const absl::Status attended =
          batch.Attend(layer,
                       gpu::QuerySource{.q = tensors.q.as<std::byte>(),
                                        .batch_stride = shape_.q_heads * head,
                                        .head_stride = head},
                       gpu::AttentionTarget{.out = tensors.out.as<float>(),
                                            .batch_stride = out_floats,
                                            .head_stride = shape_.head_dim,
                                            .lse = tensors.lse.as<float>(),
                                            .lse_batch_stride = shape_.q_heads});
      ASSERT_TRUE(attended.ok()) << attended;
    }
    const absl::Status ended = batch.End();
    ASSERT_TRUE(ended.ok()) << ended;
    ++steps_;
    const uint32_t checked = static_cast<uint32_t>(random_() % shape_.layers);
    for (size_t i = 0; i < members.size(); ++i) {
      const auto expected = members[i]->dense->Attention(checked, q[checked][i]);
      const double error = testing::WorstRelativeError(
          expected, tensors_[checked].out.as<float>() + i * out_floats, shape_.head_dim);
      ASSERT_LT(error, Tolerance(shape_.dtype))
          << "member " << i << " layer " << checked << " length " << members[i]->dense->length();
      worst_ = std::max(worst_, error / Tolerance(shape_.dtype));
    }
  }

  Client& client_;
  std::mt19937_64 random_;
  gpu::Shape shape_;
  gpu::MethodOptions method_;
  FetchMode mode_ = FetchMode::kDirect;
  std::vector<LayerTensors> tensors_;
  std::vector<Live> live_;
  double worst_ = 0;
  uint64_t steps_ = 0;
};

TEST(RetrieveAll, EqualsDenseOverRandomHistories) {
  const char* const count_text = std::getenv("CLUSTERKV_TEST_HISTORIES");
  const int histories = count_text == nullptr ? 40 : std::atoi(count_text);
  const char* const backend = std::getenv("CLUSTERKV_TEST_BACKEND");
  const char* const program = std::getenv("CLUSTERKV_TEST_CLUSTERKVD");
  auto daemon = client::replay::PrivateDaemon::Start(
      {.program = program == nullptr ? CLUSTERKVD_PATH : program,
       .backend = backend == nullptr ? "host" : backend,
       .memory = {.total_bytes = 512ull << 20}});
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  std::unique_ptr<Client> clients[2];  // served steps by packets where they fit, and by gRPC alone
  for (const bool by_grpc : {false, true}) {
    auto client = Client::Connect({.address = (*daemon)->address(),
                                   .name = "property_test",
                                   .ring_bytes = 2ull << 20,
                                   .device_threads = 2,
                                   .served_by_grpc = by_grpc});
    ASSERT_TRUE(client.ok()) << client.status();
    clients[by_grpc] = *std::move(client);
  }
  const uint64_t first = gpu::TestSeed();
  std::cout << gpu::SeedTrace(first) << ", " << histories << " histories\n";
  for (int i = 0; i < histories; ++i) {
    History history(*clients[i % 2], first + static_cast<uint64_t>(i));
    SCOPED_TRACE(gpu::SeedTrace(first + static_cast<uint64_t>(i)) + " " + history.Describe());
    history.Run();
    if (HasFatalFailure()) break;
    std::cout << history.Describe() << ": " << history.steps() << " steps, worst error "
              << history.worst() << " of the tolerance\n";
  }
  for (auto& client : clients) client.reset();
  EXPECT_TRUE((*daemon)->Stop().ok());
}

}  // namespace
}  // namespace clusterkv
