// The C interface of clusterkv's client (libclusterkv). A decode loop, in full; `check` is the
// caller's, and deals with what is not CLUSTERKV_OK:
//
//   clusterkv_client* client;
//   clusterkv_client_options client_options = CLUSTERKV_CLIENT_OPTIONS_INIT;
//   client_options.address = "unix:/run/clusterkv/clusterkvd.sock";
//   check(clusterkv_client_connect(&client_options, &client));
//
//   clusterkv_method_options method = CLUSTERKV_METHOD_OPTIONS_INIT;
//   method.preset = "default";
//   method.budget_tokens = 2048;
//   clusterkv_sequence* sequence;
//   clusterkv_sequence_options sequence_options = CLUSTERKV_SEQUENCE_OPTIONS_INIT;
//   sequence_options.method = &method;
//   sequence_options.layers = 32;
//   sequence_options.kv_heads = 8;
//   sequence_options.q_heads = 32;
//   sequence_options.head_dim = 128;
//   sequence_options.dtype = CLUSTERKV_DTYPE_BF16;
//   sequence_options.max_tokens = 32768;
//   check(clusterkv_sequence_register(client, &sequence_options, &sequence));
//
//   clusterkv_range prompt = CLUSTERKV_RANGE_INIT;
//   prompt.count = prompt_tokens;
//   prompt.layer_count = 32;
//   prompt.end_of_prompt = 1;
//   clusterkv_kv kv = CLUSTERKV_KV_INIT;
//   kv.k = prompt_k;  // [layer][token][kv_head][head_dim], post-RoPE
//   kv.v = prompt_v;
//   check(clusterkv_sequence_ingest(sequence, &prompt, &kv, 60.0));
//   check(clusterkv_sequence_wait_published(sequence, prompt_tokens, 60.0, NULL, NULL));
//
//   clusterkv_batch* batch;
//   check(clusterkv_batch_create(client, &sequence, 1, NULL, &batch));
//   while (has_token()) {
//     check(clusterkv_batch_begin(batch, 0));
//     for (uint32_t layer = 0; layer < 32; ++layer) {
//       project(layer, k, v, q);
//       clusterkv_kv step_kv = CLUSTERKV_KV_INIT;
//       step_kv.k = k;  // [batch][kv_head][head_dim]
//       step_kv.v = v;
//       check(clusterkv_batch_append(batch, layer, &step_kv));
//       clusterkv_attention attention = CLUSTERKV_ATTENTION_INIT;
//       attention.q = q;      // [batch][q_head][head_dim]
//       attention.out = out;  // fp32, likewise
//       check(clusterkv_batch_attend(batch, layer, &attention));
//       use(layer, out);  // direct: in the batch's stream, or after clusterkv_batch_end
//     }
//     check(clusterkv_batch_end(batch));
//   }
//
//   clusterkv_batch_destroy(batch);
//   check(clusterkv_sequence_release(sequence));
//   clusterkv_sequence_destroy(sequence);
//   clusterkv_client_close(client);
//
// Errors. Calls return canonical gRPC codes; a lost daemon is UNAVAILABLE, a passed deadline
// DEADLINE_EXCEEDED, and nothing waits without one. clusterkv_last_error() has the text. Every call
// can fail with INVALID_ARGUMENT (a handle or pointer that must be given is null, a struct_size, a
// value out of range), UNAVAILABLE, RESOURCE_EXHAUSTED and INTERNAL; "Errors:" below lists others,
// and what these mean. Nothing is thrown. A call that fails sets its result handle to null and
// leaves its other results as they were, unless its comment says otherwise.
//
// Structs. Begin with the struct's _INIT macro: it fills in struct_size and the defaults. Later
// versions append members, and a library takes the shorter structs of programs built before it. A
// longer one, of a program built after it, is INVALID_ARGUMENT. What a struct points to is read
// during the call only, but for tensors.
//
// Tensors. Strides are in bytes; the innermost dimension, head_dim, is contiguous. A stride of 0
// means that of the packed tensor whose dimensions are given at the struct. Pointers and strides
// are multiples of the element size. On backend `host` tensors lie in host memory; on `cuda` in
// memory of the device that clusterkv_client_get_info names, or pinned on the host. They are read
// and written when the stream gets there: keep them until clusterkv_batch_end(), or, for
// clusterkv_sequence_ingest(), until it returns.
//
// Threads. Calls for a client may come from any threads at once. Calls for a sequence or a batch,
// and those for the sequences of a batch and the batch, come one at a time; which thread they come
// from does not matter. Nobody else uses a handle while it is being closed or destroyed. After
// fork() the child uses none.
//
// Lifetimes. Handles may go in any order: a sequence without its client answers CANCELLED, a batch
// without one of its sequences FAILED_PRECONDITION. But end or destroy the batch of an open step
// before the client is closed. The library stays loaded once it is.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define CLUSTERKV_VERSION_MAJOR 0
#define CLUSTERKV_VERSION_MINOR 1
#define CLUSTERKV_VERSION_PATCH 0
#define CLUSTERKV_VERSION "0.1.0"

