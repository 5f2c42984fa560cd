// Against a client that attends to whatever candidates it is told to choose.
#include "client/replay/service_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <memory>

#include "gpu/host/host_device.h"
#include "tests/client/replay/random_trace.h"
#include "tests/client/replay/reference_attention.h"

namespace clusterkv::client::replay {
namespace {

using ::testing::HasSubstr;

// What the fake service shares; `choose` may break the contract.
struct FakeService {
  const Trace* trace = nullptr;
  std::vector<StepRange> ranges;
  std::function<std::vector<uint32_t>(const ReferenceStep&, const StepRange&, uint32_t budget)>
      choose = [](const ReferenceStep& step, const StepRange&, uint32_t budget) {
        return step.Oracle(budget);
      };
  // Published cut after a wait for this length.
  std::function<uint32_t(uint32_t)> cut_at;
  absl::Status begin_once;  // what the first Begin says
  uint32_t ingested_tokens = 0, waits = 0, registered = 0, released = 0;
  std::vector<uint64_t> seeds;
};

class FakeSequence final : public Sequence {
 public:
  FakeSequence(FakeService& service, const SequenceOptions& options)
      : service_(service), options_(options) {}

  uint64_t id() const override { return 1; }
  const SequenceOptions& options() const override { return options_; }
  uint32_t length() const override { return length_; }
  absl::Status Ingest(const IngestRange& range, const gpu::KvSource& source,
                      absl::Duration) override {
    const TraceLayer& layer = service_.trace->layers()[range.layer_begin];
    const size_t offset = range.position * service_.trace->kv_token_bytes();
    const size_t bytes = range.count * service_.trace->kv_token_bytes();
    EXPECT_EQ(std::memcmp(source.k, layer.k + offset, bytes), 0);
    EXPECT_EQ(std::memcmp(source.v, layer.v + offset, bytes), 0);
    EXPECT_LE(range.count, 512u);
    service_.ingested_tokens += range.count;
    EXPECT_EQ(range.end_of_prompt, range.position + range.count == service_.trace->prompt_tokens());
    return absl::OkStatus();
  }
  absl::StatusOr<Published> WaitPublished(uint32_t length, absl::Duration) override {
    ++service_.waits;
    published_.cut = service_.cut_at(length);
    return published_;
  }
  Published published() const override { return published_; }
  gpu::LayerCounters counters(uint32_t layer) const override {
    return {.hit_clusters = 30,
            .missed_clusters = 10,
            .hit_tokens = 0,
            .missed_tokens = 0,
            .gathered_bytes = 1000 * (layer + 1)};
  }
  absl::Status Release() override {
    ++service_.released;
    return absl::OkStatus();
  }

 private:
  FakeService& service_;
  SequenceOptions options_;
  uint32_t length_ = 0;
  Published published_;
};

class FakeBatch final : public DecodeBatch {
 public:
  FakeBatch(FakeService& service, const std::vector<Sequence*>& sequences)
      : service_(service), sequences_(sequences) {}

