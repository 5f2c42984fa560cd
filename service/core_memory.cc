// Device memory of sessions: budget, arenas, freeing; recycling of host chunks.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "gpu/status_macros.h"
#include "service/core.h"
#include "service/logging.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kMaxArenaBytes = 1ull << 40;
constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kTensorAlignment = 64;

}  // namespace

void Session::TakeChunkTable(std::unique_ptr<gpu::DeviceMemory> table) {
  if (chunk_table != nullptr || chunk_addresses == nullptr) return;
  std::copy_n(chunk_addresses.get(), kMaxSessionChunks,
              reinterpret_cast<const std::byte**>(table->data()));
  chunk_table = std::move(table);
}

void Session::OnChunkLent(uint32_t chunk, PoolChunk pool_chunk) {
  chunk_addresses[chunk] = pool->data(pool_chunk);
  chunk_count = std::max(chunk_count.load(), chunk + 1);
  if (chunk_table != nullptr) {
    reinterpret_cast<const std::byte**>(chunk_table->data())[chunk] = chunk_addresses[chunk];
  }
  if (attach) attach->GrantChunk(chunk, pool->chunk_bytes(), pool->read_only_fd(pool_chunk));
}

void Session::OnChunkRevoked(uint32_t chunk) {
  if (attach) attach->RevokeChunk(chunk);
}

void Session::OnChunkReturned(PoolChunk pool_chunk) { returned.push_back(pool_chunk); }

absl::Status ServiceCore::TakeGpuBytes(Session& session, uint64_t bytes) {
  if (options_.gpu_memory_bytes > 0 && bytes > options_.gpu_memory_bytes - gpu_used_bytes_) {
    CountRefused(Limit::kGpuMemory);
    return absl::ResourceExhaustedError(
        fmt::format("gpu-memory: {} bytes asked for, {} of {} in use", bytes, gpu_used_bytes_,
                    options_.gpu_memory_bytes));
  }
  gpu_used_bytes_ += bytes;
  session.gpu_bytes += bytes;
  return absl::OkStatus();
}

void ServiceCore::GiveGpuBytes(Session& session, uint64_t bytes) {
  gpu_used_bytes_ -= bytes;
  session.gpu_bytes -= bytes;
}

void ServiceCore::FreeDeviceMemory(std::unique_ptr<gpu::DeviceMemory> memory, Session& session,
                                   uint64_t bytes) {
  GiveGpuBytes(session, bytes);
  DiscardMemory(std::move(memory));
}

absl::Status ServiceCore::TakeSharedBytes(Session& session, KeptMemory& taken) {
  // The smallest that is large enough.
  auto best = session.kept.end();
  for (auto kept = session.kept.begin(); kept != session.kept.end(); ++kept) {
    if (kept->bytes >= taken.bytes && (best == session.kept.end() || kept->bytes < best->bytes)) {
      best = kept;
    }
  }
  if (best == session.kept.end()) return TakeGpuBytes(session, taken.bytes);
  taken = std::move(*best);
  session.kept.erase(best);
  return absl::OkStatus();
}

absl::Status ServiceCore::MakeShared(std::unique_ptr<gpu::DeviceMemory>& memory, uint64_t bytes) {
  if (memory != nullptr) return memory->Clear();
  CKV_ASSIGN_OR_RETURN(memory, device_->AllocateShared(bytes));
  return absl::OkStatus();
}

void ServiceCore::FreeSharedMemory(std::unique_ptr<gpu::DeviceMemory> memory, Session& session,
                                   uint64_t bytes) {
  if (memory == nullptr || device_->counts_importers()) {
    return FreeDeviceMemory(std::move(memory), session, bytes);
  }
  session.kept.push_back({.memory = std::move(memory), .bytes = bytes});
}

void ServiceCore::FreeKept(Session& session) {
  for (KeptMemory& kept : std::exchange(session.kept, {})) {
    FreeDeviceMemory(std::move(kept.memory), session, kept.bytes);
  }
}

// Unmapping takes a while, and on a GPU belongs to the device's thread.
void ServiceCore::DiscardMemory(std::unique_ptr<gpu::DeviceMemory> memory) {
  memory_.Post([memory = std::shared_ptr<gpu::DeviceMemory>(std::move(memory))] {});
}