#if defined(__GNUC__)
#define CLUSTERKV_API __attribute__((visibility("default")))
#else
#define CLUSTERKV_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum clusterkv_status {
  CLUSTERKV_OK = 0,
  CLUSTERKV_CANCELLED = 1,
  CLUSTERKV_UNKNOWN = 2,
  CLUSTERKV_INVALID_ARGUMENT = 3,
  CLUSTERKV_DEADLINE_EXCEEDED = 4,
  CLUSTERKV_NOT_FOUND = 5,
  CLUSTERKV_ALREADY_EXISTS = 6,
  CLUSTERKV_PERMISSION_DENIED = 7,
  CLUSTERKV_RESOURCE_EXHAUSTED = 8,
  CLUSTERKV_FAILED_PRECONDITION = 9,
  CLUSTERKV_ABORTED = 10,
  CLUSTERKV_OUT_OF_RANGE = 11,
  CLUSTERKV_UNIMPLEMENTED = 12,
  CLUSTERKV_INTERNAL = 13,
  CLUSTERKV_UNAVAILABLE = 14,
  CLUSTERKV_DATA_LOSS = 15,
  CLUSTERKV_UNAUTHENTICATED = 16
} clusterkv_status;

// Storage types of K, V and queries. Outputs are fp32 always.
typedef enum clusterkv_dtype {
  CLUSTERKV_DTYPE_BF16 = 1,
  CLUSTERKV_DTYPE_FP16 = 2,
  CLUSTERKV_DTYPE_FP32 = 3  // backend host only
} clusterkv_dtype;

// Who runs a decode step: this process over memory that the daemon lends it, or the daemon.
typedef enum clusterkv_mode { CLUSTERKV_MODE_DIRECT = 1, CLUSTERKV_MODE_SERVED = 2 } clusterkv_mode;

// How the query heads that share a KV head agree on one list of clusters: softmax over the
// centroids per query head and summed, mean or maximum of the scaled scores.
typedef enum clusterkv_group_rule {
  CLUSTERKV_GROUP_SOFTMAX = 1,
  CLUSTERKV_GROUP_MEAN = 2,
  CLUSTERKV_GROUP_MAX = 3
} clusterkv_group_rule;

typedef struct clusterkv_client clusterkv_client;
typedef struct clusterkv_sequence clusterkv_sequence;
typedef struct clusterkv_batch clusterkv_batch;

// "MAJOR.MINOR.PATCH" of the library; CLUSTERKV_VERSION is that of this header.
CLUSTERKV_API const char* clusterkv_version(void);

// What went wrong, with names and numbers, in this thread's last call that failed; "" before the
// first. Calls that succeed leave it. At most 1,023 bytes; valid until the thread's next call that
// fails, or its end. Languages that move work between threads read it on the thread of the call.
CLUSTERKV_API const char* clusterkv_last_error(void);

// "OK", "INVALID_ARGUMENT" and so forth; "UNKNOWN" for a number that is no code. Never null.
CLUSTERKV_API const char* clusterkv_status_name(clusterkv_status status);

