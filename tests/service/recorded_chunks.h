// What a SessionMemory said of its chunks, and what it gave back.
#pragma once

#include <set>
#include <utility>
#include <vector>

#include "service/session_memory.h"

namespace clusterkv::service {

class RecordedChunks : public ChunkEvents {
 public:
  explicit RecordedChunks(HostAccount& account) : account_(account) {}

  void OnChunkLent(uint32_t chunk, PoolChunk) override {
    granted.insert(chunk);
    ++lent;
  }
  void OnChunkRevoked(uint32_t chunk) override {
    granted.erase(chunk);
    revoked.insert(chunk);
  }
  void OnChunkReturned(PoolChunk chunk) override { returned.push_back(chunk); }

  // As a worker that gives up at once what it is asked for, and the pool's janitor.
  void GiveUpRevoked(SessionMemory& memory) {
    for (const uint32_t chunk : std::exchange(revoked, {})) {
      if (!memory.ConfirmUnmapped(chunk).ok()) std::abort();
    }
    Recycle();
  }
  void Recycle() {
    for (const PoolChunk chunk : std::exchange(returned, {})) account_.Recycle(chunk);
  }

  std::set<uint32_t> granted, revoked;
  std::vector<PoolChunk> returned;
  size_t lent = 0;

 private:
  HostAccount& account_;
};

}  // namespace clusterkv::service
