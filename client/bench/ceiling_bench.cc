// hbm-copy, h2d, d2h: the ceilings. The best of many copies is the ceiling, the row tells the
// median.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "client/bench/bench_run.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr size_t kTransferBytes = size_t{64} << 20;
constexpr size_t kDeviceCopyBytes = size_t{1} << 30;
constexpr size_t kHostCopyBytes = size_t{256} << 20;
constexpr uint32_t kMaxRepeats = 100;

// Copies `bytes` and adds the row; `work` is what one copy moves, `rate` what the best one reached.
absl::Status MeasureCopy(const BenchRun& run, const char* operation, std::byte* to,
                         const std::byte* from, size_t bytes, const Work& work, double moved,
                         double& rate) {
  Timing timing;
  timing.work = [&](gpu::Stream&) { return run.backend.Copy(to, from, bytes); };
  timing.repeats = std::min(run.options.repeats, kMaxRepeats);
  timing.capture = false;
  CKV_ASSIGN_OR_RETURN(std::vector<double> samples, run.backend.Time(timing));
  rate = moved / *std::ranges::min_element(samples) * 1e6;
  if (!run.options.Has(operation)) return absl::OkStatus();
  run.AddRow(operation, {{"copied_bytes", bytes}}, std::move(samples), work,
             {{"bytes_per_second", rate}});
  return absl::OkStatus();
}

}  // namespace

absl::Status MeasureCeilings(const BenchRun& run) {
  gpu::Device& device = run.backend.device();
  Ceilings& ceilings = run.report.ceilings;
  const size_t bytes = run.is_cuda() ? kDeviceCopyBytes : kHostCopyBytes;
  {
    CKV_ASSIGN_OR_RETURN(const auto from, device.Allocate(bytes));
    CKV_ASSIGN_OR_RETURN(const auto to, device.Allocate(bytes));
    const auto moved = 2.0 * static_cast<double>(bytes);
    CKV_RETURN_IF_ERROR(MeasureCopy(run, "hbm-copy", to->data(), from->data(), bytes,
                                    {.device_bytes = moved}, moved, ceilings.device_copy));
  }
  CKV_ASSIGN_OR_RETURN(const auto pinned, device.AllocatePinned(kTransferBytes));
  CKV_ASSIGN_OR_RETURN(const auto memory, device.Allocate(kTransferBytes));
  const auto moved = static_cast<double>(kTransferBytes);
  CKV_RETURN_IF_ERROR(MeasureCopy(run, "h2d", memory->data(), pinned->data(), kTransferBytes,
                                  {.to_device_bytes = moved}, moved, ceilings.to_device));
  CKV_RETURN_IF_ERROR(MeasureCopy(run, "d2h", pinned->data(), memory->data(), kTransferBytes,
                                  {.to_host_bytes = moved}, moved, ceilings.to_host));
  const absl::StatusOr<double> flops = run.backend.MeasureFlops();
  if (flops.ok()) {
    ceilings.flops = *flops;
  } else if (absl::IsUnavailable(flops.status())) {
    run.AddNote(absl::StrCat("UNAVAILABLE: ", std::string(flops.status().message()),
                             "; floors count bytes only"));
  } else {
    return flops.status();
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
