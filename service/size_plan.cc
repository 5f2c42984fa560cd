#include "service/size_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "gpu/state_layout.h"
#include "gpu/status_macros.h"
#include "service/config.h"
#include "service/piece_table.h"
#include "service/size_text.h"

namespace clusterkv::service {
namespace {

// Device memory that is shared comes in pieces of this size.
constexpr uint64_t kDevicePage = 2ull << 20;
constexpr int kChunkTries = 8;

uint64_t RoundUp(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

void DescribeState(const gpu::StateLayout& layout, SizePlan& plan) {
  plan.state = layout.total_bytes;
  plan.clusters = (layout.sinks - layout.clusters) + (layout.free_slots - layout.last_used);
  plan.window = layout.cache - layout.sinks;
  plan.cache = layout.slot_of_row - layout.cache;
  plan.rows = layout.last_used - layout.slot_of_row;
  plan.rest = plan.state - plan.clusters - plan.window - plan.cache - plan.rows;
}

// A worker's sequences share its chunks.
uint64_t WorkerMemory(const SizeQuestion& question, const gpu::MethodOptions& method,
                      uint32_t sequences, uint64_t chunk_bytes) {
  const double chunks = PieceTable::ChunksNeeded(question.shape, method, question.max_tokens,
                                                 question.max_tokens, chunk_bytes);
  return static_cast<uint64_t>(std::ceil(chunks * sequences - 1e-6)) * chunk_bytes;
}

// Workers share none.
uint64_t HostMemory(const SizeQuestion& question, const gpu::MethodOptions& method,
                    uint64_t chunk_bytes) {
  const uint32_t fewer = question.sequences / question.workers;
  const uint32_t with_one_more = question.sequences % question.workers;
  return with_one_more * WorkerMemory(question, method, fewer + 1, chunk_bytes) +
         (question.workers - with_one_more) * WorkerMemory(question, method, fewer, chunk_bytes);
}

uint64_t WorkerGib(const SizeQuestion& question, const gpu::MethodOptions& method,
                   uint64_t chunk_bytes) {
  const uint32_t most = (question.sequences + question.workers - 1) / question.workers;
  return RoundUp(WorkerMemory(question, method, most, chunk_bytes), kDeviceBytes) / kDeviceBytes;
}

}  // namespace

absl::StatusOr<SizePlan> PlanSize(const SizeQuestion& question) {
  if (question.workers == 0 || question.sequences < question.workers) {
    return absl::InvalidArgumentError(
        fmt::format("{} sequences of {} workers: each worker has at least one", question.sequences,
                    question.workers));
  }
  CKV_RETURN_IF_ERROR(question.shape.Validate());
  CKV_RETURN_IF_ERROR(question.method.Validate());
  const gpu::MethodOptions method = question.method.Resolved(question.shape);
  CKV_ASSIGN_OR_RETURN(const gpu::StateLayout layout,
                       gpu::StateLayout::Create(question.shape, method, question.max_tokens));
  SizePlan plan;
  plan.full_kv = question.shape.token_bytes() * question.max_tokens;
  DescribeState(layout, plan);
  plan.gpu_memory = question.sequences * RoundUp(plan.state, kDevicePage) +
                    question.workers * RoundUp(question.ring_bytes, kDevicePage);

  const uint64_t extent =
      PieceTable::LargestExtentBytes(question.shape, method, question.max_tokens);
  plan.host_chunk = question.host_chunk_bytes;
  if (plan.host_chunk != 0 && extent > plan.host_chunk) {
    return absl::InvalidArgumentError(
        fmt::format("host-chunk: {} is less than a segment of one KV head, {} bytes",
                    SizeText(plan.host_chunk), extent));
  }
  if (plan.host_chunk == 0) {
    // The chunk follows from the memory, and the memory is whole chunks. From below: it ends.
    plan.host_chunk = AutoHostChunk(0, ChunkUsers::kSessions);
    for (int i = 0; i < kChunkTries; ++i) {
      const uint64_t next =
          AutoHostChunk(HostMemory(question, method, plan.host_chunk), ChunkUsers::kSessions);
      if (next <= plan.host_chunk && extent <= plan.host_chunk) break;
      plan.host_chunk = std::max(next, 2 * plan.host_chunk);
    }
  }
  plan.host_memory = HostMemory(question, method, plan.host_chunk);
  const uint64_t of_containers = AutoHostChunk(UINT64_MAX, ChunkUsers::kContainers);
  plan.worker_gib = WorkerGib(
      question, method,
      extent <= of_containers ? std::min(plan.host_chunk, of_containers) : plan.host_chunk);
  plan.host =
      static_cast<uint64_t>(PieceTable::ChunksNeeded(question.shape, method, question.max_tokens,
                                                     question.max_tokens, plan.host_chunk) *
                            static_cast<double>(plan.host_chunk));
  return plan;
}

}  // namespace clusterkv::service
