#include "client/bench/pinned_region.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "absl/strings/str_cat.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kPiece = size_t{64} << 20;
constexpr size_t kPage = 4096;

}  // namespace

absl::StatusOr<std::unique_ptr<PinnedRegion>> PinnedRegion::Create(gpu::Device& device,
                                                                   gpu::host::ThreadPool& threads,
                                                                   size_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(absl::StrCat("host store of ", bytes, " bytes"));
  }
  auto* const base = static_cast<std::byte*>(data);
  std::unique_ptr<PinnedRegion> region(new PinnedRegion(gpu::Mapping::Adopt(base, bytes)));
  (void)madvise(data, bytes, MADV_HUGEPAGE);
  threads.ParallelFor((bytes + kPiece - 1) / kPiece, [&](size_t piece) {
    const size_t end = std::min(bytes, (piece + 1) * kPiece);
    for (size_t at = piece * kPiece; at < end; at += kPage) base[at] = std::byte{0};
  });
  CKV_ASSIGN_OR_RETURN(region->registration_,
                       device.RegisterHost(base, bytes, gpu::MapAccess::kReadWrite));
  return region;
}

}  // namespace clusterkv::client::bench
