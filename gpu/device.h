// Where device work runs: memory, streams, events and the operations, behind narrow interfaces.
// `cuda` and `host` are the backends; `host` runs the same operations on the CPU over shared
// memory, with a real FIFO stream thread, so that asynchrony is exercised without a GPU.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gpu/mapping.h"
#include "gpu/unique_fd.h"

namespace clusterkv::gpu {

class ClusterOps;
class DecodeOps;

// A point in a stream. Thread-safe.
class Event {
 public:
  virtual ~Event() = default;
  virtual bool done() const = 0;
  // Errors: DEADLINE_EXCEEDED. Says nothing about the success of the work before it.
  virtual absl::Status Wait(absl::Duration timeout) const = 0;
};

// A FIFO of device work. The first error is kept until Synchronize reports it; work after a failed
// piece may be skipped, and is on the host. Thread-safe; destruction waits for what is enqueued.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual absl::Status CopyAsync(void* destination, const void* source, size_t bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<Event>> Record() = 0;
  // Waits for all that is enqueued; returns the first error since the last call and forgets it.
  virtual absl::Status Synchronize() = 0;
};

// Device memory that this process owns or has imported. Move-only; freed when destroyed.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual std::byte* data() const = 0;
  virtual size_t bytes() const = 0;
  // Zeroes all of it; work of streams on it has passed.
  virtual absl::Status Clear() = 0;
  // A descriptor that another process can import; INVALID_ARGUMENT unless made exportable.
  virtual absl::StatusOr<UniqueFd> Export() const = 0;
};

// Host memory that the device can reach. It can until this is destroyed.
class HostRegistration {
 public:
  virtual ~HostRegistration() = default;
};

// Thread-safe.
class Device {
 public:
  virtual ~Device() = default;

  virtual const std::string& backend() const = 0;      // "host", "cuda"
  virtual const std::string& description() const = 0;  // for people
  // What DeviceOptions::device calls it; empty where there is only one.
  virtual const std::string& uuid() const = 0;
  // The NUMA node that it is next to; nullopt: none, or unknown.
  virtual std::optional<int> numa_node() const = 0;
  virtual absl::StatusOr<std::unique_ptr<Stream>> CreateStream(const std::string& name) = 0;
  // A stream over one of the caller's: for `cuda` a cudaStream_t, which must outlive it.
  // Errors: INVALID_ARGUMENT for a backend that has no such thing.
  virtual absl::StatusOr<std::unique_ptr<Stream>> WrapStream(void* native) = 0;
  // Zeroed. Errors: RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<DeviceMemory>> Allocate(size_t bytes) = 0;
  // Zeroed, and can be exported. Errors: RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocateShared(size_t bytes) = 0;
  // Host memory that the device and the CPU both use in place. Zeroed. Errors: RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<DeviceMemory>> AllocatePinned(size_t bytes) = 0;
  // Makes mapped host memory, whole pages, known to the device, at the same address, and keeps its
  // pages in place. Errors: RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<HostRegistration>> RegisterHost(std::byte* data,
                                                                         size_t bytes,
                                                                         MapAccess access) = 0;
  // Maps memory that another process exported. Errors: INVALID_ARGUMENT if it is shorter.
  virtual absl::StatusOr<std::unique_ptr<DeviceMemory>> Import(UniqueFd fd, size_t bytes) = 0;
  // Is shared memory that is freed here handed to nobody else while another process maps it?
  // If not, it must be kept until none does.
  virtual bool counts_importers() const = 0;
  // Is device memory host memory? If not, rows in host memory are copied before they are clustered.
  virtual bool computes_on_host_memory() const = 0;
  virtual DecodeOps& decode_ops() = 0;
  virtual ClusterOps& cluster_ops() = 0;
};

// How device memory goes to other processes: by CUDA's virtual memory, whose driver counts who maps
// it, or by legacy handles, for drivers without that. What is imported says itself which it is.
enum class GpuSharing { kVmm, kLegacy };

struct DeviceOptions {
  std::string backend = "auto";  // "host", "cuda" or "auto": cuda if it is there, else host
  std::string device = {};       // of cuda: an index or a UUID; empty: the first
  int threads = 0;               // of the host backend; 0 = all cores this process may use
  // Of cuda. Given, it must work: by default a driver without it is only found out when memory is
  // shared.
  std::optional<GpuSharing> gpu_sharing = {};
};

// The registry of backends. Errors: INVALID_ARGUMENT for an unknown name, UNAVAILABLE for a
// backend that this build or machine does not have. `cuda` never falls back silently.
absl::StatusOr<std::unique_ptr<Device>> CreateDevice(const DeviceOptions& options);

}  // namespace clusterkv::gpu
