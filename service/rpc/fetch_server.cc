#include "service/rpc/fetch_server.h"

#include <fmt/format.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "clusterkv/v1/attach.pb.h"
#include "clusterkv/v1/fetch.pb.h"
#include "gpu/unique_fd.h"
#include "service/core.h"
#include "service/logging.h"
#include "service/mailbox.h"
#include "service/packet_socket.h"
#include "service/rpc/convert.h"
#include "service/rpc/request_id.h"
#include "service/rpc/rpc_counters.h"

namespace clusterkv::service {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kMaxPacketBytes = 131072;
constexpr char kMethod[] = "FetchClusters";

// Shared with the calls that are on their way.
struct Connection {
  Connection(gpu::UniqueFd taken, GrantId of) : socket(std::move(taken)), grant(of) {}

  const gpu::UniqueFd socket;
  const GrantId grant;
  std::atomic<bool> calling = false;  // from a call's arrival until just before its answer
};

// One call, from its packet to its answer.
class Call {
 public:
  Call(std::shared_ptr<Connection> connection, RpcCounters& counters, uint64_t boot_epoch,
       std::string request_id)
      : connection_(std::move(connection)),
        counters_(counters),
        method_(counters.IndexOf(kMethod)),
        boot_epoch_(boot_epoch),
        request_id_(std::move(request_id)) {
    counters_.Started(method_);
  }

  void End(absl::StatusOr<std::vector<FetchResult>> results) {
    v1::FetchAnswer answer;
    if (results.ok()) {
      answer.mutable_reply()->set_boot_epoch(boot_epoch_);
      for (FetchResult& result : *results) {
        ToProto(std::move(result), *answer.mutable_reply()->add_results());
      }
    }
    absl::Status status = results.status();
    if (const size_t bytes = answer.ByteSizeLong(); bytes > kMaxPacketBytes) {
      status = absl::ResourceExhaustedError(fmt::format(
          "an answer of {} bytes is more than the {} of a packet: repeat the call as RPC", bytes,
          kMaxPacketBytes));
    }
    if (!status.ok()) {
      answer.Clear();
      answer.set_code(static_cast<int>(status.code()));
      answer.set_message(std::string(status.message()));
      LogFailedCall(kMethod, request_id_, status);
    }
    counters_.Handled(method_, static_cast<grpc::StatusCode>(status.code()),
                      std::chrono::duration<double>(Clock::now() - begun_).count());
    const int socket = connection_->socket.get();
    connection_->calling = false;  // the next call may come as soon as the answer is out
    // There is room, since the worker has read the answer before this one. If not, or if it is
    // gone, the server's thread finds the connection at its end.
    if (SendPacket(socket, answer.SerializeAsString(), -1) != SendResult::kSent) {
      shutdown(socket, SHUT_RDWR);
    }
  }

 private:
  const std::shared_ptr<Connection> connection_;
  RpcCounters& counters_;
  const size_t method_;
  const uint64_t boot_epoch_;
  const std::string request_id_;
  const Clock::time_point begun_ = Clock::now();
};

class FetchServerImpl : public FetchServer {
 public:
  FetchServerImpl(const FetchServerOptions& options, ServiceCore& core, RpcCounters& calls,
                  gpu::UniqueFd epoll)
      : options_(options),
        core_(core),
        calls_(calls),
        epoll_(std::move(epoll)),
        buffer_(kMaxPacketBytes) {
    Watch(mailbox_.fd(), kMailbox);
    thread_ = std::thread([this] { Run(); });
    pthread_setname_np(thread_.native_handle(), "ckv-fetch");
  }

  ~FetchServerImpl() override {
    mailbox_.Post([this] { stopping_ = true; });
    thread_.join();
    for (const auto& [id, connection] : connections_) {
      shutdown(connection->socket.get(), SHUT_RDWR);
    }
  }

  absl::Status Take(gpu::UniqueFd& socket, GrantId grant) override {
    {
      const std::lock_guard lock(mu_);
      const size_t allowed =
          grant == kNoGrant ? options_.max_connections : options_.max_grant_connections;
      if (open_[grant] >= allowed) {
        return absl::ResourceExhaustedError(
            fmt::format("{} connections for fetches, allowed are {}", open_[grant], allowed));
      }
      ++open_[grant];
    }
    auto connection = std::make_shared<Connection>(std::move(socket), grant);
    mailbox_.Post([this, connection] { Add(connection); });
    return absl::OkStatus();
  }

