#include "gpu/host/host_memory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <string>
#include <utility>

namespace clusterkv::gpu::host {
namespace {

constexpr size_t kBytes = 1'000'003;  // not whole pages

bool IsZero(const DeviceMemory& memory) {
  return std::all_of(memory.data(), memory.data() + memory.bytes(),
                     [](std::byte byte) { return byte == std::byte{0}; });
}

TEST(HostMemory, PrivateIsZeroedAndNotExportable) {
  const auto memory = HostMemory::Allocate(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ((*memory)->bytes(), kBytes);
  EXPECT_TRUE(IsZero(**memory));
  EXPECT_EQ((*memory)->Export().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(HostMemory, SharedIsZeroedAndFullyAllocated) {
  const auto memory = HostMemory::AllocateShared(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_TRUE(IsZero(**memory));
  const auto fd = (*memory)->Export();
  ASSERT_TRUE(fd.ok()) << fd.status();
  struct stat status = {};
  ASSERT_EQ(fstat(fd->get(), &status), 0);
  EXPECT_EQ(static_cast<size_t>(status.st_size), kBytes);
  EXPECT_GE(static_cast<size_t>(status.st_blocks) * 512, kBytes);
}

TEST(HostMemory, ImportSeesTheExportersBytesBothWays) {
  const auto memory = HostMemory::AllocateShared(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto import = HostMemory::Import(*(*memory)->Export(), kBytes);
  ASSERT_TRUE(import.ok()) << import.status();
  (*memory)->data()[kBytes - 1] = std::byte{3};
  EXPECT_EQ((*import)->data()[kBytes - 1], std::byte{3});
  (*import)->data()[0] = std::byte{4};
  EXPECT_EQ((*memory)->data()[0], std::byte{4});
}

TEST(HostMemory, AnotherProcessWritesIntoIt) {
  const auto memory = HostMemory::AllocateShared(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const pid_t child = fork();
  if (child == 0) {
    std::memset((*memory)->data(), 0x11, kBytes);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  EXPECT_EQ((*memory)->data()[kBytes / 2], std::byte{0x11});
}

TEST(HostMemory, ImportOutlivesTheExporter) {
  auto memory = HostMemory::AllocateShared(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto import = HostMemory::Import(*(*memory)->Export(), kBytes);
  ASSERT_TRUE(import.ok()) << import.status();
  (*memory)->data()[5] = std::byte{9};
  memory->reset();
  EXPECT_EQ((*import)->data()[5], std::byte{9});
}

TEST(HostMemory, IsZeroedAgain) {
  const auto memory = HostMemory::AllocateShared(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  std::memset((*memory)->data(), 0x11, kBytes);
  ASSERT_TRUE((*memory)->Clear().ok());
  EXPECT_EQ((*memory)->data()[0], std::byte{0});
  EXPECT_EQ((*memory)->data()[kBytes - 1], std::byte{0});
}

TEST(HostMemory, NoHolderCanChangeTheSize) {
  const auto memory = HostMemory::AllocateShared(kBytes);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto fd = (*memory)->Export();
  ASSERT_TRUE(fd.ok()) << fd.status();
  EXPECT_NE(ftruncate(fd->get(), 0), 0);
  EXPECT_NE(ftruncate(fd->get(), 2 * kBytes), 0);
  EXPECT_EQ(fcntl(fd->get(), F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(fcntl(fd->get(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST(HostMemory, ImportBeyondTheEndIsRefused) {
  const auto memory = HostMemory::AllocateShared(4096);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(HostMemory::Import(*(*memory)->Export(), 4097).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(HostMemory::Import(UniqueFd(), 4096).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(HostMemory, ImportIsNotExportable) {
  const auto memory = HostMemory::AllocateShared(4096);
  ASSERT_TRUE(memory.ok()) << memory.status();
  const auto import = HostMemory::Import(*(*memory)->Export(), 4096);
  ASSERT_TRUE(import.ok()) << import.status();
  EXPECT_EQ((*import)->Export().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(HostMemory, ImpossibleSizesAreTypedErrors) {
  EXPECT_EQ(HostMemory::Allocate(0).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(HostMemory::AllocateShared(0).status().code(), absl::StatusCode::kInvalidArgument);
  const size_t huge = size_t{1} << 62;
  EXPECT_EQ(HostMemory::Allocate(huge).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(HostMemory::Allocate(~size_t{0}).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(HostMemory::AllocateShared(~size_t{0}).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(HostMemory, MoreThanIsAvailableIsRefusedBeforeItIsTaken) {
  // Should it be taken after all, files end here, and not the machine's memory.
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit low = before;
  low.rlim_cur = size_t{1} << 28;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  const size_t a_pebibyte = size_t{1} << 50;
  for (const auto& refused : {HostMemory::AllocateShared(a_pebibyte).status(),
                              HostMemory::Allocate(a_pebibyte).status()}) {
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(refused.ToString().find("are available"), std::string::npos) << refused;
  }
  signal(SIGXFSZ, old_handler);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
}

}  // namespace
}  // namespace clusterkv::gpu::host
