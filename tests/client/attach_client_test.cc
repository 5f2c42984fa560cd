#include "client/attach_client.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <future>

#include "gpu/device.h"
#include "tests/client/fake_daemon.h"

namespace clusterkv::client {
namespace {

constexpr size_t kChunkBytes = 8192;

gpu::UniqueFd File(size_t bytes, char fill) {
  gpu::UniqueFd fd(memfd_create("test", MFD_CLOEXEC));
  const std::string content(bytes, fill);
  EXPECT_EQ(write(fd.get(), content.data(), bytes), static_cast<ssize_t>(bytes));
  return fd;
}

v1::AttachEvent Granted(uint32_t chunk, uint64_t bytes = kChunkBytes) {
  v1::AttachEvent event;
  event.mutable_chunk_granted()->set_chunk_index(chunk);
  event.mutable_chunk_granted()->set_bytes(bytes);
  return event;
}

class AttachClientTest : public testing::Test {
 protected:
  using Result = absl::StatusOr<std::unique_ptr<AttachClient>>;

  AttachClientTest() : device_(*gpu::CreateDevice({.backend = "host", .threads = 1})) {}

  std::future<Result> StartConnecting(absl::Duration timeout = absl::Seconds(30)) {
    return std::async(std::launch::async, [this, timeout] {
      return AttachClient::Create(
          {.path = daemon_.path(),
           .session_token = "0123456789abcdef",
           .boot_epoch = 7,
           .device = device_.get(),
           .on_lost = [this](const absl::Status& why) { lost_.set_value(why); }},
          Deadline(timeout));
    });
  }

  void TearDown() override { daemon_.Close(); }

  // Connects and attaches.
  void Attach() {
    auto connecting = StartConnecting();
    daemon_.Accept();
    ASSERT_TRUE(daemon_.Receive()->has_hello());
    v1::AttachEvent attached;
    attached.mutable_attached();
    daemon_.Send(attached);
    Result client = connecting.get();
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }

  absl::Status Lost() {
    auto future = lost_.get_future();
    if (future.wait_for(std::chrono::seconds(30)) != std::future_status::ready) {
      return absl::OkStatus();
    }
    return future.get();
  }

  // Closes the client, and the daemon's end after its goodbye.
  void SayGoodbye() {
    auto closing = std::async(std::launch::async, [this] { client_->Close(); });
    const auto goodbye = daemon_.Receive();
    EXPECT_TRUE(goodbye.has_value() && goodbye->has_goodbye());
    EXPECT_FALSE(daemon_.Receive().has_value());
    daemon_.Close();
    closing.get();
  }

