#include "service/host_pool.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <thread>
#include <utility>

#include "gpu/status_macros.h"
#include "service/logging.h"
#include "service/numa_policy.h"

namespace clusterkv::service {
namespace {

constexpr char kChunkPrefix[] = "chunk-";
constexpr char kChunkSuffix[] = ".kv";

bool IsChunkFile(const std::string& name) {
  return name.starts_with(kChunkPrefix) && name.ends_with(kChunkSuffix);
}

absl::Status FromErrno(int error, const std::string& what) {
  return absl::ErrnoToStatus(error, what.c_str());
}

absl::StatusOr<gpu::UniqueFd> LockDirectory(const std::string& directory) {
  const std::string path = directory + "/lock";
  gpu::UniqueFd lock(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock.valid()) return FromErrno(errno, "host-memory-dir: cannot open " + path);
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        fmt::format("host-memory-dir: {} is used by another daemon", directory));
  }
  return lock;
}

// Chunks of a daemon that died: their content belongs to nobody.
void RemoveStaleChunks(const std::string& directory) {
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    if (IsChunkFile(entry.path().filename().string())) {
      std::filesystem::remove(entry.path(), ignored);
    }
  }
}

}  // namespace

HostPool::HostPool(gpu::UniqueFd lock, const HostPoolOptions& options)
    : lock_(std::move(lock)),
      chunk_bytes_(options.chunk_bytes),
      new_files_(options.new_files),
      numa_node_(options.numa_node),
      device_(options.device) {}

absl::StatusOr<std::unique_ptr<HostPool>> HostPool::Create(const HostPoolOptions& options) {
  if (options.chunk_bytes == 0 || options.total_bytes < options.chunk_bytes) {
    return absl::InvalidArgumentError(
        fmt::format("host-memory {} is below one host-chunk of {} bytes", options.total_bytes,
                    options.chunk_bytes));
  }
  std::error_code error;
  std::filesystem::create_directories(options.directory, error);
  if (error) {
    return FromErrno(error.value(), "host-memory-dir: cannot create " + options.directory);
  }
  if (chmod(options.directory.c_str(), 0700) != 0) {
    return FromErrno(errno, "host-memory-dir: cannot set 0700 on " + options.directory);
  }
  CKV_ASSIGN_OR_RETURN(gpu::UniqueFd lock, LockDirectory(options.directory));
  RemoveStaleChunks(options.directory);

  auto pool = std::unique_ptr<HostPool>(new HostPool(std::move(lock), options));
  CKV_RETURN_IF_ERROR(pool->AddChunks(options));
  if (options.device != nullptr) CKV_RETURN_IF_ERROR(pool->PinChunks());
  // Lowest ordinals first.
  for (uint32_t i = pool->chunk_count(); i > 0; --i) pool->free_.push_back(i - 1);
  return pool;
}

absl::Status HostPool::AddChunks(const HostPoolOptions& options) {
  std::unique_ptr<PreferredNode> preferred;
  if (options.numa_node) {
    // Not an error: a container's seccomp profile may forbid it, and the memory serves all the
    // same.
    auto set = PreferredNode::Create(*options.numa_node);
    if (set.ok()) {
      preferred = *std::move(set);
    } else {
      LogWarning("cannot choose the NUMA node of host memory",
                 {{"why", std::string(set.status().message())}});
    }
  }
  const uint64_t count = options.total_bytes / options.chunk_bytes;
  for (uint64_t i = 0; i < count; ++i) {
    Chunk& chunk = chunks_.emplace_back();  // from here on the destructor removes the file
    chunk.path = fmt::format("{}/{}{:06}{}", options.directory, kChunkPrefix, i, kChunkSuffix);
    absl::Status added = MakeFile(chunk);
    if (!added.ok()) {
      return absl::Status(
          added.code(), fmt::format("{} (chunk {} of {} of {} bytes)", std::string(added.message()),
                                    i + 1, count, options.chunk_bytes));
    }
  }
  if (preferred != nullptr) ReportNode(*options.numa_node);
  return absl::OkStatus();
}

// By the last page of each chunk: a node that had no more room when it was taken gave no part of
// the chunks after it.
void HostPool::ReportNode(int node) const {
  const auto there = std::ranges::count_if(chunks_, [&](const Chunk& chunk) {
    const auto found = NodeOfPage(chunk.mapping.data() + chunk_bytes_ - 1);
    return found.ok() && *found == node;
  });
  LogInfo("host memory is taken from one NUMA node",
          {{"node", node}, {"chunks_there", there}, {"of", chunks_.size()}});
  if (static_cast<size_t>(there) < chunks_.size()) {
    LogWarning("the NUMA node has too little room: part of the host memory lies on another",
               {{"node", node}, {"chunks_elsewhere", chunks_.size() - static_cast<size_t>(there)}});
  }
}

absl::Status HostPool::MakeFile(Chunk& chunk) const {
  const std::string& path = chunk.path;
  gpu::UniqueFd fd(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd.valid()) return FromErrno(errno, "host-memory-dir: cannot create " + path);
  // Pages are taken now: a sparse file on a full tmpfs would end in SIGBUS much later.
  if (const int failed = posix_fallocate(fd.get(), 0, static_cast<off_t>(chunk_bytes_))) {
    const std::string what = "host-memory: no room for " + path;
    if (failed == ENOSPC || failed == ENOMEM || failed == EDQUOT || failed == EFBIG) {
      return absl::ResourceExhaustedError(fmt::format("{}: {}", what, std::strerror(failed)));
    }
    return FromErrno(failed, what);
  }
  CKV_ASSIGN_OR_RETURN(chunk.mapping,
                       gpu::Mapping::Create(fd.get(), chunk_bytes_, gpu::MapAccess::kReadWrite));
  chunk.read_only = gpu::UniqueFd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!chunk.read_only.valid()) return FromErrno(errno, "cannot reopen " + path);
  return absl::OkStatus();
}