// --- Client: a session with one daemon ----------------------------------------------------------

typedef struct clusterkv_client_options {
  size_t struct_size;
  // "unix:/PATH" or "127.0.0.1:PORT"; "": $CLUSTERKV_ADDRESS, which a container with a grant has,
  // or else "unix:/run/clusterkv/clusterkvd.sock".
  const char* address;
  const char* name;  // for logs and listings, at most 128 bytes
  // Of the ingest ring: at least 2 tokens of one layer, for direct sequences of all layers.
  uint64_t ring_bytes;
  double rpc_timeout_seconds;  // above 0; of every call to the daemon that has none of its own
  uint32_t device_threads;     // of the host backend's direct fetch, at most 1024; 0 = all cores
  uint32_t reserved;           // 0
  // Share of the direct steps, 0 to 1, that the daemon compares with exact attention, for its
  // metrics of recall and missed attention. No step waits for that: samples pass through a ring in
  // device memory, some MiB for all batches, and what does not fit is dropped. Captured batches
  // take no part, nor does one that is made when the daemon has no memory for the ring.
  double audit_rate;
} clusterkv_client_options;

#define CLUSTERKV_CLIENT_OPTIONS_INIT \
  { sizeof(clusterkv_client_options), "", "", 67108864, 30.0, 0, 0, 0.0 }

// Strings are valid until the client is closed.
typedef struct clusterkv_client_info {
  size_t struct_size;
  uint64_t session_id;
  const char* backend;             // what steps of this client run on: "host" or "cuda"
  const char* device_uuid;         // of the GPU, "GPU-..."; "" for the host backend
  const char* device_description;  // for people
} clusterkv_client_info;

#define CLUSTERKV_CLIENT_INFO_INIT \
  { sizeof(clusterkv_client_info), 0, NULL, NULL, NULL }

// Options may be null: the defaults. Errors: UNAVAILABLE (no daemon there), FAILED_PRECONDITION
// (versions), PERMISSION_DENIED (uid or gid not allowed).
CLUSTERKV_API clusterkv_status clusterkv_client_connect(const clusterkv_client_options* options,
                                                        clusterkv_client** client);
CLUSTERKV_API clusterkv_status clusterkv_client_get_info(const clusterkv_client* client,
                                                         clusterkv_client_info* info);
// Not OK once the session has ended: why.
CLUSTERKV_API clusterkv_status clusterkv_client_health(const clusterkv_client* client);
// Ends the session and frees the client. Takes at most 3 s, whatever the daemon does. Null:
// nothing.
CLUSTERKV_API void clusterkv_client_close(clusterkv_client* client);

// --- Sequence: the KV cache of one request ------------------------------------------------------

// In a parameter of the method: the preset's own.
#define CLUSTERKV_PRESET UINT32_MAX

// Parameters of the method, gpu/method_options.h, whatever differs from the preset's.
typedef struct clusterkv_method_options {
  size_t struct_size;
  const char* preset;              // "default" or "paper"
  uint64_t seed;                   // of k-means
  double softmax_scale;            // 0 = 1 / sqrt(head_dim)
  uint32_t sink_tokens;            // first tokens, always attended; 0..1024
  uint32_t min_window_tokens;      // newest tokens, always attended, at least; 0..65,536
  uint32_t decode_segment_tokens;  // clustered together while decoding; 1..65,536
  uint32_t prompt_segment_tokens;  // clustered together of the prompt; 1..65,536
  uint32_t tokens_per_cluster;     // mean; a cluster of over four times as many is split; 1..4096
  uint32_t kmeans_iterations;      // limit; 1..1000
  uint32_t group;                  // clusterkv_group_rule
  uint32_t center_keys;            // 1: subtract the segment's mean key before k-means; 0, 1
  uint32_t estimate;               // 1: unselected clusters count by their means and size; 0, 1
  uint32_t window_lag_segments;    // decode segments the window may run ahead of publishing; 0..64
  uint32_t budget_tokens;          // largest budget of a step; 1..1,048,576
  // Cluster cache of one (layer, KV head); 0 = 4 * budget_tokens + 4 * tokens_per_cluster. At least
  // 2 * budget_tokens + 4 * tokens_per_cluster.
  uint32_t cache_tokens;
} clusterkv_method_options;