 private:
  // Keys of the epoll set.
  static constexpr uint64_t kMailbox = 1, kFirstId = 2;

  void Watch(int fd, uint64_t key) {
    epoll_event event{.events = EPOLLIN, .data = {.u64 = key}};
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
  }

  void Add(const std::shared_ptr<Connection>& connection) {
    const uint64_t id = next_id_++;
    connections_[id] = connection;
    v1::AttachEvent event;
    event.mutable_attached();
    if (SendPacket(connection->socket.get(), event.SerializeAsString(), -1) != SendResult::kSent) {
      return Drop(id);
    }
    Watch(connection->socket.get(), id);
  }

  void Drop(uint64_t id) {
    const auto found = connections_.find(id);
    const Connection& connection = *found->second;
    // A call that is on its way keeps the descriptor open, and so in the set.
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection.socket.get(), nullptr);
    shutdown(connection.socket.get(), SHUT_RDWR);
    {
      const std::lock_guard lock(mu_);
      if (--open_[connection.grant] == 0) open_.erase(connection.grant);
    }
    connections_.erase(found);
  }

  void Run() {
    const auto poll_for = absl::ToChronoNanoseconds(options_.poll);
    auto poll_until = Clock::now();
    while (!stopping_) {
      epoll_event events[64];
      const bool poll = Clock::now() < poll_until;
      const int count = epoll_wait(epoll_.get(), events, 64, poll ? 0 : -1);
      for (int i = 0; i < count; ++i) Handle(events[i].data.u64);
      if (count > 0) poll_until = Clock::now() + poll_for;
    }
  }

  void Handle(uint64_t key) {
    if (key == kMailbox) return mailbox_.RunAll();
    const auto found = connections_.find(key);
    if (found == connections_.end()) return;
    const std::shared_ptr<Connection> connection = found->second;
    auto packet = ReceivePacket(connection->socket.get(), absl::MakeSpan(buffer_));
    if (absl::IsNotFound(packet.status())) return;
    if (absl::IsUnavailable(packet.status())) return Drop(key);
    v1::FetchCall call;
    absl::Status bad = packet.status();
    if (bad.ok() && connection->calling.exchange(true)) {
      bad = absl::InvalidArgumentError("a call before the answer to the last");
    } else if (bad.ok() && (!packet->fds.empty() || !call.ParseFromString(packet->bytes))) {
      bad = absl::InvalidArgumentError("not a FetchCall");
    }
    if (!bad.ok()) {
      LogWarning("connection for fetches closed", {{"why", std::string(bad.message())}});
      return Drop(key);
    }
    Start(connection, call);
  }

  void Start(const std::shared_ptr<Connection>& connection, const v1::FetchCall& message) {
    const auto call =
        std::make_shared<Call>(connection, calls_, core_.boot_epoch(), message.request_id());
    if (const absl::Status bad = CheckRequestId(message.request_id()); !bad.ok()) {
      return call->End(bad);
    }
    auto request = FromProto(message.request());
    if (!request.ok()) return call->End(request.status());
    SessionKey key = FromProto(message.request().session());
    key.grant = connection->grant;
    key.request_id = message.request_id();
    core_.FetchClusters(std::move(key), *std::move(request),
                        [call](absl::StatusOr<std::vector<FetchResult>> results) {
                          call->End(std::move(results));
                        });
  }

  const FetchServerOptions options_;
  ServiceCore& core_;
  RpcCounters& calls_;
  const gpu::UniqueFd epoll_;
  Mailbox mailbox_;
  std::mutex mu_;
  std::map<GrantId, size_t> open_;  // connections; guarded by mu_
  // The thread's own.
  bool stopping_ = false;
  uint64_t next_id_ = kFirstId;
  std::map<uint64_t, std::shared_ptr<Connection>> connections_;
  std::vector<char> buffer_;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<FetchServer>> FetchServer::Create(const FetchServerOptions& options,
                                                                 ServiceCore& core,
                                                                 RpcCounters& calls) {
  gpu::UniqueFd epoll(epoll_create1(EPOLL_CLOEXEC));
  if (!epoll.valid()) return absl::ErrnoToStatus(errno, "epoll for fetches");
  return std::unique_ptr<FetchServer>(
      std::make_unique<FetchServerImpl>(options, core, calls, std::move(epoll)));
}

}  // namespace clusterkv::service
