// served: one layer of a step by one FetchClusters, inputs and outputs in an arena of the daemon's,
// all hits, over packets and by gRPC in turns; beside it the same layer by the client library in
// this process ("direct"), which waits for its stream after every layer, so that all times end with
// the output there.
//
// Both run against one private daemon. Times are a steady clock's, of the caller. A captured graph
// would not wait at all: that is what `step` measures.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "client/bench/bench_run.h"
#include "client/bench/cores.h"
#include "client/bench/key_model.h"
#include "client/client.h"
#include "client/client_session.h"
#include "client/connection.h"
#include "client/replay/interrupt.h"
#include "client/replay/private_daemon.h"
#include "client/sequence_impl.h"
#include "gpu/dtype.h"
#include "gpu/host/thread_pool.h"
#include "gpu/status_macros.h"

namespace clusterkv::client::bench {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint32_t kLayers = 2;  // of the model that is served: enough for one after another
constexpr uint32_t kIngestTokens = 2048;
constexpr uint32_t kWarmUpSteps = 8;
constexpr uint64_t kMegabyte = 1 << 20;
constexpr absl::Duration kPatience = absl::Minutes(2);

double MicrosecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

uint64_t Aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

class ServedBench {
 public:
  ServedBench(const BenchRun& run, uint32_t tokens, uint32_t budget, uint32_t batch)
      : run_(run), tokens_(tokens), batch_(batch), shape_(run.options.shape) {
    shape_.layers = std::min(shape_.layers, kLayers);
    method_ = run.options.method;
    method_.budget_tokens = budget;
    method_.seed = run.options.seed;
  }

  absl::Status Run() {
    CKV_RETURN_IF_ERROR(WriteInputs());
    replay::PrivateDaemonOptions daemon_options;
    daemon_options.backend = run_.backend.device().backend();
    daemon_options.memory = HostMemoryNeeded();
    CKV_ASSIGN_OR_RETURN(const auto daemon, replay::PrivateDaemon::Start(daemon_options));
    absl::Status status = Measure(daemon->address());
    const absl::Status stopped = daemon->Stop();
    return status.ok() ? stopped : status;
  }

  // Rows and positions of all sequences.
  uint64_t host_bytes() const {
    return uint64_t{batch_} * tokens_ *
           (shape_.token_bytes() + shape_.problems() * sizeof(uint32_t));
  }

 private:
  // One mode after the other, so that a daemon that is registered with both holds one at a time.
  absl::Status Measure(const std::string& address) {
    CKV_ASSIGN_OR_RETURN(const auto client,
                         Client::Connect({.address = address, .name = "clusterkv-bench"}));
    CKV_RETURN_IF_ERROR(TimeRoundTrips(address));
    for (const FetchMode mode : {FetchMode::kServed, FetchMode::kDirect}) {
      CKV_ASSIGN_OR_RETURN(const auto sequences, Decodable(*client, mode));
      if (mode == FetchMode::kServed) {
        CKV_RETURN_IF_ERROR(TimeServed(sequences));
      } else {
        CKV_ASSIGN_OR_RETURN(std::vector<double> samples, TimeDirect(*client, sequences));
        AddRow("direct", "none", std::move(samples));
      }
      for (const auto& sequence : sequences) CKV_RETURN_IF_ERROR(sequence->Release());
    }
    return absl::OkStatus();
  }

  void AddRow(const char* mode, const char* transport, std::vector<double> samples) const {
    run_.AddRow("served",
                {{"mode", mode},
                 {"transport", transport},
                 {"context", tokens_},
                 {"batch", batch_},
                 {"budget", method_.budget_tokens},
                 {"layers", shape_.layers},
                 {"kv_heads", shape_.kv_heads},
                 {"q_heads", shape_.q_heads},
                 {"head_dim", shape_.head_dim},
                 {"dtype", gpu::DTypeName(shape_.dtype)},
                 {"preset", run_.options.preset}},
                std::move(samples), LayerWork());
  }

  // Twice a mode's: what the other mode's sequences held is free a moment after their release.
  replay::HostMemory HostMemoryNeeded() const {
    const uint64_t segment =
        std::max(method_.prompt_segment_tokens, method_.decode_segment_tokens) *
        (shape_.row_bytes() + sizeof(uint32_t));
    replay::HostMemory memory;
    while (memory.chunk_bytes < 8 * segment && memory.chunk_bytes < 512 * kMegabyte) {
      memory.chunk_bytes *= 2;
    }
    const uint64_t chunks = 2 * (host_bytes() + host_bytes() / 4) / memory.chunk_bytes + 8;
    memory.total_bytes = std::max(memory.total_bytes, chunks * memory.chunk_bytes);
    return memory;
  }

