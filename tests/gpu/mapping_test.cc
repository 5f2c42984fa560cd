#include "gpu/mapping.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "gpu/unique_fd.h"

namespace clusterkv::gpu {
namespace {

UniqueFd File(size_t bytes) {
  UniqueFd fd(memfd_create("mapping-test", MFD_CLOEXEC));
  EXPECT_EQ(ftruncate(fd.get(), static_cast<off_t>(bytes)), 0);
  return fd;
}

TEST(Mapping, TwoMappingsOfAFileShareItsBytes) {
  const UniqueFd fd = File(8192);
  auto writer = Mapping::Create(fd.get(), 8192, MapAccess::kReadWrite);
  auto reader = Mapping::Create(fd.get(), 8192, MapAccess::kReadOnly);
  ASSERT_TRUE(writer.ok() && reader.ok());
  std::memset(writer->data(), 0x5a, 8192);
  EXPECT_EQ(reader->data()[8191], std::byte{0x5a});
  EXPECT_EQ(reader->bytes(), 8192u);
}

TEST(Mapping, ShorterFileIsRefused) {
  const UniqueFd fd = File(4096);
  const absl::Status status = Mapping::Create(fd.get(), 4097, MapAccess::kReadOnly).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.ToString().find("4097"), std::string::npos) << status;
}

TEST(Mapping, NothingIsRefused) {
  const UniqueFd fd = File(4096);
  EXPECT_EQ(Mapping::Create(fd.get(), 0, MapAccess::kReadOnly).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(Mapping::Create(-1, 4096, MapAccess::kReadOnly).ok());
}

TEST(Mapping, ReadOnlyDescriptorCannotBeMappedForWriting) {
  const UniqueFd fd = File(4096);
  const std::string path = "/proc/self/fd/" + std::to_string(fd.get());
  const UniqueFd read_only(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(read_only.valid());
  EXPECT_TRUE(Mapping::Create(read_only.get(), 4096, MapAccess::kReadOnly).ok());
  EXPECT_EQ(Mapping::Create(read_only.get(), 4096, MapAccess::kReadWrite).status().code(),
            absl::StatusCode::kPermissionDenied);
}

TEST(Mapping, MoveTakesTheBytesAlong) {
  const UniqueFd fd = File(4096);
  auto created = Mapping::Create(fd.get(), 4096, MapAccess::kReadWrite);
  ASSERT_TRUE(created.ok());
  std::byte* const data = created->data();
  Mapping moved(*std::move(created));
  EXPECT_EQ(moved.data(), data);
  Mapping assigned;
  assigned = std::move(moved);
  EXPECT_EQ(assigned.data(), data);
  EXPECT_EQ(assigned.bytes(), 4096u);
  data[0] = std::byte{1};  // still mapped
}

TEST(Mapping, OutlivesTheDescriptor) {
  UniqueFd fd = File(4096);
  auto mapping = Mapping::Create(fd.get(), 4096, MapAccess::kReadWrite);
  ASSERT_TRUE(mapping.ok());
  fd.Reset();
  mapping->data()[4095] = std::byte{7};
  EXPECT_EQ(mapping->data()[4095], std::byte{7});
}

}  // namespace
}  // namespace clusterkv::gpu
