#include "gpu/cuda/cuda_stream.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/cuda/cuda_memory.h"
#include "gpu/status_macros.h"

namespace clusterkv::gpu::cuda {
namespace {

class CudaEvent final : public Event {
 public:
  CudaEvent(int ordinal, cudaEvent_t event) : ordinal_(ordinal), event_(event) {}
  ~CudaEvent() override {
    const ScopedDevice device(ordinal_);
    (void)cudaEventDestroy(event_);
  }

  bool done() const override {
    // After a fault of the device nothing before the event is coming any more.
    return cudaEventQuery(event_) != cudaErrorNotReady;
  }

  absl::Status Wait(absl::Duration timeout) const override {
    const absl::Time deadline = absl::Now() + timeout;
    absl::Duration pause = absl::Microseconds(10);
    while (!done()) {
      if (absl::Now() >= deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat("event not reached within ", absl::FormatDuration(timeout)));
      }
      std::this_thread::sleep_for(absl::ToChronoNanoseconds(pause));
      pause = std::min(2 * pause, absl::Milliseconds(1));
    }
    return absl::OkStatus();
  }

 private:
  const int ordinal_;
  const cudaEvent_t event_;
};

// Hands out 256-byte aligned offsets of one block.
class Packer {
 public:
  uint64_t Add(uint64_t bytes) {
    const uint64_t offset = end_;
    end_ += (bytes + 255) / 256 * 256;
    return offset;
  }
  uint64_t end() const { return end_; }

 private:
  uint64_t end_ = 0;
};

uint32_t PartsOf(const StateBlock& block) {
  const uint64_t rows = uint64_t{block.sink_tokens} + block.budget_tokens + block.window_slots +
                        (block.estimate != 0 ? block.max_clusters : 0);
  return static_cast<uint32_t>((rows + kRowsPerPart - 1) / kRowsPerPart);
}

DeviceSlot ToDevice(const BatchSlot& slot) {
  DeviceSlot converted = {};
  if (slot.active == 0) return converted;
  converted.state = slot.state;
  converted.host_chunks = slot.host_chunks;
  converted.chunk_count = slot.host_chunks == nullptr ? 0 : slot.chunk_count;
  converted.tail = slot.tail;
  converted.tail_stride = slot.tail_stride;
  converted.generation = slot.generation;
  converted.active = 1;
  converted.block = *slot.layout;
  return converted;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Create(int ordinal, cudaMemPool_t pool,
                                                               const std::string& name) {
  const ScopedDevice device(ordinal);
  cudaStream_t native = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&native, cudaStreamNonBlocking),
                           absl::StrCat("stream \"", name, "\""));
  std::unique_ptr<CudaStream> stream(new CudaStream(ordinal, pool, native, true));
  CKV_RETURN_IF_ERROR(stream->Prepare());
  return stream;
}

absl::StatusOr<std::unique_ptr<CudaStream>> CudaStream::Wrap(int ordinal, cudaMemPool_t pool,
                                                             cudaStream_t native) {
  std::unique_ptr<CudaStream> stream(new CudaStream(ordinal, pool, native, false));
  CKV_RETURN_IF_ERROR(stream->Prepare());
  return stream;
}

absl::Status CudaStream::Prepare() {
  const ScopedDevice device(ordinal_);
  CKV_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, ordinal_),
      "reading an attribute");
  int major = 0;
  CKV_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, ordinal_),
      "reading an attribute");
  overlap_ = major >= 9;
  CKV_ASSIGN_OR_RETURN(fault_, AllocatePinnedHost(ordinal_, 2 * sizeof(uint32_t)));
  return absl::OkStatus();
}

CudaStream::~CudaStream() {
  const ScopedDevice device(ordinal_);
  (void)cudaStreamSynchronize(stream_);
  if (owned_) (void)cudaStreamDestroy(stream_);
}

absl::Status CudaStream::CopyAsync(void* destination, const void* source, size_t bytes) {
  if (bytes == 0) return absl::OkStatus();
  if (destination == nullptr || source == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("copy of ", bytes, " bytes with a null pointer"));
  }
  const ScopedDevice device(ordinal_);
  return ToStatus(cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDefault, stream_), "copy");
}

absl::StatusOr<std::unique_ptr<Event>> CudaStream::Record() {
  const ScopedDevice device(ordinal_);
  cudaEvent_t event = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "event");
  auto owned = std::make_unique<CudaEvent>(ordinal_, event);
  CKV_RETURN_IF_CUDA_ERROR(cudaEventRecord(event, stream_), "event");
  return owned;
}

absl::Status CudaStream::Synchronize() {
  const ScopedDevice device(ordinal_);
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_), "waiting for a stream");
  return TakeFault();
}

