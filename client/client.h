// The C++ client of clusterkvd. A decode loop, in full:
//
//   auto client = Client::Connect({.address = "unix:/run/clusterkv/clusterkvd.sock"});
//   auto sequence = (*client)->RegisterSequence({.shape = shape, .method = method,
//                                                .max_tokens = 32768});
//   (*sequence)->Ingest({.count = n, .layer_count = shape.layers, .end_of_prompt = true}, kv);
//   (*sequence)->WaitPublished(n);
//   auto batch = (*client)->CreateBatch({sequence->get()});
//   for each token:
//     (*batch)->Begin();
//     for each layer:
//       (*batch)->Append(layer, new_kv);
//       (*batch)->Attend(layer, q, out);
//     (*batch)->End();
//   (*sequence)->Release();
//
// Direct and served sequences behind the same calls. All calls return canonical codes; a lost
// daemon is UNAVAILABLE, a passed deadline DEADLINE_EXCEEDED, and nothing hangs without one.
// Everything that takes K, V or queries reads them when the stream gets there: keep them until
// End() (or Ingest(), which copies before it returns).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gpu/decode_ops.h"
#include "gpu/device.h"
#include "gpu/method_options.h"
#include "gpu/shape.h"
#include "gpu/state_layout.h"

namespace clusterkv::client {

enum class FetchMode { kDirect, kServed };

struct ClientOptions {
  // unix:PATH or 127.0.0.1:PORT; empty: $CLUSTERKV_ADDRESS, which a container with a grant has, or
  // else unix:/run/clusterkv/clusterkvd.sock.
  std::string address = {};
  std::string name = {};  // for logs and listings
  // Of the ingest ring: at least 2 tokens of one layer, for direct sequences of all layers.
  uint64_t ring_bytes = 64ull << 20;
  absl::Duration rpc_timeout = absl::Seconds(30);
  int device_threads = 0;  // of the host backend's direct fetch; 0 = all cores
  // Share of the direct steps, 0 to 1, that the daemon compares with exact attention, a layer of a
  // sequence each, for its metrics of recall and missed attention. No step waits for that: samples
  // pass through a ring in device memory, some MiB for all batches, and what does not fit is
  // dropped. Captured batches take no part, nor does one that is made when the daemon has no memory
  // for the ring.
  double audit_rate = 0;
  // Served steps by gRPC alone. Otherwise each served batch has a connection of its own beside it,
  // for its calls that fit a packet of 128 KiB (proto/clusterkv/v1/fetch.proto): they cost a
  // fraction of gRPC's time.
  bool served_by_grpc = false;
};

struct SequenceOptions {
  gpu::Shape shape;
  gpu::MethodOptions method;
  uint32_t max_tokens = 0;
  uint32_t reserve_tokens = 0;  // host memory taken at once; 0 = max_tokens
  FetchMode mode = FetchMode::kDirect;
};

// A range of a prompt.
struct IngestRange {
  uint32_t position = 0;  // of the first token; each layer's positions follow without a gap
  uint32_t count = 0;
  uint32_t layer_begin = 0;
  uint32_t layer_count = 0;
  bool end_of_prompt = false;  // these are the last tokens of these layers
};

struct Published {
  uint32_t segments = 0;
  uint32_t cut = 0;  // first position that no published segment holds
};

class DecodeBatch;

// The KV cache of one request. Thread-compatible: one thread at a time. Destruction releases it.
class Sequence {
 public:
  virtual ~Sequence() = default;

  virtual uint64_t id() const = 0;
  virtual const SequenceOptions& options() const = 0;  // with the method Resolved
  virtual uint32_t length() const = 0;                 // tokens, as the last call left it

