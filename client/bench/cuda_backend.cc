#include "client/bench/cuda_backend.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/bench/cache_kernels.h"
#include "client/bench/cublas.h"
#include "client/bench/cuda_graph.h"
#include "client/bench/cuda_model.h"
#include "client/bench/model_kernels.h"
#include "gpu/cuda/cuda_error.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr uint32_t kWarmUps = 3;
// More than any L2; read before a measurement.
constexpr size_t kChillBytes = size_t{256} << 20;
// Samples that are enqueued before the stream is waited for: enough to keep the device busy.
constexpr uint32_t kInFlight = 32;

// "580.159.04" out of "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  ...".
std::string DriverVersion() {
  std::ifstream file("/proc/driver/nvidia/version");
  std::string word;
  while (file >> word) {
    const bool number = word.find_first_not_of("0123456789.") == std::string::npos;
    if (number && word.find('.') != std::string::npos) return word;
  }
  int version = 0;
  (void)cudaDriverGetVersion(&version);
  return absl::StrCat("CUDA ", version / 1000, ".", version % 1000 / 10);
}

class CudaCacheEditor final : public CacheEditor {
 public:
  static absl::StatusOr<std::unique_ptr<CacheEditor>> Create(gpu::Device& device,
                                                             gpu::Stream& stream,
                                                             cudaStream_t native,
                                                             const CacheEdits& edits) {
    std::unique_ptr<CudaCacheEditor> editor(new CudaCacheEditor(native));
    CacheEditLaunch& launch = editor->launch_;
    launch.block = edits.layout;
    launch.state_count = static_cast<uint32_t>(edits.states.size());
    const auto upload = [&](const auto& values, auto*& place) -> absl::Status {
      using Value = typename std::decay_t<decltype(values)>::value_type;
      const size_t bytes = std::max<size_t>(1, values.size()) * sizeof(Value);
      CKV_ASSIGN_OR_RETURN(std::unique_ptr<gpu::DeviceMemory> memory, device.Allocate(bytes));
      CKV_RETURN_IF_ERROR(
          stream.CopyAsync(memory->data(), values.data(), values.size() * sizeof(Value)));
      CKV_RETURN_IF_ERROR(stream.Synchronize());
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(memory->data());
      editor->memory_.push_back(std::move(memory));
      return absl::OkStatus();
    };
    CKV_RETURN_IF_ERROR(upload(edits.states, launch.states));
    CKV_RETURN_IF_ERROR(upload(edits.evict.begins, launch.evict_begins));
    CKV_RETURN_IF_ERROR(upload(edits.evict.clusters, launch.evict));
    CKV_RETURN_IF_ERROR(upload(edits.fill.begins, launch.fill_begins));
    CKV_RETURN_IF_ERROR(upload(edits.fill.clusters, launch.fill));
    return editor;
  }

  absl::Status Apply() override {
    return gpu::cuda::ToStatus(LaunchCacheEdit(launch_, native_), "editing caches");
  }

 private:
  explicit CudaCacheEditor(cudaStream_t native) : native_(native) {}

  const cudaStream_t native_;
  CacheEditLaunch launch_ = {};
  std::vector<std::unique_ptr<gpu::DeviceMemory>> memory_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CudaBackend::Create(std::unique_ptr<gpu::Device> device) {
  std::unique_ptr<CudaBackend> backend(new CudaBackend(std::move(device)));
  CKV_RETURN_IF_ERROR(backend->Prepare());
  return backend;
}

absl::Status CudaBackend::Prepare() {
  driver_ = DriverVersion();
  CKV_RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&native_, cudaStreamNonBlocking), "stream");
  CKV_ASSIGN_OR_RETURN(stream_, device_->WrapStream(native_));
  CKV_ASSIGN_OR_RETURN(chill_, device_->Allocate(kChillBytes + 16));
  return absl::OkStatus();
}

CudaBackend::~CudaBackend() {
  stream_.reset();
  if (native_ != nullptr) (void)cudaStreamDestroy(native_);
}