absl::Status CudaStream::TakeFault() {
  const auto kind = static_cast<KernelFault>(__atomic_load_n(fault(), __ATOMIC_ACQUIRE));
  if (kind == KernelFault::kNone) return absl::OkStatus();
  const uint32_t value = fault()[1];
  fault()[1] = 0;
  __atomic_store_n(fault(), 0u, __ATOMIC_RELEASE);
  switch (kind) {
    case KernelFault::kChunkNotMapped:
      return absl::FailedPreconditionError(absl::StrCat("host chunk ", value, " is not mapped"));
    case KernelFault::kSizesDoNotAddUp:
      return absl::InternalError(
          absl::StrCat("cluster sizes of segment ", value, " do not add up to its tokens"));
    case KernelFault::kOrderOutsideRun:
      return absl::InternalError("the order of a run points outside the run");
    default:
      return absl::InternalError(absl::StrCat("sequence state is damaged: layer ", value));
  }
}

absl::StatusOr<CudaStream::LoadedBatch> CudaStream::Load(Batch batch) {
  if (batch.size() > kMaxBatch) {
    return absl::InvalidArgumentError(
        absl::StrCat("a batch of ", batch.size(), " slots; allowed: at most ", kMaxBatch));
  }
  std::vector<DeviceSlot> slots(batch.size());
  std::transform(batch.begin(), batch.end(), slots.begin(), ToDevice);
  const std::lock_guard lock(mutex_);
  if (table_ != nullptr && slots.size() == slots_.size() &&
      std::memcmp(slots.data(), slots_.data(), slots.size() * sizeof(DeviceSlot)) == 0) {
    return loaded_;
  }
  const ScopedDevice device(ordinal_);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamIsCapturing(stream_, &capture), "asking for a capture");
  if (capture != cudaStreamCaptureStatusNone) {
    return absl::FailedPreconditionError(
        "the batch differs from what was loaded before the capture: load it first");
  }
  LoadedBatch loaded;
  loaded.shape.count = static_cast<uint32_t>(slots.size());
  loaded.shape.multiprocessors = multiprocessors_;
  loaded.shape.overlap = overlap_;
  loaded.shape.fault = fault();
  for (const DeviceSlot& slot : slots) {
    if (slot.active == 0) continue;
    loaded.clusters = std::max(loaded.clusters, slot.block.max_clusters);
    loaded.parts = std::max(loaded.parts, PartsOf(slot.block));
    loaded.chunks = std::max(loaded.chunks, slot.chunk_count);
    loaded.shape.kv_heads = slot.block.kv_heads;
    loaded.shape.group = slot.block.group_size;
    loaded.shape.head_dim = slot.block.head_dim;
    loaded.shape.bf16 = slot.block.dtype == DType::kBf16;
  }
  LoadBatchArgs args = {};
  if (table_ == nullptr) {
    CKV_ASSIGN_OR_RETURN(table_, AllocatePrivate(ordinal_, sizeof(BatchTable)));
  }
  CKV_RETURN_IF_ERROR(GrowScratch(loaded, loaded.shape.group, args.scratch));
  args.table = reinterpret_cast<BatchTable*>(table_->data());
  loaded.shape.table = args.table;
  args.total = loaded.shape.count;
  slots_.clear();  // if a launch fails, nothing is known to be loaded
  do {
    args.count = std::min(LoadBatchArgs::kSlotsPerLaunch, args.total - args.first);
    std::copy_n(slots.begin() + args.first, args.count, args.slots);
    CKV_RETURN_IF_CUDA_ERROR(LaunchLoadBatch(args, stream_), "loading a batch");
    args.first += args.count;
  } while (args.first < args.total);
  slots_ = std::move(slots);
  loaded_ = loaded;
  return loaded;
}