  absl::Status Prepare(uint32_t) override { return absl::OkStatus(); }
  absl::Status Complete() override { return absl::OkStatus(); }
  absl::Status Begin(uint32_t) override {
    if (const absl::Status status = std::exchange(service_.begin_once, absl::OkStatus());
        !status.ok()) {
      return status;
    }
    return absl::OkStatus();
  }
  absl::Status Append(uint32_t layer, const gpu::KvSource& source) override {
    const size_t offset = service_.ranges[step_].position * service_.trace->kv_token_bytes();
    EXPECT_EQ(std::memcmp(source.k, service_.trace->layers()[layer].k + offset,
                          service_.trace->kv_token_bytes()),
              0);
    return absl::OkStatus();
  }
  absl::Status Attend(uint32_t layer, const gpu::QuerySource&,
                      const gpu::AttentionTarget& target) override {
    const gpu::Shape& shape = service_.trace->shape();
    const uint32_t budget = sequences_[0]->options().method.budget_tokens;
    selection_.assign(size_t{shape.kv_heads} * budget, -1);
    for (uint32_t head = 0; head < shape.kv_heads; ++head) {
      const StepRange& range = service_.ranges[step_];
      const ReferenceStep reference(*service_.trace, layer, head, step_, range);
      const std::vector<uint32_t> chosen = service_.choose(reference, range, budget);
      std::copy(chosen.begin(), chosen.end(), selection_.begin() + head * budget);
      for (size_t g = 0; g < reference.group(); ++g) {
        const std::vector<double> output = reference.Output(g, chosen);
        for (size_t i = 0; i < sequences_.size(); ++i) {
          float* const out = target.out + i * target.batch_stride +
                             (head * reference.group() + g) * target.head_stride;
          for (size_t c = 0; c < output.size(); ++c) out[c] = static_cast<float>(output[c]);
        }
      }
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<int32_t>> Selection(size_t) override { return selection_; }
  absl::Status End() override {
    ++step_;
    return absl::OkStatus();
  }

 private:
  FakeService& service_;
  const std::vector<Sequence*> sequences_;
  uint32_t step_ = 0;
  std::vector<int32_t> selection_;
};

class FakeClient final : public Client {
 public:
  explicit FakeClient(FakeService& service) : service_(service) {}
  absl::StatusOr<std::unique_ptr<Sequence>> RegisterSequence(
      const SequenceOptions& options) override {
    ++service_.registered;
    service_.seeds.push_back(options.method.seed);
    return std::make_unique<FakeSequence>(service_, options);
  }
  absl::StatusOr<std::unique_ptr<DecodeBatch>> CreateBatch(const std::vector<Sequence*>& sequences,
                                                           const BatchOptions& options) override {
    EXPECT_TRUE(options.want_selection);
    return std::make_unique<FakeBatch>(service_, sequences);
  }
  const std::string& backend() const override { return backend_; }
  gpu::Device& device() override { return *device_; }
  uint64_t session_id() const override { return 1; }
  absl::Status health() const override { return absl::OkStatus(); }

 private:
  FakeService& service_;
  const std::string backend_ = "host";
  const std::unique_ptr<gpu::Device> device_ = *gpu::host::HostDevice::Create(1);
};

class ServiceRunTest : public testing::Test {
 protected:
  ServiceRunTest()
      : trace_(MakeRandomTrace(directory_, {.prompt_tokens = 700, .steps = 12})), threads_(2) {
    run_.trace = &trace_;
    run_.method.min_window_tokens = 4;
    run_.method.decode_segment_tokens = 5;
    run_.method.budget_tokens = 24;
    run_.method.seed = 40;
    run_.ranges = StepRanges(run_.method, trace_.prompt_tokens(), trace_.steps());
    EvaluationRequest request;
    request.trace = &trace_;
    request.ranges = run_.ranges;
    request.budgets = {8, 24};
    request.baselines = {Baseline::kOracle};
    request.keep_exact = true;
    absl::StatusOr<Evaluation> evaluation = Evaluate(request, threads_);
    EXPECT_TRUE(evaluation.ok());
    evaluation_ = *std::move(evaluation);
    run_.exact = &evaluation_.exact;
    run_.count_index = 1;
    service_.trace = &trace_;
    service_.ranges = run_.ranges;
    service_.cut_at = [this](uint32_t length) {
      return run_.ranges[length - trace_.prompt_tokens()].cut;
    };
  }

  absl::StatusOr<std::vector<LayerTotals>> Run() {
    FakeClient client(service_);
    return RunService(client, run_, threads_);
  }

  TemporaryDirectory directory_;
  Trace trace_;
  gpu::host::ThreadPool threads_;
  ServiceRunOptions run_;
  Evaluation evaluation_;
  FakeService service_;
};

TEST_F(ServiceRunTest, MeasuresWhatTheServiceChose) {
  run_.sequences = 3;
  const auto totals = Run();
  ASSERT_TRUE(totals.ok()) << totals.status();
  EXPECT_EQ(service_.ingested_tokens, 3u * 2 * 700);
  EXPECT_EQ(service_.released, 3u);
  EXPECT_THAT(service_.seeds, testing::ElementsAre(40, 41, 42));
  EXPECT_EQ(service_.waits, 3u * 3);  // the prompt, and when the cut moves: at steps 5 and 10
  for (size_t layer = 0; layer < 2; ++layer) {
    // The fake chooses as the oracle does, so its figures are the oracle's.
    const Measures mean = (*totals)[layer].measures.Mean();
    const Measures oracle = evaluation_.At(Baseline::kOracle, 1, layer).Mean();
    EXPECT_NEAR(mean.recall, oracle.recall, 1e-9);
    EXPECT_NEAR(mean.output_error, oracle.output_error, 2e-6);
    EXPECT_NEAR(mean.mass, oracle.mass, 1e-6);
    EXPECT_EQ((*totals)[layer].measures.count, 3u * 12 * 4);
    EXPECT_EQ((*totals)[layer].HitRate(), 0.75);
    EXPECT_DOUBLE_EQ((*totals)[layer].HostBytesPerStep(),
                     1000.0 * static_cast<double>(layer + 1) / 12);
    EXPECT_EQ((*totals)[layer].steps, 36u);
  }
}

TEST_F(ServiceRunTest, KeepsTheDumpOfTheFirstSequence) {
  OutputDump dump(trace_, trace_.steps(), 24);
  run_.dump = &dump;
  ASSERT_TRUE(Run().ok());
  EXPECT_TRUE(dump.Write(directory_.Path("dump")).ok());
}

TEST_F(ServiceRunTest, RefusesACutThatIsNotTheSchedules) {
  service_.cut_at = [](uint32_t) { return 600u; };
  const auto totals = Run();
  EXPECT_EQ(totals.status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(totals.status().message()), HasSubstr("published up to 600"));
}

TEST_F(ServiceRunTest, RefusesChoicesThatBreakTheContract) {
  const std::pair<std::function<void(std::vector<uint32_t>&)>, const char*> breaks[] = {
      {[](std::vector<uint32_t>& chosen) { chosen.pop_back(); }, "23 tokens chosen, not 24"},
      {[](std::vector<uint32_t>& chosen) { chosen[3] = chosen[4]; }, "twice"},
      {[](std::vector<uint32_t>& chosen) { chosen[3] = 15; }, "candidates are [16, "},
      {[](std::vector<uint32_t>& chosen) { chosen[3] = 699; }, "candidates are [16, "},
  };
  for (const auto& [change, message] : breaks) {
    service_.choose = [&change = change](const ReferenceStep& step, const StepRange&,
                                         uint32_t budget) {
      std::vector<uint32_t> chosen = step.Oracle(budget);
      change(chosen);
      return chosen;
    };
    const auto totals = Run();
    EXPECT_EQ(totals.status().code(), absl::StatusCode::kInternal);
    EXPECT_THAT(std::string(totals.status().message()), HasSubstr(message));
  }
}

TEST_F(ServiceRunTest, FailsOnAFullWindowOnlyIfItDoesNotWait) {
  service_.begin_once = absl::ResourceExhaustedError("full");
  EXPECT_EQ(Run().status().code(), absl::StatusCode::kResourceExhausted);
  service_.begin_once = absl::ResourceExhaustedError("full");
  run_.publish = Publish::kAsync;
  const auto totals = Run();
  EXPECT_TRUE(totals.ok()) << totals.status();
}

TEST_F(ServiceRunTest, MeasuresALateCutWithItsOwnCandidates) {
  run_.publish = Publish::kAsync;
  // The service never gets beyond the prompt.
  const uint32_t late = run_.ranges[0].cut;
  for (StepRange& range : service_.ranges) range.cut = late;
  service_.cut_at = [late](uint32_t) { return late; };
  const auto totals = Run();
  ASSERT_TRUE(totals.ok()) << totals.status();
  EXPECT_EQ((*totals)[0].candidate_tokens, 12u * (late - 16));
  EXPECT_EQ((*totals)[0].window_tokens, 12 * (701 - late) + 66);
  // Every head's recall of the oracle is that of the definitions at the late cut.
  double recall = 0.0;
  for (uint32_t step = 0; step < 12; ++step) {
    for (uint32_t head = 0; head < 2; ++head) {
      const ReferenceStep reference(trace_, 0, head, step, service_.ranges[step]);
      for (size_t g = 0; g < 2; ++g) recall += reference.Recall(g, reference.Oracle(24));
    }
  }
  EXPECT_NEAR((*totals)[0].measures.recall, recall, 1e-9);
}

}  // namespace
}  // namespace clusterkv::client::replay
