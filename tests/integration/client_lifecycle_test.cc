// The client library against a real daemon in another process: what a worker sees when things go
// right, when a daemon is full, slow, or gone.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <deque>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "client/client.h"
#include "client/connection.h"
#include "client/replay/child_process.h"
#include "gpu/unique_fd.h"
#include "tests/integration/dense_sequence.h"

namespace clusterkv::client {
namespace {

using replay::ChildOptions;
using replay::ChildProcess;
using testing::DenseSequence;

constexpr uint32_t kPrompt = 300;

gpu::Shape SmallShape() {
  return {.layers = 2, .kv_heads = 2, .q_heads = 4, .head_dim = 64, .dtype = gpu::DType::kFp32};
}

gpu::MethodOptions SmallMethod() {
  gpu::MethodOptions method;
  method.sink_tokens = 4;
  method.min_window_tokens = 8;
  method.decode_segment_tokens = 16;
  method.prompt_segment_tokens = 128;
  method.tokens_per_cluster = 8;
  method.budget_tokens = 2048;  // retrieves all
  return method;
}

SequenceOptions Options(FetchMode mode, uint32_t max_tokens = 1024) {
  return {.shape = SmallShape(), .method = SmallMethod(), .max_tokens = max_tokens, .mode = mode};
}

class ClientLifecycle : public ::testing::Test {
 protected:
  void SetUp() override { StartDaemon("64mb"); }
  void TearDown() override {
    if (daemon_.has_value()) daemon_->Signal(SIGKILL);
    daemon_.reset();
    std::filesystem::remove_all(directory_);
  }