absl::Status CudaStream::GrowScratch(const LoadedBatch& batch, uint32_t group,
                                     DecodeScratch& scratch) {
  const uint64_t items =
      uint64_t{std::max(1u, batch.shape.count)} * std::max(1u, batch.shape.kv_heads);
  const uint64_t clusters = std::max(1u, batch.clusters);
  const uint64_t parts = std::max(1u, batch.parts);
  scratch.clusters = static_cast<uint32_t>(clusters);
  scratch.score_stride = static_cast<uint32_t>(std::max(2u, group) * clusters);
  scratch.chosen_stride = std::bit_ceil(static_cast<uint32_t>(clusters));
  scratch.parts = static_cast<uint32_t>(parts);
  Packer packer;
  const uint64_t select_tickets = packer.Add(items * sizeof(uint32_t));
  const uint64_t attend_tickets = packer.Add(items * sizeof(uint32_t));
  scratch.chunk_stride = std::max(1u, batch.chunks);
  const uint64_t slots = std::max(1u, batch.shape.count);
  const uint64_t chunk_steps = packer.Add(slots * sizeof(uint2));
  const uint64_t zeroed = packer.end();
  const uint64_t chunks = packer.Add(slots * scratch.chunk_stride * sizeof(std::byte*));
  const uint64_t scores = packer.Add(items * scratch.score_stride * sizeof(float));
  const uint64_t chosen = packer.Add(items * scratch.chosen_stride * sizeof(uint64_t));
  const uint64_t taken = packer.Add(items * clusters * sizeof(uint32_t));
  const uint64_t keys = packer.Add(items * 3 * clusters * sizeof(uint32_t));
  const uint64_t misses = packer.Add(items * clusters * sizeof(MissedCluster));
  const uint64_t partials =
      packer.Add(items * parts * group * batch.shape.head_dim * sizeof(float));
  const uint64_t partial_sums = packer.Add(items * parts * group * sizeof(float2));
  if (scratch_ == nullptr || scratch_->bytes() < packer.end()) {
    // Launches in flight use the old one; freeing it waits for them.
    CKV_ASSIGN_OR_RETURN(auto grown, AllocatePrivate(ordinal_, packer.end() + packer.end() / 4));
    scratch_ = std::move(grown);
  } else {
    // Tickets count from 0, and lie elsewhere now; so do chunk addresses.
    CKV_RETURN_IF_CUDA_ERROR(cudaMemsetAsync(scratch_->data(), 0, zeroed, stream_),
                             "loading a batch");
  }
  std::byte* const base = scratch_->data();
  scratch.select_tickets = reinterpret_cast<uint32_t*>(base + select_tickets);
  scratch.attend_tickets = reinterpret_cast<uint32_t*>(base + attend_tickets);
  scratch.chunk_steps = reinterpret_cast<uint2*>(base + chunk_steps);
  scratch.chunks = reinterpret_cast<const std::byte**>(base + chunks);
  scratch.scores = reinterpret_cast<float*>(base + scores);
  scratch.chosen = reinterpret_cast<uint64_t*>(base + chosen);
  scratch.taken = reinterpret_cast<uint32_t*>(base + taken);
  scratch.keys = reinterpret_cast<uint32_t*>(base + keys);
  scratch.misses = reinterpret_cast<MissedCluster*>(base + misses);
  scratch.partials = reinterpret_cast<float*>(base + partials);
  scratch.partial_sums = reinterpret_cast<float2*>(base + partial_sums);
  return absl::OkStatus();
}

absl::StatusOr<std::byte*> CudaStream::TakeTemporary(size_t bytes) {
  const ScopedDevice device(ordinal_);
  void* data = nullptr;
  CKV_RETURN_IF_CUDA_ERROR(
      cudaMallocFromPoolAsync(&data, std::max<size_t>(bytes, 16), pool_, stream_),
      absl::StrCat("allocation of ", bytes, " bytes"));
  return static_cast<std::byte*>(data);
}

absl::StatusOr<std::byte*> CudaStream::Upload(const void* source, size_t bytes) {
  CKV_ASSIGN_OR_RETURN(std::byte* const data, TakeTemporary(bytes));
  // From pageable memory: the source may go as soon as this returns.
  const absl::Status copied = CopyAsync(data, source, bytes);
  if (copied.ok()) return data;
  Discard(data);
  return copied;
}

void CudaStream::Discard(std::byte* temporary) {
  const ScopedDevice device(ordinal_);
  (void)cudaFreeAsync(temporary, stream_);
}

absl::StatusOr<CudaStream*> NativeStream(Stream& stream) {
  auto* const native = dynamic_cast<CudaStream*>(&stream);
  if (native != nullptr) return native;
  return absl::InvalidArgumentError("the stream is not one of the cuda backend");
}

absl::Status CheckCudaDType(DType dtype) {
  if (dtype == DType::kBf16 || dtype == DType::kFp16) return absl::OkStatus();
  return absl::InvalidArgumentError("dtype is fp32; the cuda backend takes bf16 and fp16");
}

absl::Status CheckReachable(const void* data, const char* what) {
  cudaPointerAttributes attributes = {};
  CKV_RETURN_IF_CUDA_ERROR(cudaPointerGetAttributes(&attributes, data), what);
  if (attributes.type != cudaMemoryTypeUnregistered) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what,
                   " lies in memory that the device does not reach: neither its own nor "
                   "pinned on the host"));
}

}  // namespace clusterkv::gpu::cuda
