// What the daemon has lent to this session: arenas and host chunks, as descriptors that arrive on
// the attach socket and are mapped by a thread of its own.
//
//   daemon ──ArenaGranted + fd──► Import read-write ──► WaitForArena
//          ──ChunkGranted + fd──► map read-only ──► chunk_bases()[i] ──ChunkMapped──► daemon
//          ──ChunkRevoked───────► unmap ──ChunkUnmapped──► daemon
//
// Nothing is published in a chunk before the daemon has its ChunkMapped, so a decode step that
// sees a segment also finds its chunk mapped.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/attach_socket.h"
#include "client/deadline.h"
#include "gpu/device.h"
#include "gpu/mapping.h"

namespace clusterkv::client {

struct AttachOptions {
  std::string path;
  std::string session_token;
  uint64_t boot_epoch = 0;
  gpu::Device* device = nullptr;  // outlives the attach client
  // The connection is over; on the attach thread, at most once, not after Close began.
  std::function<void(const absl::Status&)> on_lost;
};

// Thread-safe.
class AttachClient {
 public:
  // Addresses of chunks stay where they are: a decode step reads them without a lock.
  static constexpr uint32_t kMaxChunks = 65'536;

  // Connects, presents the token and waits for the answer. Errors: the daemon's; UNAVAILABLE,
  // DEADLINE_EXCEEDED.
  static absl::StatusOr<std::unique_ptr<AttachClient>> Create(AttachOptions options,
                                                              const Deadline& deadline);
  ~AttachClient();

  // Shared, because the daemon may revoke an arena while a step on it is still in the stream: the
  // mapping then lives until its sequence lets go. Errors: DEADLINE_EXCEEDED, why the connection
  // ended, INTERNAL if it is shorter than `bytes`.
  absl::StatusOr<std::shared_ptr<gpu::DeviceMemory>> WaitForArena(uint32_t arena_id, uint64_t bytes,
                                                                  const Deadline& deadline);
  // [kMaxChunks], null where nothing is mapped.
  const std::byte* const* chunk_bases() const { return bases(); }
  // Entries beyond this have never been set.
  uint32_t chunk_count() const { return chunk_count_; }

  // Ends all waits, now and later. What is mapped stays so.
  void Fail(const absl::Status& why);
  // Unmaps everything, says goodbye and closes. REQUIRES: no step is in any stream. Idempotent.
  void Close();

 private:
  explicit AttachClient(AttachOptions options);
  const std::byte** bases() const {
    return reinterpret_cast<const std::byte**>(chunk_bases_->data());
  }
  void Run();
  absl::Status Handle(AttachPacket packet);
  absl::Status MapArena(const v1::ArenaGranted& granted, gpu::UniqueFd fd);
  absl::Status MapChunk(const v1::ChunkGranted& granted, gpu::UniqueFd fd);
  absl::Status UnmapChunk(uint32_t index);

  const AttachOptions options_;
  // Pinned, [kMaxChunks]; constant after Create, its entries written by the thread only.
  std::unique_ptr<gpu::DeviceMemory> chunk_bases_;
  std::atomic<uint32_t> chunk_count_{0};
  gpu::UniqueFd lifeline_;                // constant after Create
  std::unique_ptr<AttachSocket> socket_;  // constant after Create

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  bool attached_ = false;
  bool closing_ = false;
  absl::Status failure_;
  std::map<uint32_t, std::shared_ptr<gpu::DeviceMemory>> arenas_;

  struct Chunk {
    gpu::Mapping mapping;
    std::unique_ptr<gpu::HostRegistration> registration;  // goes before the mapping
  };
  std::map<uint32_t, Chunk> chunks_;  // the thread's; Close's once it is joined
  std::thread thread_;                // joined by Close; touched by the owner only
};

}  // namespace clusterkv::client