  FakeDaemon daemon_;
  std::unique_ptr<gpu::Device> device_;
  std::promise<absl::Status> lost_;
  std::unique_ptr<AttachClient> client_;
};

TEST_F(AttachClientTest, PresentsTokenAndLockedLifeline) {
  auto connecting = StartConnecting();
  daemon_.Accept();
  gpu::UniqueFd lifeline;
  const auto hello = daemon_.Receive(&lifeline);
  ASSERT_TRUE(hello.has_value() && hello->has_hello());
  EXPECT_EQ(hello->hello().session_token(), "0123456789abcdef");
  EXPECT_EQ(hello->hello().boot_epoch(), 7u);
  ASSERT_TRUE(lifeline.valid());
  // Asked from another process, the lock is there: that of this one.
  const pid_t other = fork();
  if (other == 0) {
    struct flock lock = {};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    const bool held = fcntl(lifeline.get(), F_GETLK, &lock) == 0 && lock.l_type == F_WRLCK;
    _exit(held ? 0 : 1);
  }
  int exit_status = -1;
  ASSERT_EQ(waitpid(other, &exit_status, 0), other);
  EXPECT_EQ(exit_status, 0);
  lifeline.Release();  // closing it here, in the same process, would drop the lock
  v1::AttachEvent attached;
  attached.mutable_attached();
  daemon_.Send(attached);
  EXPECT_TRUE(connecting.get().ok());
}

TEST_F(AttachClientTest, ReportsWhyItWasRejected) {
  auto connecting = StartConnecting();
  daemon_.Accept();
  daemon_.Receive();
  v1::AttachEvent rejected;
  rejected.mutable_rejected()->set_code(7);
  rejected.mutable_rejected()->set_message("uid 12");
  daemon_.Send(rejected);
  EXPECT_EQ(connecting.get().status(), absl::PermissionDeniedError("attach: uid 12"));
}

TEST_F(AttachClientTest, GivesUpWithoutAnswer) {
  auto connecting = StartConnecting(absl::Milliseconds(50));
  daemon_.Accept();
  EXPECT_TRUE(absl::IsDeadlineExceeded(connecting.get().status()));
}

TEST_F(AttachClientTest, IsUnavailableWhereNobodyListens) {
  const Result client = AttachClient::Create({.path = daemon_.path() + "-none",
                                              .session_token = {},
                                              .boot_epoch = 0,
                                              .device = device_.get(),
                                              .on_lost = {}},
                                             Deadline(absl::Seconds(5)));
  EXPECT_TRUE(absl::IsUnavailable(client.status())) << client.status();
}

TEST_F(AttachClientTest, MapsArenasReadWrite) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  const gpu::UniqueFd file = File(4096, 'a');
  v1::AttachEvent event;
  event.mutable_arena_granted()->set_arena_id(3);
  event.mutable_arena_granted()->set_bytes(4096);
  daemon_.Send(event, {file.get()});
  const auto arena = client_->WaitForArena(3, 4096, Deadline(absl::Seconds(30)));
  ASSERT_TRUE(arena.ok()) << arena.status();
  EXPECT_EQ((*arena)->data()[4095], std::byte{'a'});
  (*arena)->data()[0] = std::byte{'w'};
  char written = 0;
  ASSERT_EQ(pread(file.get(), &written, 1, 0), 1);
  EXPECT_EQ(written, 'w');
  EXPECT_TRUE(
      absl::IsInternal(client_->WaitForArena(3, 4097, Deadline(absl::Seconds(30))).status()));
  SayGoodbye();
}

TEST_F(AttachClientTest, WaitForArenaHasADeadline) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      client_->WaitForArena(9, 1, Deadline(absl::Milliseconds(20))).status()));
  SayGoodbye();
}

TEST_F(AttachClientTest, RevokedArenaStaysMappedForWhoHoldsIt) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  v1::AttachEvent event;
  event.mutable_arena_granted()->set_arena_id(1);
  event.mutable_arena_granted()->set_bytes(4096);
  daemon_.Send(event, {File(4096, 'a').get()});
  const auto arena = client_->WaitForArena(1, 4096, Deadline(absl::Seconds(30)));
  ASSERT_TRUE(arena.ok());
  event.mutable_arena_revoked()->set_arena_id(1);
  daemon_.Send(event);
  daemon_.Send(Granted(0), {File(kChunkBytes, 'c').get()});
  ASSERT_TRUE(daemon_.Receive()->has_chunk_mapped());  // so the revocation was handled
  EXPECT_EQ((*arena)->data()[0], std::byte{'a'});
  EXPECT_FALSE(client_->WaitForArena(1, 1, Deadline(absl::ZeroDuration())).ok());
  SayGoodbye();
}

TEST_F(AttachClientTest, MapsAndUnmapsChunksAndSaysSo) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  daemon_.Send(Granted(5), {File(kChunkBytes, 'c').get()});
  auto answer = daemon_.Receive();
  ASSERT_TRUE(answer.has_value() && answer->has_chunk_mapped());
  EXPECT_EQ(answer->chunk_mapped().chunk_index(), 5u);
  const std::byte* const base = client_->chunk_bases()[5];
  ASSERT_NE(base, nullptr);
  EXPECT_EQ(base[kChunkBytes - 1], std::byte{'c'});
  v1::AttachEvent event;
  event.mutable_chunk_revoked()->set_chunk_index(5);
  daemon_.Send(event);
  answer = daemon_.Receive();
  ASSERT_TRUE(answer.has_value() && answer->has_chunk_unmapped());
  EXPECT_EQ(answer->chunk_unmapped().chunk_index(), 5u);
  EXPECT_EQ(client_->chunk_bases()[5], nullptr);
  SayGoodbye();
}