  // Hands over prompt tokens in pieces that fit the ring, waiting for credits up to `timeout`.
  // Source pointers: token `position` of layer `layer_begin`, with layer, token and head strides.
  // Errors: INVALID_ARGUMENT, FAILED_PRECONDITION (not the next position), RESOURCE_EXHAUSTED
  // (host pool, or no credit within the timeout), OUT_OF_RANGE (max_tokens). After
  // RESOURCE_EXHAUSTED the same range may be passed again: pieces that went over are skipped.
  virtual absl::Status Ingest(const IngestRange& range, const gpu::KvSource& source,
                              absl::Duration timeout = absl::Seconds(60)) = 0;
  // Waits until everything the segment rules allow at `length` tokens is published (first hands
  // over decoded tokens that still lie with the client). Below the prompt's end, these are its full
  // segments; 0 = all of the prompt, once its end has been ingested (else FAILED_PRECONDITION).
  virtual absl::StatusOr<Published> WaitPublished(uint32_t length,
                                                  absl::Duration timeout = absl::Seconds(60)) = 0;
  // What is known to be published, without a call.
  virtual Published published() const = 0;
  // Hits and misses of one layer since registration. Between steps only. Served: the sum of the
  // replies, so what a reply that was lost would have told is missing.
  virtual gpu::LayerCounters counters(uint32_t layer) const = 0;
  // After the last step. Idempotent. Its host memory is free a moment later, once this process has
  // unmapped it.
  virtual absl::Status Release() = 0;
};

struct BatchOptions {
  bool want_selection = false;  // makes DecodeBatch::Selection work
  // Direct, backend cuda: the caller's cudaStream_t, in which the steps run; it must outlive the
  // batch. Null: a stream of the batch's own, which the caller's work must then wait for.
  void* stream = nullptr;
  // Steps are captured in a CUDA graph of the caller's; see DecodeBatch::Prepare. Direct only.
  bool captured = false;
};

// Sequences that decode together: one shape, one mode. Thread-compatible; at most one step of a
// sequence is open at a time. The sequences must outlive it.
class DecodeBatch {
 public:
  virtual ~DecodeBatch() = default;

  // Of a captured batch: what a step needs of the host, before its replay. The whole way is
  //
  //   batch->Prepare();                          before every step
  //   once: cudaStreamBeginCapture; Begin; Append, Attend of every layer; End; cudaStreamEndCapture
  //   cudaGraphLaunch(exec, stream);
  //   batch->Complete();                         after every step
  //
  // Begin to End then only enqueue, on BatchOptions::stream. Sequences may be published to and
  // released; a batch of other sequences is captured anew. Errors: as Begin; FAILED_PRECONDITION
  // if the batch is not a captured one, or `budget_tokens` differs from the captured step's.
  virtual absl::Status Prepare(uint32_t budget_tokens = 0) = 0;
  // Waits for the replay; as End of a step that is not captured. Errors: also FAILED_PRECONDITION
  // if nothing was captured or the step was not prepared.
  virtual absl::Status Complete() = 0;

  // Errors: RESOURCE_EXHAUSTED (a window is full until the daemon has caught up; nothing was
  // written, call again later), OUT_OF_RANGE (max_tokens), FAILED_PRECONDITION (prompt not ended,
  // a step is open). budget_tokens 0 = the sequences' own; never above it.
  virtual absl::Status Begin(uint32_t budget_tokens = 0) = 0;
  // This step's K and V: [batch][kv_heads][head_dim] with batch and head strides.
  virtual absl::Status Append(uint32_t layer, const gpu::KvSource& source) = 0;
  // Output of one layer. Layers in rising order, each after its Append. Complete
  // when it returns for served, when the stream has passed (End) for direct.
  virtual absl::Status Attend(uint32_t layer, const gpu::QuerySource& queries,
                              const gpu::AttentionTarget& target) = 0;
  // Token positions that the last Attend selected for sequence `index`: [kv_heads][budget], -1
  // beyond the last, clusters in falling score. Waits for the stream.
  virtual absl::StatusOr<std::vector<int32_t>> Selection(size_t index) = 0;
  // Waits for the step, reports its errors, hands decoded tokens on to the daemon as they gather.
  // Every layer must have been attended: else FAILED_PRECONDITION, and the step stays open. After
  // any other error, or if the batch is destroyed with the step open, its sequences cannot go on.
  virtual absl::Status End() = 0;
};

// A session with one daemon: its life is this object's. Thread-safe.
class Client {
 public:
  // Errors: UNAVAILABLE (no daemon there), FAILED_PRECONDITION (versions), PERMISSION_DENIED (uid
  // or gid not allowed), INVALID_ARGUMENT.
  static absl::StatusOr<std::unique_ptr<Client>> Connect(const ClientOptions& options);
  virtual ~Client() = default;

  // Errors: INVALID_ARGUMENT, UNAVAILABLE (draining), RESOURCE_EXHAUSTED (sequences, device memory,
  // host pool: where the message says that bytes are in quarantine, they were released and will be
  // free soon, so trying again a little later may do).
  virtual absl::StatusOr<std::unique_ptr<Sequence>> RegisterSequence(
      const SequenceOptions& options) = 0;
  virtual absl::StatusOr<std::unique_ptr<DecodeBatch>> CreateBatch(
      const std::vector<Sequence*>& sequences, const BatchOptions& options = {}) = 0;

  virtual const std::string& backend() const = 0;
  // What this process decodes on. For `cuda` K, V, queries and outputs lie in its memory, or pinned
  // on the host.
  virtual gpu::Device& device() = 0;
  virtual uint64_t session_id() const = 0;
  // Not OK once the session has ended: why.
  virtual absl::Status health() const = 0;
};

}  // namespace clusterkv::client
