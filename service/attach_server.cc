#include "service/attach_server.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "clusterkv/v1/attach.pb.h"
#include "gpu/status_macros.h"
#include "gpu/unique_fd.h"
#include "service/core.h"
#include "service/logging.h"
#include "service/mailbox.h"
#include "service/packet_socket.h"
#include "service/socket_lock.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77  // Linux 6.5
#endif

namespace clusterkv::service {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kMaxOutgoing = 131072;
constexpr size_t kMaxPacketBytes = 4096;
constexpr int kTickMilliseconds = 1000;
constexpr mode_t kOwnSocketMode = 0660;
constexpr mode_t kGrantSocketMode = 0666;

struct Outgoing {
  std::string bytes;
  gpu::UniqueFd fd;
};

// One connection, and after it the watch over its process. Belongs to the server's thread.
struct Peer {
  uint64_t id = 0;
  gpu::UniqueFd socket;    // invalid once closed
  gpu::UniqueFd pidfd;     // readable when the process is dead
  gpu::UniqueFd lifeline;  // locked by the process while it lives
  PeerCredentials credentials;
  Clock::time_point deadline;  // for the hello
  enum class State { kNew, kAttaching, kAttached, kOver } state = State::kNew;
  GrantId grant = kNoGrant;
  SessionId session = 0;
  bool goodbye = false;
  std::deque<Outgoing> outgoing;
};

struct Listener {
  GrantId grant = kNoGrant;
  gpu::UniqueFd socket;
};

class AttachServerImpl : public AttachServer {
 public:
  AttachServerImpl(const AttachOptions& options, ServiceCore& core, FetchConnections& fetches,
                   gpu::UniqueFd lock, gpu::UniqueFd listener)
      : options_(options),
        core_(core),
        fetches_(fetches),
        lock_(std::move(lock)),
        epoll_(epoll_create1(EPOLL_CLOEXEC)),
        mailbox_(std::make_shared<Mailbox>()),
        paths_{{kNoGrant, options.path}} {
    AddListener(kNoGrant, std::move(listener));
    Watch(mailbox_->fd(), kMailbox, EPOLLIN);
    thread_ = std::thread([this] { Run(); });
    pthread_setname_np(thread_.native_handle(), "ckv-attach");
  }

  ~AttachServerImpl() override {
    mailbox_->Post([this] { stopping_ = true; });
    thread_.join();
    for (const auto& [grant, path] : paths_) unlink(path.c_str());
  }

  absl::Status Listen(GrantId grant, const std::string& path) override {
    std::lock_guard lock(paths_mu_);
    if (paths_.contains(grant)) {
      return absl::AlreadyExistsError(
          fmt::format("grant {} listens at {}", GrantText(grant), paths_[grant]));
    }
    CKV_ASSIGN_OR_RETURN(gpu::UniqueFd socket, ListenPackets(path, kGrantSocketMode));
    paths_[grant] = path;
    auto held = std::make_shared<gpu::UniqueFd>(std::move(socket));
    mailbox_->Post([this, grant, held] { AddListener(grant, std::move(*held)); });
    return absl::OkStatus();
  }

  void StopListening(GrantId grant) override {
    std::lock_guard lock(paths_mu_);
    const auto found = paths_.find(grant);
    if (found == paths_.end()) return;
    unlink(found->second.c_str());
    paths_.erase(found);
    mailbox_->Post([this, grant] {
      // Closing the socket takes it from the epoll set.
      std::erase_if(listeners_, [&](const auto& one) { return one.second.grant == grant; });
    });
  }

  // On any thread.
  void Send(uint64_t peer, const clusterkv::v1::AttachEvent& event, gpu::UniqueFd fd) {
    auto held = std::make_shared<gpu::UniqueFd>(std::move(fd));
    mailbox_->Post([this, peer, bytes = event.SerializeAsString(), held] {
      if (Peer* found = Find(peer)) Queue(*found, bytes, std::move(*held));
    });
  }
  void EndOf(uint64_t peer) {
    mailbox_->Post([this, peer] {
      if (Peer* found = Find(peer); found != nullptr && found->socket.valid()) {
        Read(*found);  // a goodbye may lie there
      }
      if (Peer* found = Find(peer)) Close(*found);
    });
  }
  void Abort(uint64_t peer) {
    mailbox_->Post([this, peer] {
      if (Peer* found = Find(peer)) Lost(*found);
    });
  }

 private:
  // Keys of the epoll set. Listeners and peers are numbered together.
  static constexpr uint64_t kMailbox = 1, kFirstId = 2;
  static constexpr uint64_t kPidfdBit = 1ull << 63;