  absl::Status WriteInputs() {
    gpu::Device& device = run_.backend.device();
    const size_t half = shape_.row_bytes() / 2;
    CKV_ASSIGN_OR_RETURN(tokens_kv_, device.AllocatePinned(2 * plane_bytes()));
    const KeyModel model(shape_, tokens_, run_.options.seed);
    gpu::host::ThreadPool threads(UsableCores());
    threads.ParallelFor(shape_.kv_heads, [&](size_t head) {
      std::vector<std::byte> rows(tokens_ * shape_.row_bytes());
      model.WriteRows(static_cast<uint32_t>(head), 0, tokens_, rows.data());
      for (size_t i = 0; i < 2 * size_t{tokens_}; ++i) {  // K and V of each token in turn
        std::memcpy(
            tokens_kv_->data() + i % 2 * plane_bytes() + (i / 2 * shape_.kv_heads + head) * half,
            &rows[i * half], half);
      }
    });
    // What a step takes and gives lies in device memory, as an engine has it.
    gpu::Stream& stream = run_.backend.stream();
    q_bytes_ = shape_.q_heads * shape_.head_dim * gpu::SizeOf(shape_.dtype);
    CKV_ASSIGN_OR_RETURN(queries_, device.Allocate(shape_.layers * batch_ * q_bytes_));
    CKV_ASSIGN_OR_RETURN(token_, device.Allocate(shape_.kv_heads * shape_.row_bytes()));
    CKV_ASSIGN_OR_RETURN(
        outputs_, device.Allocate(batch_ * shape_.q_heads * shape_.head_dim * sizeof(float)));
    CKV_ASSIGN_OR_RETURN(const auto staged, device.AllocatePinned(queries_->bytes()));
    for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
      for (uint32_t i = 0; i < batch_; ++i) {
        model.WriteQueries(i, layer, staged->data() + (layer * batch_ + i) * q_bytes_);
      }
    }
    CKV_RETURN_IF_ERROR(stream.CopyAsync(queries_->data(), staged->data(), queries_->bytes()));
    for (size_t plane = 0; plane < 2; ++plane) {
      CKV_RETURN_IF_ERROR(stream.CopyAsync(token_->data() + plane * shape_.kv_heads * half,
                                           tokens_kv_->data() + plane * plane_bytes(),
                                           shape_.kv_heads * half));
    }
    CKV_RETURN_IF_ERROR(stream.Synchronize());
    return absl::OkStatus();
  }

  size_t plane_bytes() const { return size_t{tokens_} * shape_.kv_heads * shape_.row_bytes() / 2; }

  // K and V of `position`, as all layers have them.
  gpu::KvSource SourceAt(uint32_t position) const {
    const size_t token = shape_.kv_heads * shape_.row_bytes() / 2;
    const std::byte* const k = tokens_kv_->data() + position * token;
    return {.k = k,
            .v = k + plane_bytes(),
            .token_stride = token,
            .head_stride = shape_.row_bytes() / 2};
  }
  // The same new token in every step, layer and sequence.
  gpu::KvSource NewToken() const {
    const size_t half = shape_.row_bytes() / 2;
    return {.k = token_->data(), .v = token_->data() + shape_.kv_heads * half, .head_stride = half};
  }

  // Sequences that have been ingested and published.
  absl::StatusOr<std::vector<std::unique_ptr<Sequence>>> Decodable(Client& client,
                                                                   FetchMode mode) const {
    std::vector<std::unique_ptr<Sequence>> sequences;
    SequenceOptions options = {.shape = shape_, .method = method_, .mode = mode};
    options.max_tokens = tokens_ + 2 * (kWarmUpSteps + steps());
    for (uint32_t i = 0; i < batch_; ++i) {
      CKV_ASSIGN_OR_RETURN(std::unique_ptr<Sequence> sequence, client.RegisterSequence(options));
      for (uint32_t position = 0; position < tokens_; position += kIngestTokens) {
        CKV_RETURN_IF_ERROR(replay::CheckInterrupt());
        const IngestRange range = {.position = position,
                                   .count = std::min(kIngestTokens, tokens_ - position),
                                   .layer_count = shape_.layers,
                                   .end_of_prompt = position + kIngestTokens >= tokens_};
        CKV_RETURN_IF_ERROR(sequence->Ingest(range, SourceAt(position), kPatience));
      }
      sequences.push_back(std::move(sequence));
    }
    for (const auto& sequence : sequences) {
      CKV_RETURN_IF_ERROR(sequence->WaitPublished(0, kPatience).status());
    }
    return sequences;
  }

