#include "service/admin_server.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <nlohmann/json.hpp>

#include "absl/strings/numbers.h"
#include "absl/time/clock.h"
#include "gpu/unique_fd.h"

namespace clusterkv::service {
namespace {

using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;

class AdminServerTest : public testing::Test {
 protected:
  void SetUp() override {
    auto server = AdminServer::Create({.listen = "127.0.0.1:0",
                                       .status =
                                           [this] {
                                             DaemonStatus status;
                                             status.version = "1.2.3";
                                             status.ready = ready_.load();
                                             status.not_ready_reason =
                                                 status.ready ? "" : "draining";
                                             status.uptime_seconds = static_cast<double>(uptime_);
                                             status.served.hit_clusters = 100 * uptime_;
                                             return status;
                                           },
                                       .sequences =
                                           [this] {
                                             const std::lock_guard lock(mu_);
                                             return sequences_;
                                           }});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ASSERT_THAT(server_->address(), StartsWith("127.0.0.1:"));
    ASSERT_TRUE(absl::SimpleAtoi(server_->address().substr(10), &port_));
    ASSERT_NE(port_, 0);
  }

  httplib::Result Get(const std::string& path) { return Client().Get(path); }
  httplib::Client Client() const { return httplib::Client("127.0.0.1", port_); }

  gpu::UniqueFd ConnectRaw() const {
    gpu::UniqueFd fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port_));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    return fd;
  }

  // For tests that serve nothing.
  static AdminOptions Options(const std::string& listen) {
    return {.listen = listen,
            .status = [] { return DaemonStatus{}; },
            .sequences = [] { return std::vector<SequenceStatus>{}; }};
  }

  std::atomic<bool> ready_{true};
  std::atomic<uint64_t> uptime_{0};
  std::mutex mu_;
  absl::StatusOr<std::vector<SequenceStatus>> sequences_ =  // guarded by mu_
      std::vector<SequenceStatus>{};
  std::unique_ptr<AdminServer> server_;
  int port_ = 0;
};

TEST_F(AdminServerTest, AnswersEveryPath) {
  for (const char* path : {"/livez", "/readyz", "/startupz"}) {
    const auto reply = Get(path);
    ASSERT_TRUE(reply) << path;
    EXPECT_EQ(reply->status, 200) << path;
    EXPECT_EQ(reply->body, "ok\n") << path;
  }
  EXPECT_EQ(Get("/version")->body, "1.2.3\n");
  const auto metrics = Get("/metrics");
  EXPECT_EQ(metrics->status, 200);
  EXPECT_THAT(metrics->get_header_value("Content-Type"), StartsWith("text/plain; version=0.0.4"));
  EXPECT_THAT(metrics->body, HasSubstr("\nclusterkv_build_info{"));
  const auto status = Get("/status");
  EXPECT_EQ(status->get_header_value("Content-Type"), "application/json");
  EXPECT_EQ(nlohmann::json::parse(status->body)["version"], "1.2.3");
}

TEST_F(AdminServerTest, ServesThePageUnderAPolicyThatForbidsAllElse) {
  const auto page = Get("/");
  ASSERT_EQ(page->status, 200);
  EXPECT_EQ(page->get_header_value("Content-Type"), "text/html; charset=utf-8");
  EXPECT_EQ(page->get_header_value("X-Content-Type-Options"), "nosniff");
  EXPECT_EQ(page->get_header_value("Cache-Control"), "no-store");
  EXPECT_THAT(page->body, StartsWith("<!doctype html>"));
  EXPECT_THAT(page->body, Not(HasSubstr("PAGE_NONCE")));
  const std::string policy = page->get_header_value("Content-Security-Policy");
  EXPECT_THAT(policy, StartsWith("default-src 'none'; script-src 'nonce-"));
  EXPECT_THAT(policy, Not(HasSubstr("unsafe")));
  const size_t begin = policy.find("'nonce-") + 7;
  const std::string nonce = policy.substr(begin, policy.find('\'', begin) - begin);
  EXPECT_EQ(nonce.size(), 32u);
  EXPECT_THAT(page->body, HasSubstr("<script nonce=\"" + nonce + "\">"));
  EXPECT_THAT(page->body, HasSubstr("<style nonce=\"" + nonce + "\">"));
  EXPECT_THAT(Get("/")->body, Not(HasSubstr(nonce)));
}

TEST_F(AdminServerTest, KeepsAHistoryOfTenMinutes) {
  EXPECT_EQ(nlohmann::json::parse(Get("/history")->body)["uptime_seconds"].size(), 0u);
  for (uptime_ = 1; uptime_ <= 605; ++uptime_) server_->Sample();
  const auto history = nlohmann::json::parse(Get("/history")->body);
  for (const auto& [name, column] : history.items()) EXPECT_EQ(column.size(), 600u) << name;
  EXPECT_EQ(history["uptime_seconds"].front(), 6);
  EXPECT_EQ(history["uptime_seconds"].back(), 605);
  EXPECT_EQ(history["served_hit_clusters"].back(), 60500);
}

TEST_F(AdminServerTest, ListsSequencesOrSaysWhyNot) {
  {
    const std::lock_guard lock(mu_);
    sequences_->emplace_back().sequence = 17;
  }
  const auto list = Get("/sequences");
  EXPECT_EQ(list->get_header_value("Content-Type"), "application/json");
  EXPECT_EQ(nlohmann::json::parse(list->body)["sequences"][0]["sequence_id"], 17);
  {
    const std::lock_guard lock(mu_);
    sequences_ = absl::UnavailableError("the queue is long");
  }
  EXPECT_EQ(Get("/sequences")->status, 503);
  EXPECT_EQ(Get("/sequences")->body, "the queue is long\n");
}

