#include "service/host_pool.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>

#include "tests/service/temporary_pool.h"

namespace clusterkv::service {
namespace {

constexpr uint64_t kChunk = 64 << 10;

size_t FilesIn(const std::string& directory) {
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(directory)) ++files;
  return files;
}

void ExpectStatus(const HostPool& pool, uint64_t used, uint64_t reserved, uint64_t quarantined) {
  const HostPoolStatus status = pool.status();
  EXPECT_EQ(status.used_bytes, used * pool.chunk_bytes());
  EXPECT_EQ(status.reserved_bytes, reserved * pool.chunk_bytes());
  EXPECT_EQ(status.quarantined_bytes, quarantined * pool.chunk_bytes());
  EXPECT_EQ(status.free_bytes(),
            (pool.chunk_count() - used - reserved - quarantined) * pool.chunk_bytes());
}

TEST(HostPool, AllocatesWholeChunksInFull) {
  TemporaryDirectory directory;
  auto pool = HostPool::Create({.directory = directory.path() + "/new/pool",
                                .total_bytes = 3 * kChunk + kChunk / 2,
                                .chunk_bytes = kChunk});
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ((*pool)->chunk_count(), 3u);
  EXPECT_EQ((*pool)->chunk_bytes(), kChunk);
  EXPECT_EQ((*pool)->status().total_bytes, 3 * kChunk);
  ExpectStatus(**pool, 0, 0, 0);
  struct stat status = {};
  ASSERT_EQ(stat((directory.path() + "/new/pool").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0700u);
  for (PoolChunk chunk = 0; chunk < 3; ++chunk) {
    ASSERT_EQ(fstat((*pool)->read_only_fd(chunk), &status), 0);
    EXPECT_EQ(static_cast<uint64_t>(status.st_size), kChunk);
    EXPECT_GE(static_cast<uint64_t>(status.st_blocks) * 512, kChunk);
    EXPECT_EQ(status.st_mode & 0777, 0600u);
  }
}

TEST(HostPool, RefusesLessThanOneChunk) {
  TemporaryDirectory directory;
  for (const auto& [total, chunk] : {std::pair{kChunk - 1, kChunk}, {kChunk, uint64_t{0}}}) {
    const auto pool = HostPool::Create(
        {.directory = directory.path(), .total_bytes = total, .chunk_bytes = chunk});
    EXPECT_EQ(pool.status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(HostPool, DirectoryIsUsedByOnePoolAtATime) {
  TemporaryDirectory directory;
  const HostPoolOptions options{
      .directory = directory.path(), .total_bytes = kChunk, .chunk_bytes = kChunk};
  auto first = HostPool::Create(options);
  ASSERT_TRUE(first.ok()) << first.status();
  std::memset((*first)->data(0), 0x5a, kChunk);
  const auto second = HostPool::Create(options);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition) << second.status();
  // The one that was refused touched nothing.
  EXPECT_EQ((*first)->data(0)[kChunk - 1], std::byte{0x5a});
  EXPECT_EQ(FilesIn(directory.path()), 2u);  // the chunk and the lock
  first->reset();
  EXPECT_TRUE(HostPool::Create(options).ok());
}

TEST(HostPool, RemovesItsFilesAtTheEnd) {
  TemporaryDirectory directory;
  {
    auto pool = HostPool::Create(
        {.directory = directory.path(), .total_bytes = 4 * kChunk, .chunk_bytes = kChunk});
    ASSERT_TRUE(pool.ok()) << pool.status();
    EXPECT_EQ(FilesIn(directory.path()), 5u);
  }
  EXPECT_EQ(FilesIn(directory.path()), 1u);  // the lock
}

TEST(HostPool, RemovesChunksOfADeadDaemonAndNothingElse) {
  TemporaryDirectory directory;
  for (const char* name : {"chunk-000000.kv", "chunk-000099.kv", "notes.txt", "chunk-1.txt"}) {
    std::ofstream(directory.path() + "/" + name) << "left behind";
  }
  auto pool = HostPool::Create(
      {.directory = directory.path(), .total_bytes = kChunk, .chunk_bytes = kChunk});
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ((*pool)->data(0)[0], std::byte{0});
  EXPECT_FALSE(std::filesystem::exists(directory.path() + "/chunk-000099.kv"));
  EXPECT_TRUE(std::filesystem::exists(directory.path() + "/notes.txt"));
  EXPECT_TRUE(std::filesystem::exists(directory.path() + "/chunk-1.txt"));
}

TEST(HostPool, NoRoomIsResourceExhaustedAndLeavesNothing) {
  TemporaryDirectory directory;
  {
    FileSizeLimit limit(kChunk / 2);
    const auto pool = HostPool::Create(
        {.directory = directory.path(), .total_bytes = 2 * kChunk, .chunk_bytes = kChunk});
    EXPECT_EQ(pool.status().code(), absl::StatusCode::kResourceExhausted) << pool.status();
    EXPECT_THAT(std::string(pool.status().message()), testing::HasSubstr("chunk 1 of 2"));
  }
  EXPECT_EQ(FilesIn(directory.path()), 1u);
  EXPECT_TRUE(HostPool::Create(
                  {.directory = directory.path(), .total_bytes = 2 * kChunk, .chunk_bytes = kChunk})
                  .ok());
}

TEST(HostPool, DescriptorsThatGoOutCannotWrite) {
  TemporaryPool pool(1, kChunk);
  const int fd = pool->read_only_fd(0);
  EXPECT_EQ(fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
  EXPECT_NE(fcntl(fd, F_GETFD) & FD_CLOEXEC, 0);
  EXPECT_EQ(mmap(nullptr, kChunk, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), MAP_FAILED);
  void* const view = mmap(nullptr, kChunk, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(view, MAP_FAILED);
  pool->data(0)[100] = std::byte{7};
  EXPECT_EQ(static_cast<const std::byte*>(view)[100], std::byte{7});
  munmap(view, kChunk);
}

TEST(HostPool, FollowsAChunkThroughItsStates) {
  TemporaryPool pool(3, kChunk);
  ASSERT_TRUE(pool->Reserve(2).ok());
  ExpectStatus(*pool, 0, 2, 0);
  const auto reserved = pool->Lend(HostPool::Source::kReserved);
  ASSERT_TRUE(reserved.ok());
  ExpectStatus(*pool, 1, 1, 0);
  const auto free = pool->Lend(HostPool::Source::kFree);
  ASSERT_TRUE(free.ok());
  EXPECT_NE(*reserved, *free);
  ExpectStatus(*pool, 2, 1, 0);
  pool->Quarantine(*reserved);
  ExpectStatus(*pool, 1, 1, 1);
  ASSERT_TRUE(pool->Clean(*reserved).ok());
  pool->Recycle(*reserved);
  ExpectStatus(*pool, 1, 1, 0);
  pool->Unreserve(1);
  pool->Quarantine(*free);
  pool->Recycle(*free);
  ExpectStatus(*pool, 0, 0, 0);
}

TEST(HostPool, WhatIsReservedIsNotLentToOthers) {
  TemporaryPool pool(2, kChunk);
  ASSERT_TRUE(pool->Reserve(2).ok());
  EXPECT_EQ(pool->Lend(HostPool::Source::kFree).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(pool->Reserve(1).code(), absl::StatusCode::kResourceExhausted);
  ExpectStatus(*pool, 0, 2, 0);
  EXPECT_TRUE(pool->Lend(HostPool::Source::kReserved).ok());
  pool->Unreserve(1);
  EXPECT_TRUE(pool->Lend(HostPool::Source::kFree).ok());
}

TEST(HostPool, WhatIsQuarantinedIsNotThereForAnyone) {
  TemporaryPool pool(1, kChunk);
  const PoolChunk chunk = *pool->Lend(HostPool::Source::kFree);
  pool->Quarantine(chunk);
  const absl::Status full = pool->Reserve(1);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()),
              testing::AllOf(testing::HasSubstr("1 quarantined"),
                             testing::HasSubstr(std::to_string(kChunk) + " bytes are in quarantine "
                                                                         "and will be free soon")));
  pool->Recycle(chunk);
  EXPECT_TRUE(pool->Reserve(1).ok());
  EXPECT_THAT(std::string(pool->Reserve(1).message()),
              testing::Not(testing::HasSubstr("in quarantine")));
}

TEST(HostPool, ReservingMoreThanThereIsTakesNothing) {
  TemporaryPool pool(2, kChunk);
  EXPECT_EQ(pool->Reserve(3).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(pool->Reserve(~0u).code(), absl::StatusCode::kResourceExhausted);
  ExpectStatus(*pool, 0, 0, 0);
}

// Of a worker that said that it had unmapped the chunk, and lied.
TEST(HostPool, WhoStillMapsAChunkOfOldSeesNothingOfTheNewOne) {
  TemporaryDirectory directory;
  const auto created = HostPool::Create({.directory = directory.path(),
                                         .total_bytes = 2 * kChunk,
                                         .chunk_bytes = kChunk,
                                         .new_files = true});
  ASSERT_TRUE(created.ok()) << created.status();
  HostPool& pool = **created;
  const PoolChunk chunk = *pool.Lend(HostPool::Source::kFree);
  std::memset(pool.data(chunk), 0x11, kChunk);
  std::memset(pool.data(1 - chunk), 0x22, kChunk);
  const gpu::UniqueFd kept(dup(pool.read_only_fd(chunk)));
  void* const view = mmap(nullptr, kChunk, PROT_READ, MAP_SHARED, kept.get(), 0);
  ASSERT_NE(view, MAP_FAILED);
  ASSERT_EQ(*static_cast<const char*>(view), 0x11);
  pool.Quarantine(chunk);
  ASSERT_TRUE(pool.Clean(chunk).ok());
  pool.Recycle(chunk);
  ASSERT_EQ(*pool.Lend(HostPool::Source::kFree), chunk);
  EXPECT_TRUE(std::all_of(pool.data(chunk), pool.data(chunk) + kChunk,
                          [](std::byte byte) { return byte == std::byte{0}; }));
  std::memset(pool.data(chunk), 0x33, kChunk);
  struct stat old_file = {}, new_file = {};
  ASSERT_EQ(fstat(kept.get(), &old_file), 0);
  ASSERT_EQ(fstat(pool.read_only_fd(chunk), &new_file), 0);
  EXPECT_EQ(old_file.st_size, 0);
  EXPECT_EQ(old_file.st_blocks, 0);
  EXPECT_GE(static_cast<uint64_t>(new_file.st_blocks) * 512, kChunk);
  EXPECT_EQ(new_file.st_mode & 0777, 0600u);
  char read = 0;
  EXPECT_EQ(pread(pool.read_only_fd(chunk), &read, 1, 100), 1);
  EXPECT_EQ(read, 0x33);
  munmap(view, kChunk);
  EXPECT_EQ(pool.data(1 - chunk)[kChunk - 1], std::byte{0x22});
  EXPECT_EQ(FilesIn(directory.path()), 3u);  // the lock is one
}

TEST(HostPool, ANewFileThatThereIsNoRoomForCanBeHadLater) {
  TemporaryDirectory directory;
  const auto created = HostPool::Create({.directory = directory.path(),
                                         .total_bytes = kChunk,
                                         .chunk_bytes = kChunk,
                                         .new_files = true});
  ASSERT_TRUE(created.ok()) << created.status();
  HostPool& pool = **created;
  const PoolChunk chunk = *pool.Lend(HostPool::Source::kFree);
  pool.Quarantine(chunk);
  {
    const FileSizeLimit limit(kChunk / 2);
    for (int i = 0; i < 2; ++i) {
      EXPECT_EQ(pool.Clean(chunk).code(), absl::StatusCode::kResourceExhausted);
    }
  }
  ExpectStatus(pool, 0, 0, 1);
  ASSERT_TRUE(pool.Clean(chunk).ok());
  pool.Recycle(chunk);
  const PoolChunk again = *pool.Lend(HostPool::Source::kFree);
  std::memset(pool.data(again), 0x44, kChunk);
}

TEST(HostPool, CleanClearsAllOfAChunk) {
  TemporaryPool pool(2, kChunk);
  const PoolChunk chunk = *pool->Lend(HostPool::Source::kFree);
  std::memset(pool->data(0), 0x11, kChunk);
  std::memset(pool->data(1), 0x11, kChunk);
  pool->Quarantine(chunk);
  ASSERT_TRUE(pool->Clean(chunk).ok());
  const auto is = [&](PoolChunk which, std::byte value) {
    return std::all_of(pool->data(which), pool->data(which) + kChunk,
                       [value](std::byte byte) { return byte == value; });
  };
  EXPECT_TRUE(is(chunk, std::byte{0}));
  EXPECT_TRUE(is(1 - chunk, std::byte{0x11}));
}

}  // namespace
}  // namespace clusterkv::service