absl::Status HostPool::Pin(Chunk& chunk) const {
  if (device_ == nullptr) return absl::OkStatus();
  CKV_ASSIGN_OR_RETURN(chunk.registration, device_->RegisterHost(chunk.mapping.data(), chunk_bytes_,
                                                                 gpu::MapAccess::kReadWrite));
  return absl::OkStatus();
}

// Its pages go at once, whoever has it open or mapped; to touch it there is SIGBUS from then on.
absl::Status HostPool::GiveUpFile(Chunk& chunk) {
  if (truncate(chunk.path.c_str(), 0) != 0 && errno != ENOENT) {
    return FromErrno(errno, "host-memory-dir: cannot cut " + chunk.path);
  }
  chunk.registration.reset();
  chunk.mapping = gpu::Mapping();
  chunk.read_only.Reset();
  if (unlink(chunk.path.c_str()) != 0 && errno != ENOENT) {
    return FromErrno(errno, "host-memory-dir: cannot remove " + chunk.path);
  }
  return absl::OkStatus();
}

absl::Status HostPool::Renew(Chunk& chunk) const {
  // Also what a failure has left half done.
  CKV_RETURN_IF_ERROR(GiveUpFile(chunk));
  std::unique_ptr<PreferredNode> preferred;
  if (numa_node_) {  // where that is forbidden the log says so since the start
    auto set = PreferredNode::Create(*numa_node_);
    if (set.ok()) preferred = *std::move(set);
  }
  CKV_RETURN_IF_ERROR(MakeFile(chunk));
  return Pin(chunk);
}

// By several threads: pinning in one call takes twice as long, and one of hundreds of GB has
// stalled whole nodes (design D9).
absl::Status HostPool::PinChunks() {
  constexpr size_t kThreads = 8;
  const auto start = std::chrono::steady_clock::now();
  std::atomic<size_t> next{0}, done{0};
  std::mutex mutex;
  absl::Status first_error;  // guarded by mutex
  const auto pin = [&] {
    for (size_t i = next++; i < chunks_.size(); i = next++) {
      if (const absl::Status failed = Pin(chunks_[i]); !failed.ok()) {
        const std::lock_guard lock(mutex);
        if (first_error.ok()) first_error = failed;
        return;
      }
      const size_t pinned = ++done;
      if (pinned % 64 == 0) {
        LogInfo("pinning host memory", {{"chunks", pinned}, {"of", chunks_.size()}});
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(kThreads, chunks_.size()); ++i) threads.emplace_back(pin);
  pin();
  for (std::thread& thread : threads) thread.join();
  CKV_RETURN_IF_ERROR(first_error);
  pinned_ = !device_->computes_on_host_memory();
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  LogInfo("host memory ready",
          {{"bytes", chunks_.size() * chunk_bytes_}, {"seconds", fmt::format("{:.2f}", seconds)}});
  return absl::OkStatus();
}

HostPool::~HostPool() {
  for (const Chunk& chunk : chunks_) unlink(chunk.path.c_str());
}

absl::Status HostPool::Reserve(uint32_t chunks) {
  const uint32_t available = available_chunks();
  if (chunks > available) {
    // What has just been released is on its way back: the caller may try again.
    const std::string hope = quarantined_ == 0
                                 ? ""
                                 : fmt::format(
                                       "; {} bytes are in quarantine and will be free soon, once "
                                       "the workers that had them have unmapped them",
                                       quarantined_ * chunk_bytes_);
    return absl::ResourceExhaustedError(fmt::format(
        "host pool: {} chunks of {} bytes asked for, {} of {} free ({} lent, {} reserved, {} "
        "quarantined){}",
        chunks, chunk_bytes_, available, chunk_count(), lent_, reserved_, quarantined_, hope));
  }
  reserved_ += chunks;
  return absl::OkStatus();
}

void HostPool::Unreserve(uint32_t chunks) { reserved_ -= chunks; }

absl::StatusOr<PoolChunk> HostPool::Lend(Source source) {
  if (source == Source::kFree) {
    CKV_RETURN_IF_ERROR(Reserve(1));
  }
  --reserved_;
  const PoolChunk chunk = free_.back();
  free_.pop_back();
  chunks_[chunk].state = State::kLent;
  ++lent_;
  return chunk;
}

void HostPool::Quarantine(PoolChunk chunk) {
  chunks_[chunk].state = State::kQuarantined;
  --lent_;
  ++quarantined_;
}

absl::Status HostPool::Clean(PoolChunk chunk) {
  if (new_files_) return Renew(chunks_[chunk]);
  std::memset(data(chunk), 0, chunk_bytes_);
  return absl::OkStatus();
}

void HostPool::Recycle(PoolChunk chunk) {
  chunks_[chunk].state = State::kFree;
  --quarantined_;
  free_.push_back(chunk);
}

HostPoolStatus HostPool::status() const {
  return {.total_bytes = chunk_count() * chunk_bytes_,
          .used_bytes = lent_ * chunk_bytes_,
          .reserved_bytes = reserved_ * chunk_bytes_,
          .quarantined_bytes = quarantined_ * chunk_bytes_,
          .pinned_bytes = pinned_ ? chunk_count() * chunk_bytes_ : 0,
          .chunk_bytes = chunk_bytes_};
}

}  // namespace clusterkv::service
