#include "tests/service/core_fixture.h"

#include <chrono>
#include <cstring>

#include "gpu/host/host_device.h"

namespace clusterkv::service {
namespace {

constexpr auto kLimit = std::chrono::seconds(60);
constexpr uint32_t kHeadDim = 64;

// fp16 values of magnitude 0.5 to 1.
std::string Halves(size_t count, uint32_t seed) {
  std::string bytes(count * 2, '\0');
  for (size_t i = 0; i < count; ++i) {
    seed = seed * 1664525 + 1013904223;
    const auto half = static_cast<uint16_t>(0x3800 | ((seed >> 16) & 0x83ff));
    std::memcpy(bytes.data() + 2 * i, &half, sizeof(half));
  }
  return bytes;
}

}  // namespace

void FakeWorker::Tell(const std::function<void(Told&)>& change) {
  {
    std::lock_guard lock(mu_);
    change(told_);
  }
  changed_.notify_all();
}

void FakeWorker::CreditReturned(ArenaId, uint64_t offset, uint64_t) {
  Tell([&](Told& told) {
    ++told.credits[offset];
    ++told.credit_count;
  });
}

void FakeWorker::SegmentPublished(SequenceId sequence, PublishedInfo info) {
  Tell([&](Told& told) { told.published[sequence] = info; });
}

void FakeWorker::SequenceFailed(SequenceId sequence, const absl::Status& why) {
  Tell([&](Told& told) { told.failed[sequence] = why; });
}

void FakeWorker::Draining(uint64_t) {
  Tell([](Told& told) { ++told.draining; });
}

void FakeWorker::Ended(const absl::Status& why) {
  Tell([&](Told& told) { told.ended.push_back(why); });
}

void FakeWorker::GrantArena(ArenaId arena, uint64_t bytes, int fd) {
  auto mapping = gpu::Mapping::Create(fd, bytes, gpu::MapAccess::kReadWrite);
  if (!mapping.ok()) std::abort();
  Tell([&](Told& told) {
    told.arenas[arena] = std::make_shared<gpu::Mapping>(*std::move(mapping));
  });
}

void FakeWorker::RevokeArena(ArenaId arena) {
  Tell([&](Told& told) {
    told.arenas.erase(arena);
    told.revoked_arenas.insert(arena);
  });
}

void FakeWorker::GrantChunk(uint32_t chunk, uint64_t, int) {
  Tell([&](Told& told) { told.chunks.insert(chunk); });
  if (maps_chunks) core_.ChunkMapped(session, chunk);
}

void FakeWorker::RevokeChunk(uint32_t chunk) {
  Tell([&](Told& told) {
    told.chunks.erase(chunk);
    told.revoked_chunks.insert(chunk);
  });
  if (unmaps_chunks) core_.ChunkUnmapped(session, chunk);
}

void FakeWorker::SessionEnded() {
  Tell([](Told& told) { ++told.session_ended; });
}

testing::AssertionResult FakeWorker::Await(const std::function<bool(const Told&)>& condition) {
  std::unique_lock lock(mu_);
  if (changed_.wait_for(lock, kLimit, [&] { return condition(told_); })) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "the worker was not told within a minute";
}

Told FakeWorker::told() const {
  std::lock_guard lock(mu_);
  return told_;
}

std::byte* FakeWorker::arena_data(ArenaId arena) const {
  std::lock_guard lock(mu_);
  return told_.arenas.at(arena)->data();
}

CoreTest::CoreTest(uint32_t chunks, bool new_files) : pool_(chunks, kChunk, new_files) {}

CoreTest::~CoreTest() {
  if (core_ == nullptr) return;
  device_->stage.Open();
  device_->cluster.Open();
  device_->audit.Open();
  core_->Stop();
}

void CoreTest::StartCore(CoreOptions options) {
  options.boot_epoch = kEpoch;
  options.now = [this] { return absl::FromUnixNanos(now_); };
  auto host = gpu::host::HostDevice::Create(1);
  ASSERT_TRUE(host.ok()) << host.status();
  auto device = std::make_unique<GatedDevice>(*std::move(host));
  device_ = device.get();
  auto core = ServiceCore::Create(std::move(options), std::move(device), pool_.Take());
  ASSERT_TRUE(core.ok()) << core.status();
  core_ = *std::move(core);
}

HelloInfo CoreTest::Hello() {
  HelloInfo hello;
  hello.protocol_version_min = hello.protocol_version_max = 1;
  hello.state_layout_versions = {gpu::kStateLayoutVersion};
  hello.client_name = "test";
  return hello;
}

absl::Status CoreTest::OpenOn(GrantId grant) {
  Reply<WelcomeInfo> reply;
  HelloInfo hello = Hello();
  hello.grant = grant;
  core_->OpenSession(std::move(hello), std::make_shared<FakeWorker>(*core_), reply.done());
  return reply.Get().status();
}

CoreTest::Worker CoreTest::Open(GrantId grant) {
  auto worker = std::make_shared<FakeWorker>(*core_);
  Reply<WelcomeInfo> reply;
  HelloInfo hello = Hello();
  hello.grant = grant;
  core_->OpenSession(std::move(hello), worker, reply.done());
  const auto welcome = reply.Get();
  EXPECT_TRUE(welcome.ok()) << welcome.status();
  if (welcome.ok()) {
    worker->session = welcome->session;
    worker->key = {.token = welcome->token, .boot_epoch = kEpoch, .grant = grant};
  }
  return worker;
}

CoreTest::Worker CoreTest::Attached(GrantId grant) {
  Worker worker = Open(grant);
  const auto session = Attach(worker, worker->key);
  EXPECT_TRUE(session.ok()) << session.status();
  const auto arena = AllocateArena(worker, kRing);
  EXPECT_TRUE(arena.ok()) << arena.status();
  if (!arena.ok()) return worker;
  worker->ring = arena->arena;
  const std::string rows = Halves(kRing / 2, 1);
  std::memcpy(worker->arena_data(worker->ring), rows.data(), rows.size());
  return worker;
}

absl::StatusOr<SessionId> CoreTest::Attach(const Worker& worker, SessionKey key) {
  Reply<SessionId> reply;
  core_->Attach(std::move(key), {.pid = 1, .uid = 2, .gid = 3}, worker, reply.done());
  return reply.Get();
}

absl::StatusOr<ArenaInfo> CoreTest::AllocateArena(const Worker& worker, uint64_t bytes) {
  Reply<ArenaInfo> reply;
  core_->AllocateArena(worker->key, bytes, reply.done());
  return reply.Get();
}

RegisterRequest CoreTest::Request(FetchMode mode, uint64_t key) {
  RegisterRequest request;
  request.shape = {.layers = 2, .kv_heads = 1, .q_heads = 2, .head_dim = kHeadDim};
  request.method.sink_tokens = 4;
  request.method.min_window_tokens = 8;
  request.method.prompt_segment_tokens = 32;
  request.method.decode_segment_tokens = 16;
  request.method.tokens_per_cluster = 8;
  request.method.kmeans_iterations = 3;
  request.method.budget_tokens = 16;
  request.max_tokens = 256;
  request.mode = mode;
  request.idempotency_key = key;
  return request;
}

absl::StatusOr<RegisterReply> CoreTest::Register(const Worker& worker,
                                                 const RegisterRequest& request) {
  Reply<RegisterReply> reply;
  core_->RegisterSequence(worker->key, request, reply.done());
  return reply.Get();
}

SequenceId CoreTest::MustRegister(const Worker& worker, FetchMode mode) {
  const auto reply = Register(worker, Request(mode, worker->next_key++));
  EXPECT_TRUE(reply.ok()) << reply.status();
  return reply.ok() ? reply->sequence : 0;
}

IngestRequest CoreTest::Range(const Worker& worker, SequenceId sequence, uint32_t position,
                              uint32_t count, bool end_of_prompt) {
  return {.sequence = sequence,
          .position = position,
          .count = count,
          .layer_begin = 0,
          .layer_count = 2,
          .arena = worker->ring,
          .ring_offset = 0,
          .end_of_prompt = end_of_prompt,
          .idempotency_key = worker->next_key++};
}

absl::StatusOr<uint32_t> CoreTest::Ingest(const Worker& worker, const IngestRequest& request) {
  Reply<uint32_t> reply;
  core_->IngestTokens(worker->key, request, reply.done());
  return reply.Get();
}

void CoreTest::MustIngest(const Worker& worker, SequenceId sequence, uint32_t position,
                          uint32_t count, bool end_of_prompt) {
  const size_t before = worker->told().credit_count;
  const auto reply = Ingest(worker, Range(worker, sequence, position, count, end_of_prompt));
  ASSERT_TRUE(reply.ok()) << reply.status();
  ASSERT_TRUE(worker->Await([&](const Told& told) { return told.credit_count > before; }));
}

absl::StatusOr<PublishedInfo> CoreTest::Wait(const Worker& worker, SequenceId sequence,
                                             uint32_t length) {
  Reply<PublishedInfo> reply;
  core_->WaitPublished(worker->key, sequence, length, reply.done());
  return reply.Get();
}

FetchRequest CoreTest::Fetch(SequenceId sequence, uint32_t position, uint32_t layer) {
  FetchRequest request;
  request.layer = layer;
  request.want_output = true;
  request.want_selection = true;
  FetchItem item;
  item.sequence = sequence;
  item.position = position;
  item.q.inline_bytes = Halves(2 * kHeadDim, position * 2 + layer);
  item.k.inline_bytes = Halves(kHeadDim, position + 1000);
  item.v.inline_bytes = Halves(kHeadDim, position + 2000);
  request.items.push_back(std::move(item));
  return request;
}

absl::StatusOr<std::vector<FetchResult>> CoreTest::DoFetch(const Worker& worker,
                                                           FetchRequest request) {
  Reply<std::vector<FetchResult>> reply;
  core_->FetchClusters(worker->key, std::move(request), reply.done());
  return reply.Get();
}

absl::StatusOr<bool> CoreTest::Release(const Worker& worker, SequenceId sequence) {
  Reply<bool> reply;
  core_->ReleaseSequence(worker->key, sequence, reply.done());
  return reply.Get();
}

std::vector<SequenceStatus> CoreTest::Sequences() {
  Reply<std::vector<SequenceStatus>> reply;
  core_->ListSequences(std::nullopt, reply.done());
  const auto list = reply.Get();
  EXPECT_TRUE(list.ok()) << list.status();
  return list.ok() ? *list : std::vector<SequenceStatus>();
}

void CoreTest::Fence() { Sequences(); }

testing::AssertionResult CoreTest::AwaitStatus(
    const std::function<bool(const DaemonStatus&)>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kLimit;
  while (true) {
    const DaemonStatus status = core_->status();
    if (condition(status)) return testing::AssertionSuccess();
    if (std::chrono::steady_clock::now() > deadline) {
      return testing::AssertionFailure()
             << "after a minute: " << status.sequences << " sequences, " << status.sessions.size()
             << " sessions, used " << status.host.used_bytes << " reserved "
             << status.host.reserved_bytes << " quarantined " << status.host.quarantined_bytes
             << " gpu " << status.gpu_used_bytes;
    }
    Fence();
  }
}

testing::AssertionResult CoreTest::AwaitNothingHeld() {
  return AwaitStatus([](const DaemonStatus& status) {
    return status.sessions.empty() && status.sequences == 0 && status.gpu_used_bytes == 0 &&
           status.host.free_bytes() == status.host.total_bytes;
  });
}

}  // namespace clusterkv::service