  void Watch(int fd, uint64_t key, uint32_t events) {
    epoll_event event{.events = events, .data = {.u64 = key}};
    epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
  }

  void AddListener(GrantId grant, gpu::UniqueFd socket) {
    const uint64_t id = next_id_++;
    Watch(socket.get(), id, EPOLLIN);
    listeners_[id] = {.grant = grant, .socket = std::move(socket)};
  }

  Peer* Find(uint64_t id) {
    const auto found = peers_.find(id);
    return found == peers_.end() ? nullptr : &found->second;
  }

  void Run() {
    auto next_tick = Clock::now();
    while (!stopping_) {
      epoll_event events[64];
      const int count = epoll_wait(epoll_.get(), events, 64, kTickMilliseconds);
      for (int i = 0; i < count; ++i) Handle(events[i]);
      if (Clock::now() >= next_tick) {
        Tick();
        next_tick = Clock::now() + std::chrono::milliseconds(kTickMilliseconds);
      }
    }
  }

  void Handle(const epoll_event& event) {
    if (event.data.u64 == kMailbox) return mailbox_->RunAll();
    if (const auto listener = listeners_.find(event.data.u64); listener != listeners_.end()) {
      return Accept(listener->second);
    }
    Peer* peer = Find(event.data.u64 & ~kPidfdBit);
    if (peer == nullptr) return;
    if ((event.data.u64 & kPidfdBit) != 0) return Died(*peer);
    if ((event.events & EPOLLOUT) != 0 && !Flush(*peer)) return Lost(*peer);
    if ((event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) Read(*peer);
  }

  bool Full(GrantId grant) const {
    const auto connections =
        std::ranges::count_if(peers_, [&](const auto& one) { return one.second.grant == grant; });
    return static_cast<size_t>(connections) >=
           (grant == kNoGrant ? options_.max_connections : options_.max_grant_connections);
  }

  void Accept(const Listener& listener) {
    while (true) {
      gpu::UniqueFd socket(
          accept4(listener.socket.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
      if (!socket.valid()) return;
      if (Full(listener.grant)) continue;  // closes it
      Peer peer;
      peer.id = next_id_++;
      peer.grant = listener.grant;
      ucred who{};
      socklen_t size = sizeof(who);
      if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &who, &size) != 0) continue;
      peer.credentials = {.pid = static_cast<uint32_t>(who.pid), .uid = who.uid, .gid = who.gid};
      int pidfd = -1;
      size = sizeof(pidfd);
      if (options_.use_pidfd &&
          getsockopt(socket.get(), SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size) == 0) {
        peer.pidfd = gpu::UniqueFd(pidfd);
        Watch(pidfd, peer.id | kPidfdBit, EPOLLIN);
      }
      peer.deadline = Clock::now() + absl::ToChronoMilliseconds(options_.hello_timeout);
      Watch(socket.get(), peer.id, EPOLLIN);
      peer.socket = std::move(socket);
      peers_[peer.id] = std::move(peer);
    }
  }

  void Read(Peer& peer) {
    while (peer.socket.valid() && peer.state != Peer::State::kAttaching) {
      char buffer[kMaxPacketBytes];
      auto packet = ReceivePacket(peer.socket.get(), absl::MakeSpan(buffer));
      if (absl::IsNotFound(packet.status())) return;
      if (absl::IsUnavailable(packet.status())) return Lost(peer);
      clusterkv::v1::AttachRequest request;
      if (packet.ok() && !request.ParseFromString(packet->bytes)) {
        packet = absl::InvalidArgumentError("not an AttachRequest");
      }
      if (!packet.ok()) return Refuse(peer, packet.status());
      // May remove the peer.
      if (!Take(peer, request, *packet)) return;
    }
  }

  // False if the peer is gone.
  bool Take(Peer& peer, const clusterkv::v1::AttachRequest& request, Packet& packet) {
    using clusterkv::v1::AttachRequest;
    if (request.request_case() == AttachRequest::kHello && peer.state == Peer::State::kNew) {
      return TakeHello(peer, request.hello(), packet);
    }
    if (request.request_case() == AttachRequest::kFetchHello && peer.state == Peer::State::kNew) {
      HandOn(peer);
      return false;
    }
    if (peer.state != Peer::State::kAttached) {
      Refuse(peer, absl::InvalidArgumentError("the first packet must be AttachHello"));
      return false;
    }
    switch (request.request_case()) {
      case AttachRequest::kChunkMapped:
        core_.ChunkMapped(peer.session, request.chunk_mapped().chunk_index());
        return true;
      case AttachRequest::kChunkUnmapped:
        core_.ChunkUnmapped(peer.session, request.chunk_unmapped().chunk_index());
        return true;
      case AttachRequest::kGoodbye:
        peer.goodbye = true;
        core_.Goodbye(peer.session);
        return true;
      default:
        Refuse(peer, absl::InvalidArgumentError("not a packet of an attached worker"));
        return false;
    }
  }

  absl::Status CheckAllowed(const Peer& peer) const {
    const PeerCredentials& who = peer.credentials;
    if (peer.grant != kNoGrant || options_.allow_any || options_.allow_uids.contains(who.uid) ||
        options_.allow_gids.contains(who.gid)) {
      return absl::OkStatus();
    }
    return absl::PermissionDeniedError(
        fmt::format("uid {} and gid {} are not allowed here", who.uid, who.gid));
  }

  // Of a connection for fetches. The peer is gone afterwards.
  void HandOn(Peer& peer) {
    if (const absl::Status allowed = CheckAllowed(peer); !allowed.ok()) {
      return Refuse(peer, allowed);
    }
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, peer.socket.get(), nullptr);
    const absl::Status taken = fetches_.Take(peer.socket, peer.grant);
    if (!taken.ok()) return Refuse(peer, taken);
    peers_.erase(peer.id);
  }