#define CLUSTERKV_METHOD_OPTIONS_INIT                                                             \
  {                                                                                               \
    sizeof(clusterkv_method_options), "default", 0, 0.0, CLUSTERKV_PRESET, CLUSTERKV_PRESET,      \
        CLUSTERKV_PRESET, CLUSTERKV_PRESET, CLUSTERKV_PRESET, CLUSTERKV_PRESET, CLUSTERKV_PRESET, \
        CLUSTERKV_PRESET, CLUSTERKV_PRESET, CLUSTERKV_PRESET, CLUSTERKV_PRESET, CLUSTERKV_PRESET  \
  }

// Query head h reads KV head h / (q_heads / kv_heads).
typedef struct clusterkv_sequence_options {
  size_t struct_size;
  const clusterkv_method_options* method;  // null: preset "default"
  uint32_t layers;                         // managed layers, 1..1024
  uint32_t kv_heads;                       // 1..1024
  uint32_t q_heads;                        // kv_heads * (1..16)
  uint32_t head_dim;                       // 64, 96, 128 or 256
  uint32_t dtype;                          // clusterkv_dtype
  uint32_t max_tokens;                     // prompt and decoded
  uint32_t reserve_tokens;                 // host memory taken at once; 0 = max_tokens
  uint32_t mode;                           // clusterkv_mode
} clusterkv_sequence_options;

#define CLUSTERKV_SEQUENCE_OPTIONS_INIT \
  { sizeof(clusterkv_sequence_options), NULL, 0, 0, 0, 0, 0, 0, 0, CLUSTERKV_MODE_DIRECT }

// A range of a prompt.
typedef struct clusterkv_range {
  size_t struct_size;
  uint32_t position;  // of the first token; each layer's positions follow without a gap
  uint32_t count;
  uint32_t layer_begin;
  uint32_t layer_count;
  uint32_t end_of_prompt;  // 1: these are the last tokens of these layers; 0, 1
  uint32_t reserved;       // 0
} clusterkv_range;

#define CLUSTERKV_RANGE_INIT \
  { sizeof(clusterkv_range), 0, 0, 0, 0, 0, 0 }

// K and V in the sequence's dtype. For clusterkv_sequence_ingest: [layer][token][kv_head][head_dim]
// of the range, without batch_stride. For clusterkv_batch_append: [batch][kv_head][head_dim],
// without layer_stride and token_stride. Strides in bytes.
typedef struct clusterkv_kv {
  size_t struct_size;
  const void* k;
  const void* v;
  size_t batch_stride;
  size_t layer_stride;
  size_t token_stride;
  size_t head_stride;
} clusterkv_kv;

#define CLUSTERKV_KV_INIT \
  { sizeof(clusterkv_kv), NULL, NULL, 0, 0, 0, 0 }

// Of one layer, since registration; they only grow. Selected = hit + missed.
typedef struct clusterkv_counters {
  size_t struct_size;
  uint64_t hit_clusters, missed_clusters;
  uint64_t hit_tokens, missed_tokens;  // of whole clusters
  uint64_t gathered_bytes;             // from the daemon's host memory
} clusterkv_counters;

#define CLUSTERKV_COUNTERS_INIT \
  { sizeof(clusterkv_counters), 0, 0, 0, 0, 0 }

// Errors: UNAVAILABLE (also: draining), RESOURCE_EXHAUSTED (sequences, device memory, host memory:
// where the text says that bytes are in quarantine, trying again a little later may do).
CLUSTERKV_API clusterkv_status
clusterkv_sequence_register(clusterkv_client* client, const clusterkv_sequence_options* options,
                            clusterkv_sequence** sequence);
CLUSTERKV_API clusterkv_status clusterkv_sequence_id(const clusterkv_sequence* sequence,
                                                     uint64_t* id);
