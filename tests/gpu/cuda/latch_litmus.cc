// The litmus of the latch (design D3), with two processes on one GPU: a daemon publishes segments
// of checksummed content into the real state and host store; a worker replays a captured begin-step
// and checks everything that the latch then shows. No word may be torn, early, or step back.
//
//   latch_litmus [PUBLISHES]      prints one JSON line; exit 0 if nothing was wrong
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gpu/cluster_ops.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/mapping.h"
#include "tests/gpu/cuda/latch_litmus_kernels.h"

namespace clusterkv::gpu::cuda {
namespace {

constexpr uint32_t kTokens = 16;  // of a segment: one cluster
constexpr uint32_t kSinks = 16;
constexpr uint32_t kRunSlots = 4096;  // runs of the host store are used again after this many

void Check(const absl::Status& status, const char* what) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s: %s\n", what, status.ToString().c_str());
  std::exit(1);
}
void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
template <typename T>
T Take(absl::StatusOr<T> value, const char* what) {
  Check(value.status(), what);
  return *std::move(value);
}

StateLayout Layout(uint32_t publishes) {
  const Shape shape = {
      .layers = 1, .kv_heads = 4, .q_heads = 4, .head_dim = 64, .dtype = DType::kFp16};
  MethodOptions method;
  method.sink_tokens = kSinks;
  method.prompt_segment_tokens = kTokens;
  method.decode_segment_tokens = kTokens;
  method.tokens_per_cluster = kTokens;
  method.budget_tokens = 64;
  return Take(StateLayout::Create(shape, method.Resolved(shape), kSinks + publishes * kTokens),
              "layout");
}

size_t StoreBytes(const StateLayout& layout) {
  return size_t{kRunSlots} * layout.kv_heads * kTokens * layout.row_bytes();
}

void SendFds(int socket, int a, int b) {
  char byte = 'x';
  iovec io = {.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(2 * sizeof(int));
  const int fds[2] = {a, b};
  std::memcpy(CMSG_DATA(header), fds, sizeof(fds));
  if (sendmsg(socket, &message, 0) != 1) std::exit(1);
}

std::pair<UniqueFd, UniqueFd> ReceiveFds(int socket) {
  char byte = 0;
  iovec io = {.iov_base = &byte, .iov_len = 1};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &io;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  if (recvmsg(socket, &message, 0) != 1) std::exit(1);
  int fds[2];
  std::memcpy(fds, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fds));
  return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

void Publish(int socket, uint32_t publishes) {
  const StateLayout layout = Layout(publishes);
  auto device = Take(CreateDevice({.backend = "cuda"}), "device");
  auto stream = Take(device->CreateStream("daemon"), "stream");
  auto state = Take(device->AllocateShared(layout.total_bytes), "state");
  UniqueFd store(memfd_create("litmus", MFD_CLOEXEC));
  if (ftruncate(store.get(), static_cast<off_t>(StoreBytes(layout))) != 0) std::exit(1);
  const Mapping host =
      Take(Mapping::Create(store.get(), StoreBytes(layout), MapAccess::kReadWrite), "store");
  std::memset(host.data(), 0, host.bytes());
  const auto pinned =
      Take(device->RegisterHost(host.data(), host.bytes(), MapAccess::kReadWrite), "pinning");
  Check(device->cluster_ops().Initialize(*stream, state->data(), layout, 1), "initialise");
  Check(stream->Synchronize(), "initialise");
  SendFds(socket, Take(state->Export(), "export").get(), store.get());
  char ready = 0;
  if (read(socket, &ready, 1) != 1) std::exit(1);

  const uint32_t heads = layout.kv_heads;
  const size_t run_bytes = kTokens * layout.row_bytes();
  const auto rows = Take(device->Allocate(heads * run_bytes), "rows");
  const auto means = Take(device->Allocate(heads * layout.row_bytes()), "means");
  const auto sizes = Take(device->Allocate(heads * sizeof(uint32_t)), "sizes");
  cudaStream_t native = nullptr;
  Check(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), "stream");
  auto wrapped = Take(device->WrapStream(native), "stream");
  for (uint32_t segment = 0; segment < publishes; ++segment) {
    Check(LaunchFillSegment(rows->data(), means->data(), reinterpret_cast<uint32_t*>(sizes->data()),
                            heads, kTokens, static_cast<uint32_t>(layout.row_bytes()), segment,
                            native),
          "fill");
    const size_t slot = size_t{segment % kRunSlots} * heads * run_bytes;
    Check(wrapped->CopyAsync(host.data() + slot, rows->data(), heads * run_bytes), "offload");
    PublishArgs args = {.state = state->data(),
                        .layout = &layout,
                        .segment = segment,
                        .segment_begin = kSinks + segment * kTokens,
                        .segment_end = kSinks + (segment + 1) * kTokens,
                        .problems = {}};
    for (uint32_t head = 0; head < heads; ++head) {
      std::byte* const mean = means->data() + head * layout.row_bytes();
      args.problems.push_back({.cluster_begin = segment,
                               .cluster_count = 1,
                               .sizes = reinterpret_cast<uint32_t*>(sizes->data()) + head,
                               .centroids = mean,
                               .value_means = mean + layout.row_bytes() / 2,
                               .chunk = 0,
                               .rows_offset = static_cast<uint32_t>((slot + head * run_bytes) / 16),
                               .positions_offset = 0});
    }
    Check(device->cluster_ops().Publish(*wrapped, std::move(args)), "publish");
    if (segment % 64 == 63) Check(wrapped->Synchronize(), "publish");
  }
  Check(wrapped->Synchronize(), "publish");
  wrapped.reset();
  char done = 'd';
  if (write(socket, &done, 1) != 1) std::exit(1);
  if (read(socket, &done, 1) != 1) std::exit(1);
}

int Work(int socket, uint32_t publishes) {
  const StateLayout layout = Layout(publishes);
  auto device = Take(CreateDevice({.backend = "cuda"}), "worker's device");
  auto [state_fd, store_fd] = ReceiveFds(socket);
  auto state = Take(device->Import(std::move(state_fd), layout.total_bytes), "import");
  const Mapping host =
      Take(Mapping::Create(store_fd.get(), StoreBytes(layout), MapAccess::kReadOnly), "store");
  const auto pinned =
      Take(device->RegisterHost(host.data(), host.bytes(), MapAccess::kReadOnly), "pinning");
  const auto chunks = Take(device->AllocatePinned(sizeof(std::byte*)), "chunks");
  *reinterpret_cast<const std::byte**>(chunks->data()) = host.data();
  const auto counts = Take(device->Allocate(sizeof(LitmusCounts)), "counts");
  cudaStream_t native = nullptr;
  Check(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking), "stream");
  auto stream = Take(device->WrapStream(native), "stream");
  const BatchSlot slot = {.state = state->data(),
                          .layout = &layout,
                          .host_chunks = reinterpret_cast<const std::byte* const*>(chunks->data()),
                          .generation = 1,
                          .active = 1};
  const Batch batch(&slot, 1);
  Check(device->decode_ops().LoadBatch(*stream, batch), "load");
  Check(cudaStreamBeginCapture(native, cudaStreamCaptureModeThreadLocal), "capture");
  Check(device->decode_ops().BeginStep(*stream, batch), "begin");
  Check(LaunchCheckStep(state->data(), layout, slot.host_chunks, kSinks, kTokens,
                        reinterpret_cast<LitmusCounts*>(counts->data()), native),
        "check");
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  Check(cudaStreamEndCapture(native, &graph), "capture");
  Check(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  char ready = 'r';
  if (write(socket, &ready, 1) != 1) return 1;
  const auto start = std::chrono::steady_clock::now();
  fcntl(socket, F_SETFL, O_NONBLOCK);
  LitmusCounts seen = {};
  char done = 0;
  do {
    for (int i = 0; i < 16; ++i) Check(cudaGraphLaunch(exec, native), "replay");
    Check(stream->Synchronize(), "replay");
    usleep(1000);  // time-sliced, the daemon gets its turn
  } while (read(socket, &done, 1) != 1);
  Check(cudaGraphLaunch(exec, native), "replay");
  Check(stream->CopyAsync(&seen, counts->data(), sizeof(seen)), "counts");
  Check(stream->Synchronize(), "counts");
  const double seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  if (write(socket, &done, 1) != 1) return 1;
  std::printf(
      "{\"op\": \"latch-litmus\", \"publishes\": %u, \"steps\": %llu, \"segments_seen\": %llu, "
      "\"words\": %llu, \"wrong_words\": %llu, \"steps_back\": %llu, \"seconds\": %.2f}\n",
      publishes, seen.steps, seen.segments_seen, seen.words, seen.wrong_words, seen.steps_back,
      seconds);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  const bool good = seen.wrong_words == 0 && seen.steps_back == 0 &&
                    seen.segments_seen == publishes && seen.steps > 100;
  return good ? 0 : 1;
}

int Main(int argc, char** argv) {
  const auto publishes =
      argc > 1 ? static_cast<uint32_t>(std::strtoul(argv[1], nullptr, 10)) : 100'000u;
  int sockets[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) != 0) return 1;
  // Before either touches the device: a context does not survive a fork.
  const pid_t worker = fork();
  if (worker == 0) {
    close(sockets[0]);
    const int code = Work(sockets[1], publishes);
    std::fflush(stdout);
    _exit(code);
  }
  close(sockets[1]);
  Publish(sockets[0], publishes);
  int status = 0;
  waitpid(worker, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace
}  // namespace clusterkv::gpu::cuda

int main(int argc, char** argv) { return clusterkv::gpu::cuda::Main(argc, argv); }