  void StartDaemon(const std::string& host_memory) {
    std::string pattern = ::testing::TempDir() + "ckvXXXXXX";
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    directory_ = pattern;
    address_ = "unix:" + directory_ + "/d.sock";
    int pipe_fds[2];
    ASSERT_EQ(pipe2(pipe_fds, O_CLOEXEC), 0);
    const gpu::UniqueFd write_end(pipe_fds[1]);
    stdout_ = gpu::UniqueFd(pipe_fds[0]);
    log_ = gpu::UniqueFd(open((directory_ + "/log").c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
    auto started = ChildProcess::Start(
        {.arguments = {CLUSTERKVD_PATH, "--listen", address_, "--admin-listen", "127.0.0.1:0",
                       "--host-memory", host_memory, "--host-chunk", "4mb", "--host-memory-dir",
                       directory_ + "/mem", "--backend", "host"},
         .stdout_fd = write_end.get(),
         .stderr_fd = log_.get()});
    ASSERT_TRUE(started.ok()) << started.status();
    daemon_.emplace(*std::move(started));
    pollfd wait = {.fd = stdout_.get(), .events = POLLIN, .revents = 0};
    ASSERT_EQ(poll(&wait, 1, 60'000), 1);
  }

  std::unique_ptr<Client> Connect(ClientOptions options = {}) {
    options.address = address_;
    options.name = "client_lifecycle_test";
    options.device_threads = 1;
    auto client = Client::Connect(options);
    EXPECT_TRUE(client.ok()) << client.status();
    return client.ok() ? *std::move(client) : nullptr;
  }

  v1::GetStatusReply Status() {
    auto connection = Connection::Create(address_);
    auto status = (*connection)->GetStatus({}, Deadline(absl::Seconds(10)));
    EXPECT_TRUE(status.ok()) << status.status();
    return status.ok() ? *std::move(status) : v1::GetStatusReply();
  }

  // Until nothing is held, for at most 5 s.
  bool DrainsToZero() {
    const Deadline deadline(absl::Seconds(5));
    while (!deadline.passed()) {
      const v1::GetStatusReply status = Status();
      const v1::HostBytes& host = status.host_bytes();
      if (status.sessions() + status.sequences() + host.used() + host.reserved() +
              host.quarantined() + status.gpu_bytes_used() ==
          0) {
        return true;
      }
      absl::SleepFor(absl::Milliseconds(20));
    }
    return false;
  }

  std::string directory_, address_;
  gpu::UniqueFd stdout_, log_;
  std::optional<ChildProcess> daemon_;
  std::mt19937_64 random_{5};
};

// A sequence and the truth about it.
struct Member {
  Member(Client& client, const SequenceOptions& options)
      : sequence(*client.RegisterSequence(options)), dense(options.shape) {}

  absl::Status Ingest(uint32_t tokens, std::mt19937_64& random, bool end = true) {
    const gpu::Shape& shape = sequence->options().shape;
    const uint32_t position = dense.length();
    dense.AddTokens(tokens, random);
    k = dense.Keys(0, shape.layers, position, tokens);
    v = dense.Values(0, shape.layers, position, tokens);
    range = {.position = position,
             .count = tokens,
             .layer_begin = 0,
             .layer_count = shape.layers,
             .end_of_prompt = end};
    return IngestAgain(absl::Seconds(60));
  }
  absl::Status IngestAgain(absl::Duration timeout) {
    const gpu::Shape& shape = sequence->options().shape;
    const size_t head = shape.head_dim * gpu::SizeOf(shape.dtype);
    return sequence->Ingest(range,
                            {.k = k.data(),
                             .v = v.data(),
                             .layer_stride = range.count * shape.kv_heads * head,
                             .token_stride = shape.kv_heads * head,
                             .head_stride = head},
                            timeout);
  }

  std::unique_ptr<Sequence> sequence;
  DenseSequence dense;
  IngestRange range;
  std::vector<std::byte> k, v;
};

// One step of a batch, kept until End; compares with dense attention.
class Step {
 public:
  Step(DecodeBatch& batch, const std::vector<Member*>& members, std::mt19937_64& random)
      : batch_(batch), members_(members), random_(random) {}

  // Everything of one layer; before it the token, with the first.
  absl::Status Layer(uint32_t layer) {
    const gpu::Shape& shape = members_.front()->sequence->options().shape;
    const size_t head = shape.head_dim * gpu::SizeOf(shape.dtype);
    buffers_.emplace_back();
    Buffers& b = buffers_.back();
    for (Member* const member : members_) {
      if (layer == 0) member->dense.AddTokens(1, random_);
      const uint32_t position = member->dense.length() - 1;
      const auto add = [](std::vector<std::byte>& to, const std::vector<std::byte>& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      add(b.k, member->dense.Keys(layer, 1, position, 1));
      add(b.v, member->dense.Values(layer, 1, position, 1));
      b.queries.push_back(member->dense.RandomQuery(random_));
      add(b.q, b.queries.back());
    }
    const size_t out_floats = size_t{shape.q_heads} * shape.head_dim;
    b.out.resize(members_.size() * out_floats);
    absl::Status status = batch_.Append(layer, {.k = b.k.data(),
                                                .v = b.v.data(),
                                                .batch_stride = shape.kv_heads * head,
                                                .head_stride = head});
    if (!status.ok()) return status;
    return batch_.Attend(
        layer, {.q = b.q.data(), .batch_stride = shape.q_heads * head, .head_stride = head},
        {.out = b.out.data(), .batch_stride = out_floats, .head_stride = shape.head_dim});
  }

  double WorstError() const {
    const gpu::Shape& shape = members_.front()->sequence->options().shape;
    double worst = 0;
    for (uint32_t layer = 0; layer < buffers_.size(); ++layer) {
      for (size_t i = 0; i < members_.size(); ++i) {
        const Buffers& b = buffers_[layer];
        worst = std::max(
            worst, testing::WorstRelativeError(
                       members_[i]->dense.Attention(layer, b.queries[i]),
                       b.out.data() + i * size_t{shape.q_heads} * shape.head_dim, shape.head_dim));
      }
    }
    return worst;
  }

 private:
  struct Buffers {
    std::vector<std::byte> k, v, q;
    std::vector<std::vector<std::byte>> queries;
    std::vector<float> out;
  };
  DecodeBatch& batch_;
  const std::vector<Member*> members_;
  std::mt19937_64& random_;
  std::deque<Buffers> buffers_;
};

absl::Status Decode(DecodeBatch& batch, const std::vector<Member*>& members,
                    std::mt19937_64& random, double* error) {
  absl::Status status = batch.Begin();
  if (!status.ok()) return status;
  Step step(batch, members, random);
  const uint32_t layers = members.front()->sequence->options().shape.layers;
  for (uint32_t layer = 0; layer < layers; ++layer) {
    status = step.Layer(layer);
    if (!status.ok()) return status;
  }
  status = batch.End();
  if (status.ok()) *error = std::max(*error, step.WorstError());
  return status;
}

TEST_F(ClientLifecycle, DecodesAndLeavesNothingBehind) {
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    auto client = Connect();
    ASSERT_NE(client, nullptr);
    EXPECT_EQ(client->backend(), "host");
    Member member(*client, Options(mode));
    ASSERT_TRUE(member.Ingest(kPrompt, random_).ok());
    EXPECT_EQ(member.sequence->length(), kPrompt);
    ASSERT_TRUE(member.sequence->WaitPublished(kPrompt).ok());
    EXPECT_EQ(member.sequence->published().cut, kPrompt - 8);
    auto batch = *client->CreateBatch({member.sequence.get()}, {.want_selection = true});
    double error = 0;
    for (int i = 0; i < 60; ++i) {
      const absl::Status status = Decode(*batch, {&member}, random_, &error);
      ASSERT_TRUE(status.ok()) << status;
      ASSERT_TRUE(member.sequence->WaitPublished(member.sequence->length()).ok());
    }
    EXPECT_LT(error, 1e-5);
    EXPECT_EQ(member.sequence->length(), kPrompt + 60);
    EXPECT_GE(member.sequence->published().segments, 6u);
    const gpu::LayerCounters counters = member.sequence->counters(1);
    EXPECT_GT(counters.hit_clusters, 0u);
    EXPECT_GT(counters.missed_clusters, 0u);
    EXPECT_GT(counters.hit_tokens, counters.hit_clusters);
    EXPECT_EQ(counters.missed_tokens * SmallShape().row_bytes(), counters.gathered_bytes);
    EXPECT_GT(counters.gathered_bytes, 0u);
    const v1::GetStatusReply status = Status();
    EXPECT_EQ(status.sessions(), 1u);
    EXPECT_EQ(status.sequences(), 1u);
    EXPECT_EQ(status.session_list(0).client_name(), "client_lifecycle_test");
    batch.reset();
    EXPECT_TRUE(member.sequence->Release().ok());
    EXPECT_TRUE(member.sequence->Release().ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(member.sequence->WaitPublished(1).status()));
    EXPECT_EQ(member.sequence->counters(1).hit_clusters, counters.hit_clusters);
    client.reset();
    EXPECT_TRUE(DrainsToZero()) << Status().DebugString();
  }
}

TEST_F(ClientLifecycle, DirectAndServedSelectTheSame) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  std::vector<std::vector<int32_t>> selections;
  std::vector<gpu::LayerCounters> counters;
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    random_.seed(9);
    Member member(*client, Options(mode));
    ASSERT_TRUE(member.Ingest(kPrompt, random_).ok());
    ASSERT_TRUE(member.sequence->WaitPublished(kPrompt).ok());
    auto batch = *client->CreateBatch({member.sequence.get()}, {.want_selection = true});
    ASSERT_TRUE(batch->Begin(37).ok());
    Step step(*batch, {&member}, random_);
    for (uint32_t layer = 0; layer < 2; ++layer) {
      ASSERT_TRUE(step.Layer(layer).ok());
      const auto selection = batch->Selection(0);
      ASSERT_TRUE(selection.ok()) << selection.status();
      ASSERT_EQ(selection->size(), 2u * 37u);
      for (const int32_t position : *selection) {
        EXPECT_GE(position, 4);
        EXPECT_LT(position, static_cast<int32_t>(kPrompt - 8));
      }
      selections.push_back(*selection);
    }
    ASSERT_TRUE(batch->End().ok());
    counters.push_back(member.sequence->counters(0));
  }
  EXPECT_EQ(selections[0], selections[2]);
  EXPECT_EQ(selections[1], selections[3]);
  EXPECT_EQ(counters[0].missed_clusters, counters[1].missed_clusters);
  EXPECT_EQ(counters[0].gathered_bytes, counters[1].gathered_bytes);
  EXPECT_EQ(counters[0].hit_clusters, counters[1].hit_clusters);
  EXPECT_EQ(counters[0].hit_tokens, counters[1].hit_tokens);
  EXPECT_EQ(counters[0].missed_tokens, counters[1].missed_tokens);
}

TEST_F(ClientLifecycle, LargeServedBatchesGoThroughAnArenaThatIsUsedAgain) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  SequenceOptions options = Options(FetchMode::kServed, 512);
  options.shape.q_heads = 32;
  options.shape.head_dim = 256;  // 76 KiB a sequence with its output
  options.shape.layers = 1;
  options.method.budget_tokens = 512;
  std::vector<std::unique_ptr<Member>> members;
  std::vector<Member*> pointers;
  std::vector<Sequence*> sequences;
  for (int i = 0; i < 20; ++i) {
    members.push_back(std::make_unique<Member>(*client, options));
    ASSERT_TRUE(members.back()->Ingest(40, random_).ok());
    ASSERT_TRUE(members.back()->sequence->WaitPublished(40).ok());
    pointers.push_back(members.back().get());
    sequences.push_back(members.back()->sequence.get());
  }
  double error = 0;
  uint64_t held = 0;
  for (int i = 0; i < 4; ++i) {
    auto batch = client->CreateBatch(sequences);
    ASSERT_TRUE(batch.ok()) << batch.status();
    const absl::Status status = Decode(**batch, pointers, random_, &error);
    ASSERT_TRUE(status.ok()) << status;
    if (i == 0) held = Status().gpu_bytes_used();
  }
  EXPECT_LT(error, 1e-5);
  EXPECT_EQ(Status().gpu_bytes_used(), held);
}

TEST_F(ClientLifecycle, PromptOfManyRingsPasses) {
  // 300 tokens of 1 KiB a layer through a ring of 10 tokens: a segment is over ten times the ring.
  auto client = Connect({.ring_bytes = 10 * 1024});
  ASSERT_NE(client, nullptr);
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    Member member(*client, Options(mode));
    ASSERT_TRUE(member.Ingest(kPrompt, random_).ok());
    ASSERT_TRUE(member.sequence->WaitPublished(kPrompt).ok());
    auto batch = *client->CreateBatch({member.sequence.get()});
    double error = 0;
    for (int i = 0; i < 40; ++i) {
      absl::Status status = Decode(*batch, {&member}, random_, &error);
      while (absl::IsResourceExhausted(status)) {  // the ring, until the daemon has emptied it
        ASSERT_TRUE(member.sequence->WaitPublished(member.sequence->length()).ok());
        status = Decode(*batch, {&member}, random_, &error);
      }
      ASSERT_TRUE(status.ok()) << status;
    }
    EXPECT_LT(error, 1e-5);
  }
}

TEST_F(ClientLifecycle, RefusesWhatCannotWork) {
  auto client = Connect({.ring_bytes = 4096});
  ASSERT_NE(client, nullptr);
  SequenceOptions options = Options(FetchMode::kDirect);
  options.shape.head_dim = 65;
  EXPECT_TRUE(absl::IsInvalidArgument(client->RegisterSequence(options).status()));
  options = Options(FetchMode::kDirect, 0);
  EXPECT_TRUE(absl::IsInvalidArgument(client->RegisterSequence(options).status()));
  options = Options(FetchMode::kDirect);
  options.shape.layers = 8;  // two tokens of all layers are more than the ring
  EXPECT_TRUE(absl::IsInvalidArgument(client->RegisterSequence(options).status()));
  Member direct(*client, Options(FetchMode::kDirect));
  Member served(*client, Options(FetchMode::kServed));
  EXPECT_TRUE(absl::IsInvalidArgument(client->CreateBatch({}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      client->CreateBatch({direct.sequence.get(), served.sequence.get()}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      client->CreateBatch({direct.sequence.get(), direct.sequence.get()}).status()));
  auto other = Connect();
  EXPECT_TRUE(absl::IsInvalidArgument(other->CreateBatch({direct.sequence.get()}).status()));
  EXPECT_TRUE(absl::IsUnavailable(Client::Connect({.address = address_ + "x"}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Client::Connect({.address = "unix:"}).status()));
}

TEST_F(ClientLifecycle, KeepsTheOrderOfCalls) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    Member member(*client, Options(mode, kPrompt + 1));
    ASSERT_TRUE(member.Ingest(10, random_, false).ok());
    auto batch = *client->CreateBatch({member.sequence.get()});
    EXPECT_TRUE(absl::IsFailedPrecondition(batch->Begin()));  // the prompt has not ended
    ASSERT_TRUE(member.Ingest(kPrompt - 10, random_).ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(member.IngestAgain(absl::Seconds(1))));
    ASSERT_TRUE(member.sequence->WaitPublished(0).ok());
    EXPECT_TRUE(absl::IsInvalidArgument(batch->Begin(2049)));
    EXPECT_TRUE(absl::IsFailedPrecondition(batch->End()));
    Step step(*batch, {&member}, random_);
    EXPECT_TRUE(absl::IsFailedPrecondition(batch->Selection(0).status()));
    ASSERT_TRUE(batch->Begin().ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(batch->Begin()));
    EXPECT_TRUE(absl::IsFailedPrecondition(member.sequence->Release()));
    EXPECT_TRUE(
        absl::IsFailedPrecondition(batch->Append(1, {.k = member.k.data(), .v = member.v.data()})));
    ASSERT_TRUE(step.Layer(0).ok());
    EXPECT_TRUE(absl::IsFailedPrecondition(batch->End()));
    ASSERT_TRUE(step.Layer(1).ok());
    ASSERT_TRUE(batch->End().ok());
    EXPECT_LT(step.WorstError(), 1e-5);
    EXPECT_TRUE(absl::IsOutOfRange(batch->Begin()));  // max_tokens
  }
}

TEST_F(ClientLifecycle, FullSegmentsCanBeWaitedForBeforeThePromptEnds) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    Member member(*client, Options(mode));
    Sequence& sequence = *member.sequence;
    ASSERT_TRUE(member.Ingest(200, random_, false).ok());
    for (const uint32_t length : {200u, 140u, 200u}) {
      const auto published = sequence.WaitPublished(length);
      ASSERT_TRUE(published.ok()) << published.status();
      EXPECT_EQ(published->cut, 4u + 128u);
    }
    EXPECT_TRUE(absl::IsFailedPrecondition(sequence.WaitPublished(0).status()));
    // The second segment needs tokens that have not come; as it turns out there is none.
    EXPECT_TRUE(
        absl::IsDeadlineExceeded(sequence.WaitPublished(280, absl::Milliseconds(100)).status()));
    ASSERT_TRUE(member.Ingest(10, random_).ok());
    EXPECT_EQ(sequence.WaitPublished(0)->cut, 210u - 8u);
    auto batch = *client->CreateBatch({&sequence});
    double error = 0;
    for (int i = 0; i < 70; ++i) {
      const absl::Status status = Decode(*batch, {&member}, random_, &error);
      ASSERT_TRUE(status.ok()) << status;
      ASSERT_TRUE(sequence.WaitPublished(sequence.length()).ok());
    }
    EXPECT_LT(error, 1e-5);
    EXPECT_EQ(sequence.published().cut, 202u + 4 * 16u);
  }
}

TEST_F(ClientLifecycle, AbandonedStepEndsItsSequenceOnly) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  for (const FetchMode mode : {FetchMode::kDirect, FetchMode::kServed}) {
    Member member(*client, Options(mode));
    ASSERT_TRUE(member.Ingest(kPrompt, random_).ok());
    ASSERT_TRUE(member.sequence->WaitPublished(kPrompt).ok());
    auto batch = *client->CreateBatch({member.sequence.get()});
    ASSERT_TRUE(batch->Begin().ok());
    Step step(*batch, {&member}, random_);
    ASSERT_TRUE(step.Layer(0).ok());
    batch.reset();
    batch = *client->CreateBatch({member.sequence.get()});
    EXPECT_TRUE(absl::IsAborted(batch->Begin()));
    EXPECT_TRUE(member.sequence->Release().ok());
    EXPECT_TRUE(client->health().ok());
  }
}

