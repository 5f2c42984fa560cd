// What measuring needs of a backend beside gpu::Device: timing, cold caches, its own ceilings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/cache_edits.h"
#include "client/bench/model.h"
#include "gpu/device.h"

namespace clusterkv::client::bench {

using Enqueue = std::function<absl::Status(gpu::Stream&)>;

struct Timing {
  Enqueue work;     // what is timed; it runs some times more, to warm up
  Enqueue prepare;  // before each, not timed; may be null
  uint32_t repeats = 1;
  bool capture = true;  // cuda: `work` is captured once, and its graph replayed
};

// One stream, one thread at a time.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual gpu::Device& device() = 0;
  virtual gpu::Stream& stream() = 0;
  // What client::BatchOptions::stream takes; null for `host`.
  virtual void* native_stream() = 0;
  virtual const std::string& driver() const = 0;  // empty: none
  // Microseconds of each of the repeats. cuda: events around the work, with nothing of it in L2;
  // host: a steady clock.
  virtual absl::StatusOr<std::vector<double>> Time(const Timing& timing) = 0;
  // The fastest copy there is: of host memory, by all cores.
  virtual absl::Status Copy(std::byte* to, const std::byte* from, size_t bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<CacheEditor>> MakeEditor(const CacheEdits& edits) = 0;
  // Multiplications and additions a second, of large matrix products (cuda) or of fused
  // multiply-adds on all cores (host). UNAVAILABLE: what measures it is not on this machine.
  virtual absl::StatusOr<double> MeasureFlops() = 0;
  // Errors: UNAVAILABLE where nothing here can run one.
  virtual absl::StatusOr<std::unique_ptr<Model>> CreateModel(const ModelSize& size,
                                                             uint32_t max_batch) = 0;
};

// For gpu::DeviceOptions::backend. Errors: those of gpu::CreateDevice.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const std::string& name);

}  // namespace clusterkv::client::bench
