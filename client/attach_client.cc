#include "client/attach_client.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/grpc_status.h"
#include "client/lifeline.h"
#include "gpu/status_macros.h"

namespace clusterkv::client {
namespace {

// How long the daemon may take to close after our goodbye.
constexpr absl::Duration kGoodbyeTimeout = absl::Seconds(1);

// Decode steps read the entry without a lock (gpu/host_chunks.h acquires it), and only after they
// have seen a segment in the chunk, which the daemon publishes after our ChunkMapped.
void StoreBase(const std::byte** entry, const std::byte* base) {
  __atomic_store_n(entry, base, __ATOMIC_RELEASE);
}

}  // namespace

AttachClient::AttachClient(AttachOptions options) : options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<AttachClient>> AttachClient::Create(AttachOptions options,
                                                                   const Deadline& deadline) {
  std::unique_ptr<AttachClient> client(new AttachClient(std::move(options)));
  CKV_ASSIGN_OR_RETURN(client->chunk_bases_, client->options_.device->AllocatePinned(
                                                 kMaxChunks * sizeof(const std::byte*)));
  CKV_ASSIGN_OR_RETURN(client->lifeline_, CreateLifeline());
  CKV_ASSIGN_OR_RETURN(client->socket_, AttachSocket::Connect(client->options_.path));
  v1::AttachRequest request;
  request.mutable_hello()->set_session_token(client->options_.session_token);
  request.mutable_hello()->set_boot_epoch(client->options_.boot_epoch);
  CKV_RETURN_IF_ERROR(client->socket_->Send(request, client->lifeline_.get()));
  client->thread_ = std::thread([raw = client.get()] { raw->Run(); });
  pthread_setname_np(client->thread_.native_handle(), "ckv-attach");

  std::unique_lock lock(client->mutex_);
  const bool answered = client->changed_.wait_until(lock, deadline.time(), [raw = client.get()] {
    return raw->attached_ || !raw->failure_.ok();
  });
  if (!answered) return absl::DeadlineExceededError("attach socket: no answer in time");
  if (!client->failure_.ok()) return client->failure_;
  return client;
}

AttachClient::~AttachClient() { Close(); }

absl::StatusOr<std::shared_ptr<gpu::DeviceMemory>> AttachClient::WaitForArena(
    uint32_t arena_id, uint64_t bytes, const Deadline& deadline) {
  std::unique_lock lock(mutex_);
  auto arena = arenas_.end();
  changed_.wait_until(lock, deadline.time(), [&] {
    arena = arenas_.find(arena_id);
    return arena != arenas_.end() || !failure_.ok();
  });
  if (arena != arenas_.end()) {
    if (arena->second->bytes() >= bytes) return arena->second;
    return absl::InternalError(absl::StrCat("arena ", arena_id, " has ", arena->second->bytes(),
                                            " bytes; expected at least ", bytes));
  }
  if (!failure_.ok()) return failure_;
  return absl::DeadlineExceededError(
      absl::StrCat("arena ", arena_id, " did not arrive on the attach socket in time"));
}

void AttachClient::Fail(const absl::Status& why) {
  const std::lock_guard lock(mutex_);
  if (failure_.ok()) failure_ = why;
  changed_.notify_all();
}

void AttachClient::Close() {
  if (!thread_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    if (failure_.ok()) failure_ = absl::CancelledError("the client is closed");
    changed_.notify_all();
  }
  // Reading ends first, so that the maps are ours; the daemon still gets the goodbye.
  socket_->StopReceiving();
  thread_.join();
  for (const auto& [index, chunk] : chunks_) StoreBase(&bases()[index], nullptr);
  chunks_.clear();
  {
    const std::lock_guard lock(mutex_);
    arenas_.clear();
  }
  v1::AttachRequest request;
  request.mutable_goodbye();
  // If it cannot be sent the daemon learns of our end by the closed connection.
  if (socket_->Send(request).ok()) socket_->Finish(Deadline(kGoodbyeTimeout));
}

void AttachClient::Run() {
  absl::Status status;
  while (status.ok()) {
    absl::StatusOr<AttachPacket> packet = socket_->Receive();
    status = packet.ok() ? Handle(*std::move(packet)) : packet.status();
  }
  bool tell = false;
  {
    const std::lock_guard lock(mutex_);
    if (failure_.ok()) failure_ = status;
    tell = attached_ && !closing_;
    changed_.notify_all();
  }
  if (tell && options_.on_lost) options_.on_lost(status);
}

absl::Status AttachClient::Handle(AttachPacket packet) {
  const v1::AttachEvent& event = packet.event;
  switch (event.event_case()) {
    case v1::AttachEvent::kAttached: {
      const std::lock_guard lock(mutex_);
      attached_ = true;
      changed_.notify_all();
      return absl::OkStatus();
    }
    case v1::AttachEvent::kRejected: {
      const absl::Status why =
          FromCode(event.rejected().code(), absl::StrCat("attach: ", event.rejected().message()));
      return why.ok() ? absl::InternalError("attach: rejected with code OK") : why;
    }
    case v1::AttachEvent::kArenaGranted:
      return MapArena(event.arena_granted(), std::move(packet.fd));
    case v1::AttachEvent::kArenaRevoked: {
      const std::lock_guard lock(mutex_);
      arenas_.erase(event.arena_revoked().arena_id());
      return absl::OkStatus();
    }
    case v1::AttachEvent::kChunkGranted:
      return MapChunk(event.chunk_granted(), std::move(packet.fd));
    case v1::AttachEvent::kChunkRevoked:
      return UnmapChunk(event.chunk_revoked().chunk_index());
    case v1::AttachEvent::EVENT_NOT_SET:
      break;
  }
  return absl::InternalError("attach socket: an event of an unknown kind");
}

absl::Status AttachClient::MapArena(const v1::ArenaGranted& granted, gpu::UniqueFd fd) {
  absl::StatusOr<std::unique_ptr<gpu::DeviceMemory>> memory =
      options_.device->Import(std::move(fd), granted.bytes());
  if (!memory.ok()) {
    return Annotate(memory.status(),
                    absl::StrCat("arena ", granted.arena_id(), " of ", granted.bytes(), " bytes"));
  }
  const std::lock_guard lock(mutex_);
  arenas_[granted.arena_id()] = *std::move(memory);
  changed_.notify_all();
  return absl::OkStatus();
}

absl::Status AttachClient::MapChunk(const v1::ChunkGranted& granted, gpu::UniqueFd fd) {
  const uint32_t index = granted.chunk_index();
  if (index >= kMaxChunks) {
    return absl::InternalError(absl::StrCat("host chunk ", index, "; allowed: below ", kMaxChunks));
  }
  if (chunks_.contains(index)) {
    return absl::InternalError(absl::StrCat("host chunk ", index, " was granted twice"));
  }
  absl::StatusOr<gpu::Mapping> mapping =
      gpu::Mapping::Create(fd.get(), granted.bytes(), gpu::MapAccess::kReadOnly);
  if (!mapping.ok()) return Annotate(mapping.status(), absl::StrCat("host chunk ", index));
  // Ahead of its first use: pinning takes about 80 ms a GiB.
  auto registration =
      options_.device->RegisterHost(mapping->data(), mapping->bytes(), gpu::MapAccess::kReadOnly);
  if (!registration.ok()) {
    return Annotate(registration.status(), absl::StrCat("host chunk ", index));
  }
  StoreBase(&bases()[index], mapping->data());
  chunk_count_ = std::max(chunk_count_.load(), index + 1);
  chunks_.emplace(index, Chunk{*std::move(mapping), *std::move(registration)});
  v1::AttachRequest request;
  request.mutable_chunk_mapped()->set_chunk_index(index);
  return socket_->Send(request);
}

absl::Status AttachClient::UnmapChunk(uint32_t index) {
  const auto chunk = chunks_.find(index);
  if (chunk == chunks_.end()) {
    return absl::InternalError(absl::StrCat("host chunk ", index, " was revoked, not granted"));
  }
  StoreBase(&bases()[index], nullptr);
  chunks_.erase(chunk);
  v1::AttachRequest request;
  request.mutable_chunk_unmapped()->set_chunk_index(index);
  return socket_->Send(request);
}

}  // namespace clusterkv::client