TEST_F(ClientLifecycle, FullPoolIsExhaustedAndIngestGoesOnAfterwards) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  SequenceOptions options = Options(FetchMode::kDirect, 60'000);  // 117 MiB of a pool of 64
  EXPECT_TRUE(absl::IsResourceExhausted(client->RegisterSequence(options).status()));
  options.reserve_tokens = 1;
  Member first(*client, options);
  ASSERT_TRUE(first.Ingest(20'000, random_, false).ok());
  Member second(*client, options);
  ASSERT_TRUE(absl::IsResourceExhausted(second.Ingest(20'000, random_)));
  ASSERT_TRUE(first.sequence->Release().ok());
  // What the first had is free once the client has unmapped it, a moment later.
  absl::Status again;
  const Deadline deadline(absl::Seconds(30));
  do {
    again = second.IngestAgain(absl::Seconds(60));
    absl::SleepFor(absl::Milliseconds(10));
  } while (absl::IsResourceExhausted(again) && !deadline.passed());
  ASSERT_TRUE(again.ok()) << again;
  ASSERT_TRUE(second.sequence->WaitPublished(20'000).ok());
}

TEST_F(ClientLifecycle, WindowFillsWhileTheDaemonStandsStillAndGoesOnAfterwards) {
  auto client = Connect({.rpc_timeout = absl::Seconds(60)});
  ASSERT_NE(client, nullptr);
  Member member(*client, Options(FetchMode::kDirect));
  ASSERT_TRUE(member.Ingest(kPrompt, random_).ok());
  ASSERT_TRUE(member.sequence->WaitPublished(kPrompt).ok());
  auto batch = *client->CreateBatch({member.sequence.get()});
  daemon_->Signal(SIGSTOP);
  absl::Status status;
  double error = 0;
  uint32_t steps = 0;
  while ((status = Decode(*batch, {&member}, random_, &error)).ok()) ++steps;
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(steps, 16u * 4);  // the window's slots less the 8 that it held
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      member.sequence->WaitPublished(member.sequence->length(), absl::Milliseconds(100)).status()));
  daemon_->Signal(SIGCONT);
  ASSERT_TRUE(member.sequence->WaitPublished(member.sequence->length()).ok());
  status = Decode(*batch, {&member}, random_, &error);
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_LT(error, 1e-5);
}

TEST_F(ClientLifecycle, DeadDaemonIsUnavailableAtOnceAndTheOpenStepFinishes) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  Member direct(*client, Options(FetchMode::kDirect));
  Member served(*client, Options(FetchMode::kServed));
  for (Member* const member : {&direct, &served}) {
    ASSERT_TRUE(member->Ingest(kPrompt, random_).ok());
    ASSERT_TRUE(member->sequence->WaitPublished(kPrompt).ok());
  }
  auto batch = *client->CreateBatch({direct.sequence.get()});
  auto served_batch = *client->CreateBatch({served.sequence.get()});
  ASSERT_TRUE(batch->Begin().ok());
  ASSERT_TRUE(served_batch->Begin().ok());
  Step step(*batch, {&direct}, random_);
  ASSERT_TRUE(step.Layer(0).ok());
  daemon_->Signal(SIGKILL);
  ASSERT_TRUE(daemon_->Wait(absl::Seconds(10)).ok());
  const auto start = std::chrono::steady_clock::now();
  while (client->health().ok() &&
         std::chrono::steady_clock::now() - start < std::chrono::seconds(10)) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  EXPECT_TRUE(absl::IsUnavailable(client->health())) << client->health();
  ASSERT_TRUE(step.Layer(1).ok());
  EXPECT_TRUE(batch->End().ok());
  EXPECT_LT(step.WorstError(), 1e-5);
  EXPECT_TRUE(absl::IsUnavailable(batch->Begin()));
  Step served_step(*served_batch, {&served}, random_);
  EXPECT_TRUE(absl::IsUnavailable(served_step.Layer(0)));
  EXPECT_TRUE(absl::IsUnavailable(client->RegisterSequence(Options(FetchMode::kDirect)).status()));
  EXPECT_TRUE(absl::IsUnavailable(direct.sequence->WaitPublished(1).status()));
  EXPECT_TRUE(absl::IsUnavailable(direct.IngestAgain(absl::Seconds(60))));
  batch.reset();
  served_batch.reset();
  EXPECT_TRUE(absl::IsUnavailable(direct.sequence->Release()));
  served.sequence.reset();
  client.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST_F(ClientLifecycle, WedgedDaemonCostsADeadline) {
  auto client = Connect({.rpc_timeout = absl::Milliseconds(300)});
  ASSERT_NE(client, nullptr);
  daemon_->Signal(SIGSTOP);
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(client->RegisterSequence(Options(FetchMode::kDirect)).status()));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      Client::Connect({.address = address_, .rpc_timeout = absl::Milliseconds(300)}).status()));
  client.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  daemon_->Signal(SIGCONT);
  EXPECT_TRUE(DrainsToZero()) << Status().DebugString();
}

TEST_F(ClientLifecycle, SequenceThatOutlivesItsClientIsToldSo) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  Member member(*client, Options(FetchMode::kDirect));
  ASSERT_TRUE(member.Ingest(kPrompt, random_).ok());
  client.reset();
  EXPECT_TRUE(absl::IsCancelled(member.sequence->WaitPublished(1).status()));
  EXPECT_TRUE(absl::IsCancelled(member.sequence->Release()));
  EXPECT_TRUE(DrainsToZero()) << Status().DebugString();
}

TEST_F(ClientLifecycle, DrainingDaemonTakesNoNewSequences) {
  auto client = Connect();
  ASSERT_NE(client, nullptr);
  Member member(*client, Options(FetchMode::kServed));
  daemon_->Signal(SIGTERM);
  absl::Status status;
  const Deadline deadline(absl::Seconds(5));
  do {
    status = client->RegisterSequence(Options(FetchMode::kServed)).status();
  } while (status.ok() && !deadline.passed());
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  member.sequence.reset();
  client.reset();
  const auto end = daemon_->Wait(absl::Seconds(20));
  ASSERT_TRUE(end.ok()) << end.status();
  EXPECT_EQ(end->exit_code, 0);
}

}  // namespace
}  // namespace clusterkv::client