  uint32_t steps() const { return (run_.options.repeats + shape_.layers - 1) / shape_.layers; }

  absl::StatusOr<std::vector<double>> TimeDirect(
      Client& client, const std::vector<std::unique_ptr<Sequence>>& sequences) const {
    std::vector<Sequence*> members;
    members.reserve(sequences.size());
    for (const auto& sequence : sequences) members.push_back(sequence.get());
    CKV_ASSIGN_OR_RETURN(const auto batch,
                         client.CreateBatch(members, {.stream = run_.backend.native_stream()}));
    // The host's batch has a stream that only End waits for: a step's share is what there is.
    const bool waits_per_layer = run_.backend.native_stream() != nullptr;
    std::vector<double> samples;
    for (uint32_t step = 0; step < kWarmUpSteps + steps(); ++step) {
      CKV_RETURN_IF_ERROR(replay::CheckInterrupt());
      const Clock::time_point step_start = Clock::now();
      CKV_RETURN_IF_ERROR(batch->Begin());
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        const Clock::time_point start = Clock::now();
        CKV_RETURN_IF_ERROR(batch->Append(layer, NewToken()));
        CKV_RETURN_IF_ERROR(batch->Attend(layer,
                                          {.q = queries_->data() + layer * batch_ * q_bytes_,
                                           .batch_stride = q_bytes_,
                                           .head_stride = q_bytes_ / shape_.q_heads},
                                          {.out = reinterpret_cast<float*>(outputs_->data()),
                                           .batch_stride = size_t{shape_.q_heads} * shape_.head_dim,
                                           .head_stride = shape_.head_dim}));
        if (!waits_per_layer) continue;
        CKV_RETURN_IF_ERROR(run_.backend.stream().Synchronize());
        if (step >= kWarmUpSteps) samples.push_back(MicrosecondsSince(start));
      }
      CKV_RETURN_IF_ERROR(batch->End());
      if (!waits_per_layer && step >= kWarmUpSteps) {
        samples.push_back(MicrosecondsSince(step_start) / shape_.layers);
      }
    }
    return samples;
  }

  // A call that the daemon answers at once: what gRPC itself takes.
  absl::Status TimeRoundTrips(const std::string& address) const {
    CKV_ASSIGN_OR_RETURN(const auto connection, Connection::Create(address));
    std::vector<double> samples;
    for (uint32_t i = 0; i < kWarmUpSteps + run_.options.repeats; ++i) {
      const Clock::time_point start = Clock::now();
      CKV_RETURN_IF_ERROR(connection->GetStatus({}, Deadline(kPatience)).status());
      if (i >= kWarmUpSteps) samples.push_back(MicrosecondsSince(start));
    }
    run_.AddRow("served", {{"mode", "round-trip"}, {"transport", "none"}, {"batch", batch_}},
                std::move(samples), Work());
    return absl::OkStatus();
  }

  // An engine that computes its q, k and v straight into the arena, and reads outputs there.
  absl::Status TimeServed(const std::vector<std::unique_ptr<Sequence>>& sequences) const {
    const auto& first = dynamic_cast<const SequenceImpl&>(*sequences.front());
    ClientSession& session = first.session();
    const uint64_t kv_bytes = shape_.kv_heads * shape_.row_bytes() / 2;
    const uint64_t output_bytes = uint64_t{shape_.q_heads} * (shape_.head_dim + 1) * sizeof(float);
    const uint64_t k = Aligned(q_bytes_), v = k + Aligned(kv_bytes), output = v + Aligned(kv_bytes);
    const uint64_t item_bytes = output + Aligned(output_bytes);
    CKV_ASSIGN_OR_RETURN(Arena arena, session.TakeIoArena(batch_ * item_bytes));
    struct Way {
      const char* transport;
      FetchCalls calls;
      std::vector<double> samples = {};
    };
    Way ways[] = {{"arena", session.OpenFetchCalls()},
                  {"arena, grpc", FetchCalls(session.connection(), nullptr)}};
    for (uint32_t step = 0; step < 2 * (kWarmUpSteps + steps()); ++step) {
      CKV_RETURN_IF_ERROR(replay::CheckInterrupt());
      Way& way = ways[step % 2];
      for (uint32_t layer = 0; layer < shape_.layers; ++layer) {
        CKV_RETURN_IF_ERROR(FillArena(arena.memory->data(), layer, item_bytes, k, v));
        const Clock::time_point start = Clock::now();
        v1::FetchClustersRequest request;
        *request.mutable_session() = session.reference();
        request.set_layer(layer);
        request.set_want_output(true);
        for (uint32_t i = 0; i < batch_; ++i) {
          v1::FetchItem& item = *request.add_items();
          item.set_sequence_id(sequences[i]->id());
          item.set_position(tokens_ + step);
          const auto place = [&](v1::ArenaRange* range, uint64_t offset, uint64_t bytes) {
            range->set_arena_id(arena.id);
            range->set_offset(i * item_bytes + offset);
            range->set_bytes(bytes);
          };
          place(item.mutable_q()->mutable_arena(), 0, q_bytes_);
          place(item.mutable_k()->mutable_arena(), k, kv_bytes);
          place(item.mutable_v()->mutable_arena(), v, kv_bytes);
          place(item.mutable_output_arena(), output, output_bytes);
        }
        const auto reply = way.calls.Call(std::move(request), 0, session.RpcDeadline());
        CKV_RETURN_IF_ERROR(reply.status());
        if (step >= 2 * kWarmUpSteps) way.samples.push_back(MicrosecondsSince(start));
      }
    }
    session.ReturnIoArena(std::move(arena));
    for (Way& way : ways) AddRow("served", way.transport, std::move(way.samples));
    return absl::OkStatus();
  }

  // Not timed.
  absl::Status FillArena(std::byte* arena, uint32_t layer, uint64_t item_bytes, uint64_t k,
                         uint64_t v) const {
    gpu::Stream& stream = run_.backend.stream();
    const size_t kv_bytes = shape_.kv_heads * shape_.row_bytes() / 2;
    for (uint32_t i = 0; i < batch_; ++i) {
      std::byte* const item = arena + i * item_bytes;
      CKV_RETURN_IF_ERROR(
          stream.CopyAsync(item, queries_->data() + (layer * batch_ + i) * q_bytes_, q_bytes_));
      const gpu::KvSource source = NewToken();
      CKV_RETURN_IF_ERROR(stream.CopyAsync(item + k, source.k, kv_bytes));
      CKV_RETURN_IF_ERROR(stream.CopyAsync(item + v, source.v, kv_bytes));
    }
    return stream.Synchronize();
  }

  // One layer: every centroid once (as many as the method aims at), every attended row once.
  Work LayerWork() const {
    const double items = static_cast<double>(batch_) * shape_.kv_heads;
    const double centroids = static_cast<double>(tokens_) / method_.tokens_per_cluster;
    const double rows = method_.sink_tokens + std::min(method_.budget_tokens, tokens_) +
                        method_.min_window_tokens + 1.0;
    const auto row_bytes = static_cast<double>(shape_.row_bytes());
    return {.device_bytes = items * (centroids * row_bytes / 2 + rows * row_bytes),
            .flops = items * shape_.group_size() * shape_.head_dim * (2 * centroids + 4 * rows)};
  }

  const BenchRun& run_;
  const uint32_t tokens_;
  const uint32_t batch_;
  gpu::Shape shape_;
  gpu::MethodOptions method_;
  size_t q_bytes_ = 0;                            // of one sequence and layer
  std::unique_ptr<gpu::DeviceMemory> tokens_kv_;  // pinned [K, V][tokens][kv_heads][head_dim]
  std::unique_ptr<gpu::DeviceMemory> queries_;    // [layers][batch][q_heads][head_dim]
  std::unique_ptr<gpu::DeviceMemory> token_;      // [K, V][kv_heads][head_dim]
  std::unique_ptr<gpu::DeviceMemory> outputs_;
};

}  // namespace

absl::Status MeasureServed(const BenchRun& run) {
  if (!run.options.Has("served")) return absl::OkStatus();
  for (const uint32_t tokens : run.options.contexts) {
    for (const uint32_t budget : run.options.budgets) {
      for (const uint32_t batch : run.options.batches) {
        ServedBench bench(run, tokens, budget, batch);
        if (bench.host_bytes() > run.options.store_memory) {
          run.AddNote(absl::StrCat("served: batch ", batch, " at context ", tokens,
                                   " was left out: ", bench.host_bytes(),
                                   " bytes of host store, more than --store-memory"));
          continue;
        }
        CKV_RETURN_IF_ERROR(bench.Run());
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace clusterkv::client::bench