  bool TakeHello(Peer& peer, const clusterkv::v1::AttachHello& hello, Packet& packet) {
    if (const absl::Status allowed = CheckAllowed(peer); !allowed.ok()) {
      Refuse(peer, allowed);
      return false;
    }
    if (!peer.pidfd.valid()) {
      if (!packet.fds.empty()) peer.lifeline = std::move(packet.fds.front());
      if (!peer.lifeline.valid() || !LifelineHeld(peer)) {
        Refuse(peer, absl::FailedPreconditionError(
                         "this kernel has no SO_PEERPIDFD: send a locked lifeline file"));
        return false;
      }
    }
    peer.state = Peer::State::kAttaching;
    core_.Attach(
        {.token = hello.session_token(), .boot_epoch = hello.boot_epoch(), .grant = peer.grant},
        peer.credentials, MakeSink(peer.id),
        [this, id = peer.id](const absl::StatusOr<SessionId>& session) {
          mailbox_->Post([this, id, session] { FinishAttach(id, session); });
        });
    return true;
  }

  void FinishAttach(uint64_t id, const absl::StatusOr<SessionId>& session) {
    Peer* peer = Find(id);
    if (peer == nullptr) {  // died or left meanwhile
      if (session.ok()) core_.WorkerDied(*session);
      return;
    }
    if (!session.ok()) return Refuse(*peer, session.status());
    peer->state = Peer::State::kAttached;
    peer->session = *session;
    clusterkv::v1::AttachEvent event;
    event.mutable_attached();
    Queue(*peer, event.SerializeAsString(), gpu::UniqueFd());
    Read(*peer);
  }

  // Says why and closes. An attached worker that sends nonsense loses its session.
  void Refuse(Peer& peer, const absl::Status& why) {
    LogWarning("attach refused", {{"pid", peer.credentials.pid},
                                  {"uid", peer.credentials.uid},
                                  {"why", std::string(why.message())}});
    core_.CountRejectedAttach();
    clusterkv::v1::AttachEvent event;
    event.mutable_rejected()->set_code(static_cast<int>(why.code()));
    event.mutable_rejected()->set_message(std::string(why.message()));
    SendPacket(peer.socket.get(), event.SerializeAsString(), -1);
    Lost(peer, SessionEnd::kProtocolError);
  }

  // The connection is at its end.
  void Lost(Peer& peer, SessionEnd reason = SessionEnd::kConnectionLost) {
    if (peer.session != 0 && !peer.goodbye) {
      core_.EndSession(peer.session, absl::AbortedError("the attach connection has closed"),
                       reason);
    }
    Close(peer);
  }

  // Closes the connection; the watch over the process stays while its death matters.
  void Close(Peer& peer) {
    peer.socket.Reset();  // leaves the epoll set by itself
    peer.outgoing.clear();
    if (peer.session == 0 || peer.goodbye) {
      peers_.erase(peer.id);
    } else {
      peer.state = Peer::State::kOver;
    }
  }

  void Died(Peer& peer) {
    if (peer.session != 0) core_.WorkerDied(peer.session);
    peers_.erase(peer.id);
  }

