// A wedged device shows in the log of slow operations, in the phase that waited.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "service/logging.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

using nlohmann::json;

constexpr auto kHeld = std::chrono::milliseconds(500);

class CoreSlowTest : public CoreTest {
 protected:
  CoreSlowTest() { InitLogging(LogFormat::kJson, LogLevel::kWarning); }
  ~CoreSlowTest() override { InitLogging(LogFormat::kText, LogLevel::kInfo); }

  void Start(absl::Duration threshold) {
    CoreOptions options;
    options.slow_operation = threshold;
    StartCore(std::move(options));
  }

  // The slow operations that were logged while `act` ran.
  static std::vector<json> Slow(const std::function<void()>& act) {
    testing::internal::CaptureStderr();
    act();
    std::istringstream stream(testing::internal::GetCapturedStderr());
    std::vector<json> slow;
    for (std::string line; std::getline(stream, line);) {
      json record = json::parse(line);
      if (record["msg"] == "slow operation") slow.push_back(std::move(record));
    }
    return slow;
  }

  static void Hold(Gate& gate) {
    gate.AwaitArrival();
    std::this_thread::sleep_for(kHeld + std::chrono::milliseconds(10));
    gate.Open();
  }
};

TEST_F(CoreSlowTest, StagingThatHangs) {
  Start(absl::FromChrono(kHeld));
  const Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
  worker->key.request_id = "ingest-1";
  const auto slow = Slow([&] {
    device_->stage.Close();
    EXPECT_TRUE(Ingest(worker, Range(worker, sequence, 0, 10, false)).ok());
    Hold(device_->stage);
    EXPECT_TRUE(worker->Await([](const Told& told) { return told.credit_count == 1; }));
  });
  ASSERT_EQ(slow.size(), 1u);
  EXPECT_EQ(slow[0]["operation"], "IngestTokens");
  EXPECT_EQ(slow[0]["request_id"], "ingest-1");
  EXPECT_EQ(slow[0]["sequence"], sequence);
  EXPECT_EQ(slow[0]["tokens"], 10);
  EXPECT_GE(slow[0]["enqueue_ms"], kHeld.count());
  EXPECT_LT(slow[0]["core_queue_ms"], kHeld.count());
}

TEST_F(CoreSlowTest, ClusteringThatHangsAndASessionThatHasToWaitForIt) {
  Start(absl::FromChrono(kHeld));
  const Worker worker = Attached();
  const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
  const auto slow = Slow([&] {
    device_->cluster.Close();
    EXPECT_TRUE(Ingest(worker, Range(worker, sequence, 0, 100, true)).ok());
    device_->cluster.AwaitArrival();
    core_->EndSession(worker->session, absl::AbortedError("enough"));
    core_->WorkerDied(worker->session);
    Fence();
    Hold(device_->cluster);
    EXPECT_TRUE(AwaitNothingHeld());
  });
  std::map<std::string, json> by_operation;
  for (const json& record : slow) by_operation.try_emplace(record["operation"], record);
  ASSERT_TRUE(by_operation.contains("clustering"));
  EXPECT_GE(by_operation["clustering"]["enqueue_ms"], kHeld.count());
  EXPECT_GE(by_operation["clustering"]["problems"], 1);
  ASSERT_TRUE(by_operation.contains("session end"));
  EXPECT_EQ(by_operation["session end"]["session"], worker->session);
  EXPECT_GE(by_operation["session end"]["in_flight_ms"], kHeld.count());
}

TEST_F(CoreSlowTest, QuickOnesAreNot) {
  Start(absl::Minutes(10));
  EXPECT_TRUE(Slow([&] {
                const Worker worker = Attached();
                const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
                MustIngest(worker, sequence, 0, 10, false);
                EXPECT_TRUE(Release(worker, sequence).ok());
              }).empty());
}

}  // namespace
}  // namespace clusterkv::service