void ServiceCore::AllocateArena(SessionKey key, uint64_t bytes, Completion<ArenaInfo> done) {
  Call<ArenaInfo>(std::move(done),
                  [this, key = std::move(key), bytes](Completion<ArenaInfo> reply) {
                    auto session = FindSession(key);
                    if (!session.ok()) return reply(session.status());
                    DoAllocateArena(**session, bytes, std::move(reply));
                  });
}

void ServiceCore::DoAllocateArena(Session& session, uint64_t bytes, Completion<ArenaInfo> done) {
  if (draining_) return done(absl::UnavailableError("the daemon is draining"));
  if (bytes == 0 || bytes > kMaxArenaBytes) {
    return done(absl::InvalidArgumentError(
        fmt::format("bytes is {}, allowed are 1 to {}", bytes, kMaxArenaBytes)));
  }
  const size_t arenas = session.arenas.size() + session.in_flight;
  if (arenas >= options_.max_arenas_per_session) {
    CountRefused(Limit::kArenas);
    return done(absl::ResourceExhaustedError(
        fmt::format("session {} has {} arenas, the most there may be", session.id, arenas)));
  }
  const uint64_t rounded = (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
  KeptMemory taken{.memory = nullptr, .bytes = rounded};
  if (absl::Status full = TakeSharedBytes(session, taken); !full.ok()) return done(full);
  const ArenaId arena = session.next_arena++;
  ++session.in_flight;
  auto memory = std::make_shared<std::unique_ptr<gpu::DeviceMemory>>(std::move(taken.memory));
  memory_.Post([this, id = session.id, arena, memory, size = taken.bytes, done = std::move(done)] {
    const absl::Status made = MakeShared(*memory, size);
    auto fd = made.ok() ? (*memory)->Export() : absl::StatusOr<gpu::UniqueFd>(made);
    auto exported = std::make_shared<decltype(fd)>(std::move(fd));
    core_.Post([this, id, arena, size, memory, exported, done] {
      Session& owner = *sessions_.at(id);  // stays while an arena is in flight
      --owner.in_flight;
      if (!exported->ok() || owner.over) {
        FreeSharedMemory(std::move(*memory), owner, size);
        PublishStatus();  // a tick may have told of what was asked for
        FinishEnd(owner);
        if (!exported->ok()) return done(exported->status());
        return done(absl::UnauthenticatedError("the session is over"));
      }
      owner.attach->GrantArena(arena, size, (*exported)->get());
      owner.arenas[arena] = {.memory = std::move(*memory), .bytes = size};
      PublishStatus();
      done(ArenaInfo{.arena = arena, .bytes = size});
    });
  });
}

absl::StatusOr<const std::byte*> ServiceCore::ArenaBytes(const Session& session, ArenaId arena,
                                                         uint64_t offset, uint64_t bytes) const {
  const auto found = session.arenas.find(arena);
  if (found == session.arenas.end()) {
    return absl::NotFoundError(fmt::format("session {} has no arena {}", session.id, arena));
  }
  if (offset % kTensorAlignment != 0) {
    return absl::InvalidArgumentError(
        fmt::format("offset {} is not a multiple of {}", offset, kTensorAlignment));
  }
  if (offset > found->second.bytes || bytes > found->second.bytes - offset) {
    return absl::InvalidArgumentError(
        fmt::format("{} bytes at offset {} do not lie in arena {} of {}", bytes, offset, arena,
                    found->second.bytes));
  }
  return found->second.memory->data() + offset;
}

void ServiceCore::RecycleReturned(Session& session) {
  for (const PoolChunk chunk : std::exchange(session.returned, {})) {
    Recycle(chunk, session.account);
  }
}

void ServiceCore::Recycle(PoolChunk chunk, std::shared_ptr<HostAccount> account) {
  memory_.Post([this, chunk, account = std::move(account)] {
    const absl::Status cleaned = pool_->Clean(chunk);
    core_.Post([this, chunk, account, cleaned] {
      if (cleaned.ok()) {
        account->Recycle(chunk);
      } else {
        LogWarning("a chunk of host memory stays in quarantine; tried again every second",
                   {{"why", std::string(cleaned.message())}});
        unclean_.emplace_back(chunk, account);
      }
      PublishStatus();
    });
  });
}

void ServiceCore::RecycleUnclean() {
  for (auto& [chunk, account] : std::exchange(unclean_, {})) Recycle(chunk, std::move(account));
}

}  // namespace clusterkv::service