  static bool LifelineHeld(const Peer& peer) {
    struct flock lock {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    return fcntl(peer.lifeline.get(), F_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
  }

  void Tick() {
    std::vector<uint64_t> dead, late;
    for (auto& [id, peer] : peers_) {
      if (peer.lifeline.valid() && !LifelineHeld(peer)) {
        dead.push_back(id);
      } else if (peer.state == Peer::State::kNew && Clock::now() > peer.deadline) {
        late.push_back(id);
      }
    }
    for (const uint64_t id : dead) Died(peers_.at(id));
    for (const uint64_t id : late) {
      Refuse(peers_.at(id), absl::DeadlineExceededError("no AttachHello in time"));
    }
  }

  void Queue(Peer& peer, std::string bytes, gpu::UniqueFd fd) {
    if (!peer.socket.valid()) return;
    if (peer.outgoing.size() >= kMaxOutgoing) return Lost(peer);
    peer.outgoing.push_back({std::move(bytes), std::move(fd)});
    if (peer.outgoing.size() == 1 && !Flush(peer)) Lost(peer);
  }

  // False if the connection is broken.
  bool Flush(Peer& peer) {
    while (!peer.outgoing.empty()) {
      const Outgoing& next = peer.outgoing.front();
      const SendResult sent = SendPacket(peer.socket.get(), next.bytes, next.fd.get());
      if (sent == SendResult::kBroken) return false;
      if (sent == SendResult::kWouldBlock) break;
      peer.outgoing.pop_front();
    }
    epoll_event event{.events = EPOLLIN, .data = {.u64 = peer.id}};
    if (!peer.outgoing.empty()) event.events |= EPOLLOUT;
    epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, peer.socket.get(), &event);
    return true;
  }

  std::shared_ptr<AttachSink> MakeSink(uint64_t peer);

  const AttachOptions options_;
  ServiceCore& core_;
  FetchConnections& fetches_;
  gpu::UniqueFd lock_;  // released after the socket has been removed
  gpu::UniqueFd epoll_;
  std::shared_ptr<Mailbox> mailbox_;
  std::mutex paths_mu_;
  std::map<GrantId, std::string> paths_;  // guarded by paths_mu_
  // The thread's own.
  bool stopping_ = false;
  uint64_t next_id_ = kFirstId;
  std::map<uint64_t, Listener> listeners_;
  std::map<uint64_t, Peer> peers_;
  std::thread thread_;
};

// REQUIRES: the server outlives the sessions (the daemon stops the core first).
class ConnectionSink : public AttachSink {
 public:
  ConnectionSink(AttachServerImpl& server, uint64_t peer) : server_(server), peer_(peer) {}

  void GrantArena(ArenaId arena, uint64_t bytes, int fd) override {
    clusterkv::v1::AttachEvent event;
    event.mutable_arena_granted()->set_arena_id(arena);
    event.mutable_arena_granted()->set_bytes(bytes);
    SendWith(event, fd);
  }
  void RevokeArena(ArenaId arena) override {
    clusterkv::v1::AttachEvent event;
    event.mutable_arena_revoked()->set_arena_id(arena);
    server_.Send(peer_, event, gpu::UniqueFd());
  }
  void GrantChunk(uint32_t chunk, uint64_t bytes, int fd) override {
    clusterkv::v1::AttachEvent event;
    event.mutable_chunk_granted()->set_chunk_index(chunk);
    event.mutable_chunk_granted()->set_bytes(bytes);
    SendWith(event, fd);
  }
  void RevokeChunk(uint32_t chunk) override {
    clusterkv::v1::AttachEvent event;
    event.mutable_chunk_revoked()->set_chunk_index(chunk);
    server_.Send(peer_, event, gpu::UniqueFd());
  }
  void SessionEnded() override { server_.EndOf(peer_); }

 private:
  void SendWith(const clusterkv::v1::AttachEvent& event, int fd) {
    gpu::UniqueFd copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (!copy.valid()) return server_.Abort(peer_);  // out of descriptors: the worker sees it end
    server_.Send(peer_, event, std::move(copy));
  }

  AttachServerImpl& server_;
  const uint64_t peer_;
};

std::shared_ptr<AttachSink> AttachServerImpl::MakeSink(uint64_t peer) {
  return std::make_shared<ConnectionSink>(*this, peer);
}

}  // namespace

absl::StatusOr<std::unique_ptr<AttachServer>> AttachServer::Create(const AttachOptions& options,
                                                                   ServiceCore& core,
                                                                   FetchConnections& fetches) {
  CKV_ASSIGN_OR_RETURN(gpu::UniqueFd lock, LockSocketPath("attach-path", options.path));
  CKV_ASSIGN_OR_RETURN(gpu::UniqueFd listener, ListenPackets(options.path, kOwnSocketMode));
  return std::unique_ptr<AttachServer>(std::make_unique<AttachServerImpl>(
      options, core, fetches, std::move(lock), std::move(listener)));
}

}  // namespace clusterkv::service
