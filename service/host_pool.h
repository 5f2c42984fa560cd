// The pinned host memory of the daemon: equal chunk files in a directory of its own, allocated in
// full at start, each lent whole to one session at a time.
//
//   free ──lend──► lent ──quarantine──► quarantined ──clean──► (zeroed) ──recycle──► free
//
// A chunk leaves quarantine only when its mapper said that it has none any more, or is dead (design
// D7); the caller knows. Where not all workers trust each other the word of one is not enough:
// there a chunk is cleaned by giving up its file, cut to nothing, for a new one. Whoever still maps
// the old one has no pages of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "gpu/device.h"
#include "gpu/mapping.h"
#include "gpu/unique_fd.h"
#include "service/daemon_status.h"

namespace clusterkv::service {

using PoolChunk = uint32_t;  // ordinal in the pool

struct HostPoolOptions {
  std::string directory;  // created if missing, set to 0700
  uint64_t total_bytes = 0;
  uint64_t chunk_bytes = 0;
  bool new_files = false;             // clean chunks by new files
  std::optional<int> numa_node = {};  // its pages lie there while it has room; nullopt: anywhere
  gpu::Device* device = nullptr;  // pins every chunk for it; null: none needs to. Outlives the pool
};

// Not thread-safe, but Clean may run on another thread for a quarantined chunk.
class HostPool {
 public:
  // Errors: FAILED_PRECONDITION (another daemon uses the directory), RESOURCE_EXHAUSTED (the file
  // system has too little room: how much), INVALID_ARGUMENT, what errno says otherwise.
  static absl::StatusOr<std::unique_ptr<HostPool>> Create(const HostPoolOptions& options);
  ~HostPool();  // removes the chunk files

  // Sets aside or gives back chunks for later Lend(kReserved).
  // Errors: RESOURCE_EXHAUSTED with the numbers.
  absl::Status Reserve(uint32_t chunks);
  void Unreserve(uint32_t chunks);

  enum class Source { kReserved, kFree };
  // Errors: RESOURCE_EXHAUSTED.
  absl::StatusOr<PoolChunk> Lend(Source source);
  void Quarantine(PoolChunk chunk);
  // With an error it is to be called again: what was to be replaced is gone, and for a moment
  // somebody else may have the room. Errors: RESOURCE_EXHAUSTED, of the device, what errno says.
  absl::Status Clean(PoolChunk chunk);
  // REQUIRES: quarantined and cleaned.
  void Recycle(PoolChunk chunk);

  std::byte* data(PoolChunk chunk) const { return chunks_[chunk].mapping.data(); }
  int read_only_fd(PoolChunk chunk) const { return chunks_[chunk].read_only.get(); }
  uint64_t chunk_bytes() const { return chunk_bytes_; }
  uint32_t chunk_count() const { return static_cast<uint32_t>(chunks_.size()); }
  // Neither lent, reserved nor in quarantine.
  uint32_t available_chunks() const { return static_cast<uint32_t>(free_.size()) - reserved_; }
  HostPoolStatus status() const;

 private:
  enum class State { kFree, kLent, kQuarantined };
  struct Chunk {
    std::string path;
    gpu::Mapping mapping;
    std::unique_ptr<gpu::HostRegistration> registration;  // goes before the mapping
    gpu::UniqueFd read_only;
    State state = State::kFree;
  };

  HostPool(gpu::UniqueFd lock, const HostPoolOptions& options);
  absl::Status AddChunks(const HostPoolOptions& options);
  absl::Status MakeFile(Chunk& chunk) const;
  void ReportNode(int node) const;
  absl::Status PinChunks();
  absl::Status Pin(Chunk& chunk) const;
  static absl::Status GiveUpFile(Chunk& chunk);
  absl::Status Renew(Chunk& chunk) const;

  gpu::UniqueFd lock_;  // flock on the directory's lock file
  const uint64_t chunk_bytes_;
  const bool new_files_;
  const std::optional<int> numa_node_;
  gpu::Device* const device_;
  bool pinned_ = false;  // a device that has memory of its own reaches the chunks
  std::vector<Chunk> chunks_;
  std::vector<PoolChunk> free_;
  uint32_t reserved_ = 0;
  uint32_t lent_ = 0;
  uint32_t quarantined_ = 0;
};

}  // namespace clusterkv::service