TEST_F(AttachClientTest, MapsAChunkThatIsOpenForReadingOnly) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  const gpu::UniqueFd file = File(kChunkBytes, 'r');
  const std::string name = "/proc/self/fd/" + std::to_string(file.get());
  const gpu::UniqueFd read_only(open(name.c_str(), O_RDONLY | O_CLOEXEC));
  daemon_.Send(Granted(0), {read_only.get()});
  ASSERT_TRUE(daemon_.Receive()->has_chunk_mapped());
  EXPECT_EQ(client_->chunk_bases()[0][0], std::byte{'r'});
  SayGoodbye();
}

TEST_F(AttachClientTest, GoodbyeArrivesAlthoughPacketsLieUnread) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  v1::AttachEvent event;
  event.mutable_arena_revoked()->set_arena_id(1);
  for (int i = 0; i < 20; ++i) daemon_.Send(event);
  SayGoodbye();
}

// What no daemon of the protocol sends ends the connection, with a reason.
TEST_F(AttachClientTest, ChunkShorterThanSaidEndsTheConnection) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  daemon_.Send(Granted(0, kChunkBytes + 1), {File(kChunkBytes, 'c').get()});
  EXPECT_TRUE(absl::IsInvalidArgument(Lost()));
  EXPECT_EQ(client_->chunk_bases()[0], nullptr);
}

TEST_F(AttachClientTest, ChunkBeyondTheTableEndsTheConnection) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  daemon_.Send(Granted(AttachClient::kMaxChunks), {File(kChunkBytes, 'c').get()});
  EXPECT_TRUE(absl::IsInternal(Lost()));
}

TEST_F(AttachClientTest, ChunkGrantedTwiceEndsTheConnection) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  daemon_.Send(Granted(0), {File(kChunkBytes, 'c').get()});
  daemon_.Send(Granted(0), {File(kChunkBytes, 'c').get()});
  EXPECT_TRUE(absl::IsInternal(Lost()));
}

TEST_F(AttachClientTest, GrantWithoutDescriptorEndsTheConnection) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  daemon_.Send(Granted(0));
  EXPECT_FALSE(Lost().ok());
}

TEST_F(AttachClientTest, TwoDescriptorsEndTheConnection) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  const gpu::UniqueFd file = File(kChunkBytes, 'c');
  daemon_.Send(Granted(0), {file.get(), file.get()});
  EXPECT_TRUE(absl::IsInternal(Lost()));
}

TEST_F(AttachClientTest, NonsenseEndsTheConnection) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  daemon_.SendBytes("\xff\xff\xff");
  EXPECT_TRUE(absl::IsInternal(Lost()));
}

TEST_F(AttachClientTest, DaemonsEndIsUnavailableToWaiters) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  auto waiting = std::async(std::launch::async, [this] {
    return client_->WaitForArena(1, 1, Deadline(absl::Seconds(30))).status();
  });
  daemon_.Close();
  EXPECT_TRUE(absl::IsUnavailable(waiting.get()));
  EXPECT_TRUE(absl::IsUnavailable(Lost()));
}

TEST_F(AttachClientTest, FailEndsWaits) {
  ASSERT_NO_FATAL_FAILURE(Attach());
  client_->Fail(absl::UnavailableError("session over"));
  EXPECT_EQ(client_->WaitForArena(1, 1, Deadline(absl::Seconds(30))).status(),
            absl::UnavailableError("session over"));
  SayGoodbye();
}

}  // namespace
}  // namespace clusterkv::client
