// Served fetches over packets, without gRPC and without the attach server. What a worker may send
// is tested in tests/integration/test_fetch_socket.py.
#include "service/rpc/fetch_server.h"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <future>
#include <string>
#include <thread>
#include <vector>

#include "clusterkv/v1/attach.pb.h"
#include "clusterkv/v1/fetch.pb.h"
#include "service/rpc/rpc_counters.h"
#include "tests/service/core_fixture.h"

namespace clusterkv::service {
namespace {

constexpr size_t kConnections = 4;
constexpr GrantId kGrant = 0xa;

class FetchServerTest : public CoreTest {
 protected:
  ~FetchServerTest() override {
    server_.reset();
    core_->Stop();
  }

  void Start(FetchServerOptions options = {}) {
    StartCore();
    auto server = FetchServer::Create(options, *core_, calls_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  // The worker's end; invalid if the server took none.
  gpu::UniqueFd Connect(GrantId grant = kNoGrant) {
    int ends[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    gpu::UniqueFd mine(ends[0]), servers(ends[1]);
    if (const absl::Status taken = server_->Take(servers, grant); !taken.ok()) {
      EXPECT_TRUE(absl::IsResourceExhausted(taken)) << taken;
      EXPECT_TRUE(servers.valid());
      return {};
    }
    EXPECT_FALSE(servers.valid());
    v1::AttachEvent event;
    EXPECT_TRUE(event.ParseFromString(Receive(mine)));
    EXPECT_TRUE(event.has_attached());
    return mine;
  }

  // Empty at the connection's end.
  static std::string Receive(const gpu::UniqueFd& socket) {
    std::string bytes(131072, 0);
    const ssize_t received = recv(socket.get(), bytes.data(), bytes.size(), 0);
    bytes.resize(received < 0 ? 0 : static_cast<size_t>(received));
    return bytes;
  }

  static v1::FetchCall CallOf(const Worker& worker, const FetchRequest& request) {
    v1::FetchCall call;
    call.set_request_id("test");
    v1::FetchClustersRequest& message = *call.mutable_request();
    message.mutable_session()->set_session_token(worker->key.token);
    message.mutable_session()->set_boot_epoch(worker->key.boot_epoch);
    message.set_layer(request.layer);
    message.set_want_output(request.want_output);
    message.set_want_selection(request.want_selection);
    for (const FetchItem& from : request.items) {
      v1::FetchItem& item = *message.add_items();
      item.set_sequence_id(from.sequence);
      item.set_position(from.position);
      item.mutable_q()->set_inline_(from.q.inline_bytes);
      item.mutable_k()->set_inline_(from.k.inline_bytes);
      item.mutable_v()->set_inline_(from.v.inline_bytes);
    }
    return call;
  }
  static void Send(const gpu::UniqueFd& socket, const v1::FetchCall& call) {
    const std::string bytes = call.SerializeAsString();
    ASSERT_EQ(send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
  }
  static v1::FetchAnswer Ask(const gpu::UniqueFd& socket, const v1::FetchCall& call) {
    Send(socket, call);
    v1::FetchAnswer answer;
    EXPECT_TRUE(answer.ParseFromString(Receive(socket)));
    return answer;
  }

  SequenceId Prompted(const Worker& worker) {
    const SequenceId sequence = MustRegister(worker, FetchMode::kServed);
    MustIngest(worker, sequence, 0, 60, true);
    EXPECT_TRUE(Wait(worker, sequence, 0).ok());
    return sequence;
  }

  // Each layer by packets, then repeated by the core itself.
  void Steps(const gpu::UniqueFd& socket, const Worker& worker, SequenceId sequence, uint32_t begin,
             uint32_t end) {
    for (uint32_t position = begin; position < end; ++position) {
      for (uint32_t layer = 0; layer < 2; ++layer) {
        const FetchRequest request = Fetch(sequence, position, layer);
        const v1::FetchAnswer answer = Ask(socket, CallOf(worker, request));
        ASSERT_EQ(answer.code(), 0) << answer.message();
        const auto again = DoFetch(worker, request);
        ASSERT_TRUE(again.ok()) << again.status();
        ASSERT_EQ(answer.reply().results_size(), 1);
        const v1::FetchResult& result = answer.reply().results(0);
        const FetchResult& same = again->front();
        EXPECT_EQ(result.output(), std::string(reinterpret_cast<const char*>(same.output.data()),
                                               same.output.size() * sizeof(float)));
        EXPECT_EQ(std::vector<int32_t>(result.selected_positions().begin(),
                                       result.selected_positions().end()),
                  same.selected);
      }
    }
  }

  RpcCounters calls_;
  std::unique_ptr<FetchServer> server_;
};

TEST_F(FetchServerTest, WorkersStepAtTheSameTimeWhileConnectionsComeAndGo) {
  Start();  // with room: it may not have seen yet that one is closed when the next is opened
  std::vector<std::future<void>> workers;
  for (int i = 0; i < 3; ++i) {
    workers.push_back(std::async(std::launch::async, [this] {
      const Worker worker = Attached();
      const SequenceId sequence = Prompted(worker);
      for (uint32_t position = 60; position < 80; position += 5) {
        Steps(Connect(), worker, sequence, position, position + 5);
      }
    }));
  }
  for (std::future<void>& worker : workers) worker.get();
}

TEST_F(FetchServerTest, AThreadThatPollsAnswersToo) {
  Start({.poll = absl::Milliseconds(20)});
  const Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  const gpu::UniqueFd socket = Connect();
  Steps(socket, worker, sequence, 60, 70);
  absl::SleepFor(absl::Milliseconds(40));  // now it sleeps
  Steps(socket, worker, sequence, 70, 72);
}

TEST_F(FetchServerTest, ConnectionsAreBounded) {
  Start({.max_connections = kConnections, .max_grant_connections = 1});
  std::vector<gpu::UniqueFd> open;
  for (size_t i = 0; i < kConnections; ++i) open.push_back(Connect());
  EXPECT_FALSE(Connect().valid());
  const gpu::UniqueFd granted = Connect(kGrant);  // counted by itself
  EXPECT_TRUE(granted.valid());
  EXPECT_FALSE(Connect(kGrant).valid());
  open.pop_back();
  while (!Connect().valid()) std::this_thread::yield();  // once the server has seen it
}

TEST_F(FetchServerTest, ASessionIsFoundByItsOwnGrantsConnectionsAlone) {
  Start();
  const Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  const v1::FetchCall call = CallOf(worker, Fetch(sequence, 60, 0));
  EXPECT_EQ(Ask(Connect(kGrant), call).code(),
            static_cast<int>(absl::StatusCode::kUnauthenticated));
  EXPECT_EQ(Ask(Connect(), call).code(), 0);
}

TEST_F(FetchServerTest, ACallThatIsOnItsWayOutlivesItsConnectionAndTheServer) {
  Start();
  const Worker worker = Attached();
  const SequenceId sequence = Prompted(worker);
  gpu::UniqueFd left = Connect(), kept = Connect();
  device_->stage.Close();
  Send(left, CallOf(worker, Fetch(sequence, 60, 0)));
  device_->stage.AwaitArrival();
  left.Reset();
  Send(kept, CallOf(worker, Fetch(sequence, 60, 0)));
  v1::FetchAnswer answer;
  ASSERT_TRUE(answer.ParseFromString(Receive(kept)));
  EXPECT_EQ(answer.code(), static_cast<int>(absl::StatusCode::kAborted));
  server_.reset();
  EXPECT_EQ(Receive(kept), "");
  device_->stage.Open();
  // The step is made, and can be repeated.
  auto again = DoFetch(worker, Fetch(sequence, 60, 0));
  while (absl::IsAborted(again.status())) again = DoFetch(worker, Fetch(sequence, 60, 0));
  EXPECT_TRUE(again.ok()) << again.status();
  const RpcStatus counted = calls_.status()[calls_.IndexOf("FetchClusters")];
  EXPECT_EQ(counted.started, 2u);
}

}  // namespace
}  // namespace clusterkv::service