// The method as it was registered: no CLUSTERKV_PRESET, no default left open. `preset` is null.
CLUSTERKV_API clusterkv_status clusterkv_sequence_get_method(const clusterkv_sequence* sequence,
                                                             clusterkv_method_options* method);
// Tokens, prompt and decoded, as the last call left it.
CLUSTERKV_API clusterkv_status clusterkv_sequence_length(const clusterkv_sequence* sequence,
                                                         uint32_t* length);
// Hands over prompt tokens, waiting for room up to the timeout. Errors: FAILED_PRECONDITION (not
// the next position), RESOURCE_EXHAUSTED (host memory, or no room in time), OUT_OF_RANGE
// (max_tokens). After RESOURCE_EXHAUSTED the same range may be passed again: it goes on where it
// stopped.
CLUSTERKV_API clusterkv_status clusterkv_sequence_ingest(clusterkv_sequence* sequence,
                                                         const clusterkv_range* range,
                                                         const clusterkv_kv* kv,
                                                         double timeout_seconds);
// Waits until everything the segment rules allow at `length` tokens is published, and tells what
// is: segments, and the first position that none of them holds; either may be null. Below the
// prompt's end, these are its full segments; 0 = all of the prompt, once its end has been ingested.
// Errors: DEADLINE_EXCEEDED, FAILED_PRECONDITION (0, and the prompt has not ended), OUT_OF_RANGE
// (max_tokens).
CLUSTERKV_API clusterkv_status clusterkv_sequence_wait_published(clusterkv_sequence* sequence,
                                                                 uint32_t length,
                                                                 double timeout_seconds,
                                                                 uint32_t* segments, uint32_t* cut);
// What is known to be published, without a call to the daemon. Either may be null.
CLUSTERKV_API clusterkv_status clusterkv_sequence_published(const clusterkv_sequence* sequence,
                                                            uint32_t* segments, uint32_t* cut);
// Between steps, and after the release.
CLUSTERKV_API clusterkv_status clusterkv_sequence_get_counters(const clusterkv_sequence* sequence,
                                                               uint32_t layer,
                                                               clusterkv_counters* counters);
// After the last step: gives the sequence back to the daemon, whose memory is free a moment later.
// Idempotent. Errors: FAILED_PRECONDITION (a step is open).
CLUSTERKV_API clusterkv_status clusterkv_sequence_release(clusterkv_sequence* sequence);
// Frees the handle; releases the sequence if that has not been done, with a step open once its
// batch goes. Waits at most 5 s. Null: nothing.
CLUSTERKV_API void clusterkv_sequence_destroy(clusterkv_sequence* sequence);

// --- Batch: sequences that decode together ------------------------------------------------------

typedef struct clusterkv_batch_options {
  size_t struct_size;
  // Direct, backend cuda: the cudaStream_t in which the steps run; it must outlive the batch. Null:
  // a stream of the batch's own, which the caller's work must then wait for.
  void* cuda_stream;
  uint32_t want_selection;  // 1: clusterkv_batch_selection works; 0, 1
  // 1: steps are captured in a CUDA graph of the caller's, see clusterkv_batch_prepare; 0, 1.
  // Direct only, and with a cuda_stream.
  uint32_t captured;
} clusterkv_batch_options;

#define CLUSTERKV_BATCH_OPTIONS_INIT \
  { sizeof(clusterkv_batch_options), NULL, 0, 0 }

// Queries, in the sequences' dtype: [batch][q_head][head_dim]. Outputs, fp32: out likewise, lse
// [batch][q_head], the natural logarithm of the sum of exponentials; lse may be null. Strides in
// bytes.
typedef struct clusterkv_attention {
  size_t struct_size;
  const void* q;
  size_t q_batch_stride;
  size_t q_head_stride;
  float* out;
  size_t out_batch_stride;
  size_t out_head_stride;
  float* lse;
  size_t lse_batch_stride;
} clusterkv_attention;

#define CLUSTERKV_ATTENTION_INIT \
  { sizeof(clusterkv_attention), NULL, 0, 0, NULL, 0, 0, NULL, 0 }

