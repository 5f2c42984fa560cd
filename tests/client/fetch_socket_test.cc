#include "client/fetch_socket.h"

#include <gtest/gtest.h>

#include <future>
#include <string>
#include <thread>

#include "client/connection.h"
#include "client/fetch_calls.h"
#include "tests/client/fake_daemon.h"

namespace clusterkv::client {
namespace {

const Deadline kSoon(absl::Seconds(30));

v1::FetchCall Call(const std::string& request_id = "test-1") {
  v1::FetchCall call;
  call.set_request_id(request_id);
  call.mutable_request()->set_layer(3);
  return call;
}

class FetchSocketTest : public testing::Test {
 protected:
  // The daemon's answer to the hello, and what comes of it.
  absl::StatusOr<std::unique_ptr<FetchSocket>> Connect(const std::string& answer) {
    auto socket = std::async(std::launch::async,
                             [this] { return FetchSocket::Connect(daemon_.path(), kSoon); });
    daemon_.Accept();
    const auto hello = daemon_.Receive();
    EXPECT_TRUE(hello.has_value() && hello->has_fetch_hello());
    if (answer.empty()) {
      daemon_.Close();
    } else {
      daemon_.SendBytes(answer);
    }
    return socket.get();
  }
  std::unique_ptr<FetchSocket> Connected() {
    v1::AttachEvent attached;
    attached.mutable_attached();
    auto socket = Connect(attached.SerializeAsString());
    EXPECT_TRUE(socket.ok()) << socket.status();
    return *std::move(socket);
  }
  // A call that the daemon answers with these bytes; empty: it closes.
  absl::StatusOr<v1::FetchAnswer> Ask(FetchSocket& socket, const std::string& bytes) {
    auto answer = std::async(std::launch::async, [&socket] { return socket.Call(Call(), kSoon); });
    const auto call = daemon_.Receive<v1::FetchCall>();
    EXPECT_TRUE(call.has_value() && call->request_id() == "test-1" && call->request().layer() == 3);
    if (bytes.empty()) {
      daemon_.Close();
    } else {
      daemon_.SendBytes(bytes);
    }
    return answer.get();
  }

  FakeDaemon daemon_;
};

TEST_F(FetchSocketTest, NobodyThereIsUnavailable) {
  EXPECT_TRUE(absl::IsUnavailable(FetchSocket::Connect(daemon_.path() + "x", kSoon).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(FetchSocket::Connect("", kSoon).status()));
}

TEST_F(FetchSocketTest, ARefusalHasTheDaemonsCode) {
  v1::AttachEvent event;
  event.mutable_rejected()->set_code(static_cast<int>(absl::StatusCode::kResourceExhausted));
  event.mutable_rejected()->set_message("1024 connections for fetches");
  const auto socket = Connect(event.SerializeAsString());
  EXPECT_TRUE(absl::IsResourceExhausted(socket.status())) << socket.status();
  EXPECT_EQ(socket.status().message(), "1024 connections for fetches");
}

TEST_F(FetchSocketTest, AnotherEventIsNoAnswerToTheHello) {
  v1::AttachEvent event;
  event.mutable_chunk_revoked();
  EXPECT_TRUE(absl::IsInternal(Connect(event.SerializeAsString()).status()));
}

TEST_F(FetchSocketTest, ClosedAtTheHelloIsUnavailable) {
  EXPECT_TRUE(absl::IsUnavailable(Connect("").status()));
}

TEST_F(FetchSocketTest, ASilentDaemonIsNotWaitedForBeyondTheDeadline) {
  // Connections are taken by the kernel, answers are not given.
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      FetchSocket::Connect(daemon_.path(), Deadline(absl::Milliseconds(50))).status()));
}

TEST_F(FetchSocketTest, AnswersComeBackWithTheirCodes) {
  const auto socket = Connected();
  v1::FetchAnswer answer;
  answer.mutable_reply()->add_results()->set_sequence_id(7);
  auto got = Ask(*socket, answer.SerializeAsString());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->reply().results(0).sequence_id(), 7u);
  answer.Clear();
  answer.set_code(9);
  answer.set_message("position 8 layer 0 expected");
  got = Ask(*socket, answer.SerializeAsString());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->code(), 9);
  EXPECT_EQ(got->message(), "position 8 layer 0 expected");
}