TEST_F(AdminServerTest, NotReadyIs503WithTheReasonAndStillAlive) {
  ready_ = false;
  const auto reply = Get("/readyz");
  EXPECT_EQ(reply->status, 503);
  EXPECT_EQ(reply->body, "draining\n");
  EXPECT_EQ(Get("/livez")->status, 200);
  EXPECT_EQ(Get("/metrics")->status, 200);
}

TEST_F(AdminServerTest, RefusesUnknownPathsAndOtherMethods) {
  const auto unknown = Get("/secrets");
  EXPECT_EQ(unknown->status, 404);
  EXPECT_THAT(unknown->body, HasSubstr("/readyz"));
  for (const char* path : {"/livez", "/status", "/none"}) {
    const auto post = Client().Post(path, "x", "text/plain");
    EXPECT_EQ(post->status, 405) << path;
    EXPECT_EQ(post->get_header_value("Allow"), "GET, HEAD");
    EXPECT_EQ(Client().Put(path, "x", "text/plain")->status, 405);
    EXPECT_EQ(Client().Delete(path)->status, 405);
    EXPECT_EQ(Client().Patch(path, "x", "text/plain")->status, 405);
    EXPECT_EQ(Client().Options(path)->status, 405);
  }
  const auto head = Client().Head("/livez");
  EXPECT_EQ(head->status, 200);
  EXPECT_EQ(head->body, "");
}

TEST_F(AdminServerTest, RefusesAMethodWithoutWaitingForABody) {
  const gpu::UniqueFd client = ConnectRaw();
  const std::string request = "POST /status HTTP/1.1\r\nHost: x\r\n\r\n";
  ASSERT_EQ(send(client.get(), request.data(), request.size(), 0),
            static_cast<ssize_t>(request.size()));
  std::string reply(12, '\0');
  ASSERT_EQ(recv(client.get(), reply.data(), reply.size(), MSG_WAITALL), 12);
  EXPECT_EQ(reply, "HTTP/1.1 405");
}

TEST_F(AdminServerTest, RefusesLargeRequests) {
  // Its body is never read: the client sees the refusal, or that nobody listens any more.
  const auto post = Client().Post("/status", std::string(1 << 20, 'x'), "text/plain");
  EXPECT_TRUE(!post || post->status == 405);
  EXPECT_EQ(Get("/livez?" + std::string(20'000, 'x'))->status, 414);
  EXPECT_EQ(Get("/livez")->status, 200);
}

TEST_F(AdminServerTest, AKeepAliveClientHoldsNoThread) {
  std::vector<std::unique_ptr<httplib::Client>> clients;
  for (int i = 0; i < 16; ++i) {
    clients.push_back(std::make_unique<httplib::Client>("127.0.0.1", port_));
    clients.back()->set_keep_alive(true);
    ASSERT_EQ(clients.back()->Get("/livez")->status, 200);
  }
  const absl::Time start = absl::Now();
  EXPECT_EQ(Get("/livez")->status, 200);
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
}

TEST_F(AdminServerTest, RefusesAPortThatIsTaken) {
  const auto second = AdminServer::Create(Options(server_->address()));
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(server_->address()));
  EXPECT_EQ(Get("/version")->body, "1.2.3\n");
}

TEST_F(AdminServerTest, AnswersOnAllAddressesIfToldTo) {
  const auto server = AdminServer::Create(Options("0.0.0.0:0"));
  ASSERT_TRUE(server.ok()) << server.status();
  ASSERT_THAT((*server)->address(), StartsWith("0.0.0.0:"));
  int port = 0;
  ASSERT_TRUE(absl::SimpleAtoi((*server)->address().substr(8), &port));
  // Any of 127/8 is this machine's, and not what 127.0.0.1 alone would listen on.
  EXPECT_TRUE(httplib::Client("127.0.0.2", port).Get("/livez"));
  EXPECT_FALSE(httplib::Client("127.0.0.2", port_).Get("/livez"));
}

TEST_F(AdminServerTest, RefusesAnAddressWithoutPort) {
  for (const char* listen : {"127.0.0.1", "", "127.0.0.1:http"}) {
    const auto server = AdminServer::Create(Options(listen));
    EXPECT_EQ(server.status().code(), absl::StatusCode::kInvalidArgument) << listen;
  }
}

TEST_F(AdminServerTest, StopsAtOnceWithIdleAndHalfSentRequestsOpen) {
  std::vector<gpu::UniqueFd> clients;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(ConnectRaw());
    if (i % 2 == 0) {
      ASSERT_EQ(send(clients.back().get(), "GET /livez HT", 13, 0), 13);
    }
  }
  const absl::Time start = absl::Now();
  server_.reset();
  EXPECT_LT(absl::Now() - start, absl::Seconds(2));
}

TEST_F(AdminServerTest, StartsAndStopsManyTimesOnOnePort) {
  const std::string address = server_->address();
  for (int i = 0; i < 20; ++i) {
    server_.reset();
    auto server = AdminServer::Create(Options(address));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
}

}  // namespace
}  // namespace clusterkv::service