// The sequences have one shape and one mode; one step of a sequence is open at a time, in whichever
// batch. Options may be null: the defaults.
CLUSTERKV_API clusterkv_status clusterkv_batch_create(clusterkv_client* client,
                                                      clusterkv_sequence* const* sequences,
                                                      size_t count,
                                                      const clusterkv_batch_options* options,
                                                      clusterkv_batch** batch);
// Of a captured batch: what a step needs of the host, before its replay. The whole way is
//
//   check(clusterkv_batch_prepare(batch, 0));     // before every step
//   if (exec == NULL) {                           // the first step: captured
//     cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
//     check(clusterkv_batch_begin(batch, 0));
//     ...                                         // append and attend of every layer
//     check(clusterkv_batch_end(batch));
//     cudaStreamEndCapture(stream, &graph);
//     cudaGraphInstantiate(&exec, graph, 0);
//   }
//   cudaGraphLaunch(exec, stream);
//   check(clusterkv_batch_complete(batch));       // after every step
//
// Begin to end then only enqueue, on cuda_stream, and the pointers that append and attend were
// given are those of every replay. Sequences may be published to and released; a batch of other
// sequences is captured anew. Errors: as clusterkv_batch_begin; FAILED_PRECONDITION (the batch was
// made without captured, or budget_tokens differs from the captured step's).
CLUSTERKV_API clusterkv_status clusterkv_batch_prepare(clusterkv_batch* batch,
                                                       uint32_t budget_tokens);
// Waits for the replay; as clusterkv_batch_end of a step that is not captured. Errors:
// FAILED_PRECONDITION (the batch was made without captured, no step has been captured, or none is
// prepared).
CLUSTERKV_API clusterkv_status clusterkv_batch_complete(clusterkv_batch* batch);
// Opens a step. budget_tokens: clustered tokens attended per KV head, beside sinks and window; 0 =
// the sequences' own, never above it. Errors: RESOURCE_EXHAUSTED (a window is full until the daemon
// has caught up; nothing was written, call again later), OUT_OF_RANGE (max_tokens),
// FAILED_PRECONDITION (prompt not ended, a step is open).
CLUSTERKV_API clusterkv_status clusterkv_batch_begin(clusterkv_batch* batch,
                                                     uint32_t budget_tokens);
// This step's K and V of one layer. Errors: FAILED_PRECONDITION (order).
CLUSTERKV_API clusterkv_status clusterkv_batch_append(clusterkv_batch* batch, uint32_t layer,
                                                      const clusterkv_kv* kv);
// Output of one layer: layers in rising order, each after its append. Complete when this returns
// for served, when the stream has passed (clusterkv_batch_end) for direct. Errors:
// FAILED_PRECONDITION (order).
CLUSTERKV_API clusterkv_status clusterkv_batch_attend(clusterkv_batch* batch, uint32_t layer,
                                                      const clusterkv_attention* attention);
// Token positions that the open step's last attend selected for sequence `index` of the batch:
// [kv_heads][budget_tokens of the step], -1 beyond the last, clusters in falling score. `capacity`
// is the room at `positions`, `count` (may be null) what was written, or, if the room is too small
// (INVALID_ARGUMENT), would be. Waits for the stream. Errors: FAILED_PRECONDITION (made without
// want_selection, nothing attended).
CLUSTERKV_API clusterkv_status clusterkv_batch_selection(clusterkv_batch* batch, size_t index,
                                                         int32_t* positions, size_t capacity,
                                                         size_t* count);
// Waits for the step and reports its errors. Every layer must have been attended: else
// FAILED_PRECONDITION, and the step stays open. After any other error the sequences cannot go on.
CLUSTERKV_API clusterkv_status clusterkv_batch_end(clusterkv_batch* batch);
// Waits for the stream; the sequences of a step that is open cannot go on. Null: nothing.
CLUSTERKV_API void clusterkv_batch_destroy(clusterkv_batch* batch);

#ifdef __cplusplus
}  // extern "C"
#endif