absl::StatusOr<std::vector<double>> CudaBackend::Time(const Timing& timing) {
  const auto prepare = [&] { return timing.prepare ? timing.prepare(*stream_) : absl::OkStatus(); };
  // Once as it is: loads modules and the batch, which a capture cannot.
  CKV_RETURN_IF_ERROR(prepare());
  CKV_RETURN_IF_ERROR(timing.work(*stream_));
  CKV_RETURN_IF_ERROR(stream_->Synchronize());
  std::optional<CapturedWork> graph;
  if (timing.capture) {
    CKV_ASSIGN_OR_RETURN(CapturedWork captured,
                         CapturedWork::Capture(*stream_, native_, timing.work));
    graph.emplace(std::move(captured));
  }
  const auto run = [&] { return graph ? graph->Launch(native_) : timing.work(*stream_); };
  for (uint32_t i = 0; i < kWarmUps; ++i) {
    CKV_RETURN_IF_ERROR(prepare());
    CKV_RETURN_IF_ERROR(run());
  }
  std::vector<TimedEvent> events;
  for (uint32_t i = 0; i < 2 * timing.repeats; ++i) {
    CKV_ASSIGN_OR_RETURN(TimedEvent event, TimedEvent::Create());
    events.push_back(std::move(event));
  }
  for (uint32_t i = 0; i < timing.repeats; ++i) {
    if (i % kInFlight == kInFlight - 1) CKV_RETURN_IF_ERROR(stream_->Synchronize());
    // On the device this takes longer than it takes to enqueue the work behind it, so the first
    // event is not reached before the work is there.
    CKV_RETURN_IF_ERROR(prepare());
    CKV_RETURN_IF_ERROR(ChillCaches());
    CKV_RETURN_IF_ERROR(events[2 * i].Record(native_));
    CKV_RETURN_IF_ERROR(run());
    CKV_RETURN_IF_ERROR(events[2 * i + 1].Record(native_));
  }
  CKV_RETURN_IF_ERROR(stream_->Synchronize());
  std::vector<double> samples;
  for (uint32_t i = 0; i < timing.repeats; ++i) {
    CKV_ASSIGN_OR_RETURN(const double time, events[2 * i].MicrosecondsUntil(events[2 * i + 1]));
    samples.push_back(time);
  }
  return samples;
}

absl::Status CudaBackend::Copy(std::byte* to, const std::byte* from, size_t bytes) {
  return stream_->CopyAsync(to, from, bytes);
}

absl::Status CudaBackend::ChillCaches() {
  return gpu::cuda::ToStatus(
      LaunchRead(chill_->data(), kChillBytes,
                 reinterpret_cast<uint32_t*>(chill_->data() + kChillBytes), native_),
      "reading a buffer");
}

absl::StatusOr<std::unique_ptr<CacheEditor>> CudaBackend::MakeEditor(const CacheEdits& edits) {
  return CudaCacheEditor::Create(*device_, *stream_, native_, edits);
}

absl::StatusOr<double> CudaBackend::MeasureFlops() {
  CKV_ASSIGN_OR_RETURN(const std::unique_ptr<Cublas> cublas, Cublas::Load(*device_, native_));
  constexpr uint32_t kSide = 8192;
  constexpr size_t kBytes = size_t{kSide} * kSide * 2;
  CKV_ASSIGN_OR_RETURN(const auto a, device_->Allocate(kBytes));
  CKV_ASSIGN_OR_RETURN(const auto b, device_->Allocate(kBytes));
  CKV_ASSIGN_OR_RETURN(const auto c, device_->Allocate(kBytes));
  // Random numbers: zeros would run faster.
  CKV_RETURN_IF_CUDA_ERROR(LaunchRandomBf16(a->data(), kBytes / 2, 1.0f, 1, native_), "numbers");
  CKV_RETURN_IF_CUDA_ERROR(LaunchRandomBf16(b->data(), kBytes / 2, 1.0f, 2, native_), "numbers");
  Timing timing;
  timing.work = [&](gpu::Stream&) {
    return cublas->Multiply(a->data(), b->data(), c->data(), kSide, kSide, kSide);
  };
  timing.repeats = 20;
  CKV_ASSIGN_OR_RETURN(const std::vector<double> samples, Time(timing));
  const double best = *std::ranges::min_element(samples);
  return 2.0 * kSide * kSide * kSide / best * 1e6;
}

absl::StatusOr<std::unique_ptr<Model>> CudaBackend::CreateModel(const ModelSize& size,
                                                                uint32_t max_batch) {
  return CudaModel::Create(*device_, native_, size, max_batch);
}

}  // namespace clusterkv::client::bench