TEST_F(FetchSocketTest, AnAnswerMayFillAPacketAndNoMore) {
  const auto socket = Connected();
  v1::FetchAnswer answer;
  answer.set_code(13);
  answer.set_message(std::string(FetchSocket::kMaxPacketBytes - 64, 'm'));
  const auto got = Ask(*socket, answer.SerializeAsString());
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->message().size(), FetchSocket::kMaxPacketBytes - 64);
  answer.set_message(std::string(FetchSocket::kMaxPacketBytes, 'm'));
  EXPECT_TRUE(absl::IsInternal(Ask(*socket, answer.SerializeAsString()).status()));
}

TEST_F(FetchSocketTest, NonsenseIsInternal) {
  EXPECT_TRUE(absl::IsInternal(Ask(*Connected(), "\xff\xff\xff").status()));
}

TEST_F(FetchSocketTest, ALostDaemonIsUnavailable) {
  const auto socket = Connected();
  EXPECT_TRUE(absl::IsUnavailable(Ask(*socket, "").status()));
  EXPECT_TRUE(absl::IsUnavailable(socket->Call(Call(), kSoon).status()));
}

TEST_F(FetchSocketTest, AnAnswerThatDoesNotComeIsNotWaitedForBeyondTheDeadline) {
  const auto socket = Connected();
  EXPECT_TRUE(
      absl::IsDeadlineExceeded(socket->Call(Call(), Deadline(absl::Milliseconds(50))).status()));
}

// What a lost answer means is the caller's; what comes after it goes by gRPC, where nobody listens
// here.
TEST_F(FetchSocketTest, CallsGoByGrpcOnceTheConnectionIsOver) {
  const auto connection = Connection::Create("unix:" + daemon_.path() + ".nobody");
  ASSERT_TRUE(connection.ok());
  FetchCalls calls(**connection, Connected());
  v1::FetchClustersRequest request;
  request.set_layer(3);
  const auto ask = [&] { return calls.Call(request, 0, Deadline(absl::Seconds(30))); };
  auto refused = std::async(std::launch::async, ask);
  const auto call = daemon_.Receive<v1::FetchCall>();
  ASSERT_TRUE(call.has_value());
  v1::FetchAnswer answer;
  answer.set_code(5);
  answer.set_message("sequence 1");
  daemon_.SendBytes(answer.SerializeAsString());
  const absl::Status found = refused.get().status();
  EXPECT_TRUE(absl::IsNotFound(found)) << found;
  EXPECT_EQ(found.message(), "FetchClusters at " + (*connection)->address() + " (request " +
                                 call->request_id() + "): sequence 1");
  auto lost = std::async(std::launch::async, ask);
  ASSERT_TRUE(daemon_.Receive<v1::FetchCall>().has_value());
  daemon_.Close();
  EXPECT_TRUE(absl::IsUnavailable(lost.get().status()));
  const absl::Status by_grpc = ask().status();
  EXPECT_TRUE(absl::IsUnavailable(by_grpc));
  EXPECT_NE(by_grpc.message().find("failed to connect"), std::string::npos) << by_grpc;
}

TEST_F(FetchSocketTest, WhatDoesNotFitAPacketGoesByGrpc) {
  const auto connection = Connection::Create("unix:" + daemon_.path() + ".nobody");
  ASSERT_TRUE(connection.ok());
  FetchCalls calls(**connection, Connected());
  const auto by_grpc = [](const absl::Status& status) {
    return status.message().find("failed to connect") != std::string::npos;
  };
  v1::FetchClustersRequest request;
  EXPECT_TRUE(by_grpc(calls.Call(request, FetchSocket::kMaxPacketBytes + 1, kSoon).status()));
  request.add_items()->mutable_q()->set_inline_(std::string(FetchSocket::kMaxPacketBytes, 'q'));
  EXPECT_TRUE(by_grpc(calls.Call(request, 0, kSoon).status()));
}

}  // namespace
}  // namespace clusterkv::client
