// The C interface against its callers' mistakes: each is a code and a text, and costs nothing else.
#include <math.h>
#include <signal.h>
#include <string.h>
#include <threads.h>

#include "client/c/clusterkv.h"
#include "tests/client/c/check.h"
#include "tests/client/c/dense.h"
#include "tests/client/c/private_daemon.h"
#include "tests/client/c/scene.h"

// The call is refused, and the text has `part`.
#define CHECK_REFUSED(code, part, call)                    \
  do {                                                     \
    CHECK_STATUS(code, call);                              \
    CHECK(strstr(clusterkv_last_error(), (part)) != NULL); \
  } while (0)
#define CHECK_INVALID(part, call) CHECK_REFUSED(CLUSTERKV_INVALID_ARGUMENT, part, call)

static struct dense dense;

static void header_and_library_agree(void) {
  char numbers[32];
  snprintf(numbers, sizeof(numbers), "%d.%d.%d", CLUSTERKV_VERSION_MAJOR, CLUSTERKV_VERSION_MINOR,
           CLUSTERKV_VERSION_PATCH);
  CHECK(strcmp(clusterkv_version(), CLUSTERKV_VERSION) == 0);
  CHECK(strcmp(clusterkv_version(), numbers) == 0);
  CHECK(strcmp(clusterkv_status_name(CLUSTERKV_OK), "OK") == 0);
  CHECK(strcmp(clusterkv_status_name(CLUSTERKV_UNAUTHENTICATED), "UNAUTHENTICATED") == 0);
  CHECK(strcmp(clusterkv_status_name((clusterkv_status)17), "UNKNOWN") == 0);
}

static int no_error_yet(void* unused) {
  (void)unused;
  if (strcmp(clusterkv_last_error(), "") != 0) return 1;
  return clusterkv_client_health(NULL) == CLUSTERKV_INVALID_ARGUMENT &&
                 strcmp(clusterkv_last_error(), "client is null") == 0
             ? 0
             : 2;
}

static void last_error_is_of_the_thread(void) {
  uint32_t length;
  CHECK_INVALID("sequence is null", clusterkv_sequence_length(NULL, &length));
  thrd_t thread;
  int result = -1;
  CHECK(thrd_create(&thread, no_error_yet, NULL) == thrd_success);
  CHECK(thrd_join(thread, &result) == thrd_success && result == 0);
  CHECK(strcmp(clusterkv_last_error(), "sequence is null") == 0);
}

static void null_handles_are_refused(void) {
  const clusterkv_status invalid = CLUSTERKV_INVALID_ARGUMENT;
  clusterkv_client_info info = CLUSTERKV_CLIENT_INFO_INIT;
  clusterkv_method_options method = CLUSTERKV_METHOD_OPTIONS_INIT;
  clusterkv_sequence_options options = CLUSTERKV_SEQUENCE_OPTIONS_INIT;
  clusterkv_range range = CLUSTERKV_RANGE_INIT;
  clusterkv_kv kv = CLUSTERKV_KV_INIT;
  clusterkv_counters counters = CLUSTERKV_COUNTERS_INIT;
  clusterkv_attention attention = CLUSTERKV_ATTENTION_INIT;
  clusterkv_sequence* sequence = NULL;
  clusterkv_batch* batch = NULL;
  uint64_t id;
  int32_t position;
  CHECK_STATUS(invalid, clusterkv_client_connect(NULL, NULL));
  CHECK_STATUS(invalid, clusterkv_client_get_info(NULL, &info));
  CHECK_STATUS(invalid, clusterkv_client_health(NULL));
  CHECK_STATUS(invalid, clusterkv_sequence_register(NULL, &options, &sequence));
  CHECK_STATUS(invalid, clusterkv_sequence_id(NULL, &id));
  CHECK_STATUS(invalid, clusterkv_sequence_get_method(NULL, &method));
  CHECK_STATUS(invalid, clusterkv_sequence_ingest(NULL, &range, &kv, 1.0));
  CHECK_STATUS(invalid, clusterkv_sequence_wait_published(NULL, 0, 1.0, NULL, NULL));
  CHECK_STATUS(invalid, clusterkv_sequence_published(NULL, NULL, NULL));
  CHECK_STATUS(invalid, clusterkv_sequence_get_counters(NULL, 0, &counters));
  CHECK_STATUS(invalid, clusterkv_sequence_release(NULL));
  CHECK_STATUS(invalid, clusterkv_batch_create(NULL, &sequence, 1, NULL, &batch));
  CHECK_STATUS(invalid, clusterkv_batch_prepare(NULL, 0));
  CHECK_STATUS(invalid, clusterkv_batch_complete(NULL));
  CHECK_STATUS(invalid, clusterkv_batch_begin(NULL, 0));
  CHECK_STATUS(invalid, clusterkv_batch_append(NULL, 0, &kv));
  CHECK_STATUS(invalid, clusterkv_batch_attend(NULL, 0, &attention));
  CHECK_STATUS(invalid, clusterkv_batch_selection(NULL, 0, &position, 1, NULL));
  CHECK_STATUS(invalid, clusterkv_batch_end(NULL));
  clusterkv_client_close(NULL);
  clusterkv_sequence_destroy(NULL);
  clusterkv_batch_destroy(NULL);
}

static void bad_client_options_are_refused(const char* address) {
  clusterkv_client* client = (clusterkv_client*)&dense;
  clusterkv_client_options good = CLUSTERKV_CLIENT_OPTIONS_INIT;
  good.address = address;
  clusterkv_client_options options = good;
  options.struct_size = 0;
  CHECK_INVALID("struct_size", clusterkv_client_connect(&options, &client));
  CHECK(client == NULL);
  options.struct_size = sizeof(options) - 1;
  CHECK_INVALID("struct_size", clusterkv_client_connect(&options, &client));
  options.struct_size = sizeof(options) + 8;
  CHECK_INVALID("later version", clusterkv_client_connect(&options, &client));
  options = good;
  options.address = NULL;
  CHECK_INVALID("address is null", clusterkv_client_connect(&options, &client));
  options = good;
  options.name = NULL;
  CHECK_INVALID("name is null", clusterkv_client_connect(&options, &client));
  options = good;
  options.reserved = 1;
  CHECK_INVALID("reserved", clusterkv_client_connect(&options, &client));
  options = good;
  options.device_threads = 1025;
  CHECK_INVALID("device_threads", clusterkv_client_connect(&options, &client));
  options = good;
  options.rpc_timeout_seconds = NAN;
  CHECK_INVALID("rpc_timeout_seconds", clusterkv_client_connect(&options, &client));
  options = good;
  options.ring_bytes = 8;
  CHECK_INVALID("ring_bytes", clusterkv_client_connect(&options, &client));
  options = good;
  options.audit_rate = 1.5;
  CHECK_INVALID("audit_rate", clusterkv_client_connect(&options, &client));
  // A program built before that member was there.
  options.struct_size = offsetof(clusterkv_client_options, audit_rate);
  CHECK_STATUS(CLUSTERKV_OK, clusterkv_client_connect(&options, &client));
  clusterkv_client_close(client);
  options = good;
  options.address = "unix:/nowhere/nobody.sock";
  CHECK_REFUSED(CLUSTERKV_UNAVAILABLE, "nobody.sock", clusterkv_client_connect(&options, &client));
}

static void bad_sequence_options_are_refused(clusterkv_client* client) {
  clusterkv_method_options method;
  clusterkv_sequence_options options;
  clusterkv_sequence* sequence = (clusterkv_sequence*)&dense;
  CHECK_INVALID("clusterkv_sequence_options is null",
                clusterkv_sequence_register(client, NULL, &sequence));
  CHECK(sequence == NULL);
#define REFUSED(part, member, value)                                               \
  do {                                                                             \
    small_options(CLUSTERKV_MODE_DIRECT, CLUSTERKV_DTYPE_FP32, &method, &options); \
    member = (value);                                                              \
    CHECK_INVALID(part, clusterkv_sequence_register(client, &options, &sequence)); \
  } while (0)
  REFUSED("clusterkv_sequence_options", options.struct_size, 8);
  REFUSED("later version", options.struct_size, sizeof(options) + 4);
  REFUSED("dtype is 0", options.dtype, 0);
  REFUSED("dtype is 4", options.dtype, 4);
  REFUSED("mode is 0", options.mode, 0);
  REFUSED("layers is 0", options.layers, 0);
  REFUSED("q_heads is 5", options.q_heads, 5);
  REFUSED("head_dim is 65", options.head_dim, 65);
  REFUSED("max_tokens", options.max_tokens, 0);
  REFUSED("clusterkv_method_options", method.struct_size, 0);
  REFUSED("later version", method.struct_size, sizeof(method) + 8);
  REFUSED("preset is \"papier\"", method.preset, "papier");
  REFUSED("group is 4", method.group, 4);
  REFUSED("center_keys is 2", method.center_keys, 2);
  REFUSED("estimate is 2", method.estimate, 2);
  REFUSED("sink_tokens is 1025", method.sink_tokens, 1025);
  REFUSED("min_window_tokens", method.min_window_tokens, 65537);
  REFUSED("decode_segment_tokens", method.decode_segment_tokens, 0);
  REFUSED("prompt_segment_tokens", method.prompt_segment_tokens, 0);
  REFUSED("tokens_per_cluster", method.tokens_per_cluster, 0);
  REFUSED("kmeans_iterations", method.kmeans_iterations, 0);
  REFUSED("window_lag_segments", method.window_lag_segments, 65);
  REFUSED("budget_tokens is 0", method.budget_tokens, 0);
  REFUSED("cache_tokens is 1", method.cache_tokens, 1);
  REFUSED("softmax_scale", method.softmax_scale, -1.0);
  REFUSED("softmax_scale", method.softmax_scale, NAN);
  REFUSED("softmax_scale", method.softmax_scale, 1e-300);
  REFUSED("softmax_scale", method.softmax_scale, 1e300);
#undef REFUSED
}

static void method_is_the_preset_but_for_what_differs(clusterkv_client* client) {
  clusterkv_method_options method = CLUSTERKV_METHOD_OPTIONS_INIT;
  clusterkv_sequence_options options;
  small_options(CLUSTERKV_MODE_SERVED, CLUSTERKV_DTYPE_FP32, &method, &options);
  method = (clusterkv_method_options)CLUSTERKV_METHOD_OPTIONS_INIT;
  method.preset = "paper";
  method.budget_tokens = 100;
  method.group = CLUSTERKV_GROUP_MAX;
  method.estimate = 1;
  method.seed = 1ull << 40;
  clusterkv_sequence* sequence = NULL;
  CHECK_OK(clusterkv_sequence_register(client, &options, &sequence));
  clusterkv_method_options read = CLUSTERKV_METHOD_OPTIONS_INIT;
  read.struct_size = 4;
  CHECK_INVALID("struct_size", clusterkv_sequence_get_method(sequence, &read));
  read.struct_size = sizeof(read);
  CHECK_OK(clusterkv_sequence_get_method(sequence, &read));
  CHECK(read.struct_size == sizeof(read) && read.preset == NULL);
  CHECK(read.budget_tokens == 100 && read.group == CLUSTERKV_GROUP_MAX && read.estimate == 1);
  CHECK(read.seed == 1ull << 40);
  CHECK(read.tokens_per_cluster == 80 && read.center_keys == 0 && read.sink_tokens == 16);
  CHECK(read.cache_tokens == 4 * 100 + 4 * 80);
  CHECK(read.softmax_scale == 0.125);
  uint64_t id = 0;
  CHECK_OK(clusterkv_sequence_id(sequence, &id));
  CHECK(id != 0);
  clusterkv_sequence_destroy(sequence);

  // What was read registers the same; no method is the default preset.
  options.method = &read;
  CHECK_OK(clusterkv_sequence_register(client, &options, &sequence));
  CHECK_OK(clusterkv_sequence_get_method(sequence, &method));
  CHECK(memcmp(&method, &read, sizeof(read)) == 0);
  clusterkv_sequence_destroy(sequence);
  options.method = NULL;
  CHECK_OK(clusterkv_sequence_register(client, &options, &sequence));
  CHECK_OK(clusterkv_sequence_get_method(sequence, &method));
  CHECK(method.tokens_per_cluster == 16 && method.center_keys == 1);
  clusterkv_sequence_destroy(sequence);
}

static void bad_ranges_are_refused(clusterkv_sequence* sequence) {
  clusterkv_range range;
  clusterkv_kv kv;
#define REFUSED(code, part, member, value)                                            \
  do {                                                                                \
    range = (clusterkv_range)CLUSTERKV_RANGE_INIT;                                    \
    range.count = 1;                                                                  \
    range.layer_count = kLayers;                                                      \
    kv = (clusterkv_kv)CLUSTERKV_KV_INIT;                                             \
    kv.k = dense.k;                                                                   \
    kv.v = dense.v;                                                                   \
    member = (value);                                                                 \
    CHECK_REFUSED(code, part, clusterkv_sequence_ingest(sequence, &range, &kv, 1.0)); \
  } while (0)
#define INVALID(part, member, value) REFUSED(CLUSTERKV_INVALID_ARGUMENT, part, member, value)
  INVALID("clusterkv_range", range.struct_size, 0);
  INVALID("clusterkv_kv", kv.struct_size, sizeof(kv) + 1);
  INVALID("end_of_prompt is 2", range.end_of_prompt, 2);
  INVALID("reserved", range.reserved, 7);
  INVALID("count is 0", range.count, 0);
  INVALID("layers 1 + 2", range.layer_begin, 1);
  INVALID("k is null", kv.k, NULL);
  INVALID("v is null", kv.v, NULL);
  INVALID("k is not at a multiple", kv.k, (const char*)dense.k + 2);
  INVALID("stride of k is 6", kv.token_stride, 6);
  REFUSED(CLUSTERKV_FAILED_PRECONDITION, "has ended", range.position, 5);
  REFUSED(CLUSTERKV_OUT_OF_RANGE, "max_tokens", range.position, kMaxTokens);
#undef INVALID
#undef REFUSED
  CHECK_INVALID("clusterkv_kv is null", clusterkv_sequence_ingest(sequence, &range, NULL, 1.0));
  CHECK_INVALID("clusterkv_range is null", clusterkv_sequence_ingest(sequence, NULL, &kv, 1.0));
  range.position = 0;
  CHECK_INVALID("timeout_seconds is -1", clusterkv_sequence_ingest(sequence, &range, &kv, -1.0));
  CHECK_INVALID("timeout_seconds is nan",
                clusterkv_sequence_wait_published(sequence, 0, NAN, NULL, NULL));
  uint32_t segments = 77;
  CHECK_STATUS(CLUSTERKV_OUT_OF_RANGE,
               clusterkv_sequence_wait_published(sequence, kMaxTokens + 1, 1.0, &segments, NULL));
  CHECK(segments == 77);
  clusterkv_counters counters = CLUSTERKV_COUNTERS_INIT;
  CHECK_INVALID("layer is 2", clusterkv_sequence_get_counters(sequence, kLayers, &counters));
  CHECK_INVALID("clusterkv_counters is null", clusterkv_sequence_get_counters(sequence, 0, NULL));
  CHECK_INVALID("length is null", clusterkv_sequence_length(sequence, NULL));
  CHECK_INVALID("id is null", clusterkv_sequence_id(sequence, NULL));
}

static void bad_batches_are_refused(clusterkv_client* client, clusterkv_sequence* sequence) {
  clusterkv_batch* batch = (clusterkv_batch*)&dense;
  clusterkv_sequence* const with_null[] = {sequence, NULL};
  CHECK_INVALID("sequences is null", clusterkv_batch_create(client, NULL, 1, NULL, &batch));
  CHECK(batch == NULL);
  CHECK_INVALID("sequences[1] is null", clusterkv_batch_create(client, with_null, 2, NULL, &batch));
  CHECK_INVALID("no sequences", clusterkv_batch_create(client, with_null, 0, NULL, &batch));
  clusterkv_sequence* const twice[] = {sequence, sequence};
  CHECK_INVALID("twice", clusterkv_batch_create(client, twice, 2, NULL, &batch));
  clusterkv_batch_options options = CLUSTERKV_BATCH_OPTIONS_INIT;
  options.struct_size = 1;
  CHECK_INVALID("struct_size", clusterkv_batch_create(client, twice, 1, &options, &batch));
  options = (clusterkv_batch_options)CLUSTERKV_BATCH_OPTIONS_INIT;
  options.want_selection = 2;
  CHECK_INVALID("want_selection", clusterkv_batch_create(client, twice, 1, &options, &batch));
  options.want_selection = 0;
  options.cuda_stream = &options;  // the host backend has no such thing
  CHECK_INVALID("stream", clusterkv_batch_create(client, twice, 1, &options, &batch));
  options.captured = 1;
  CHECK_INVALID("stream", clusterkv_batch_create(client, twice, 1, &options, &batch));
  options.captured = 2;
  CHECK_INVALID("captured is 2", clusterkv_batch_create(client, twice, 1, &options, &batch));
  options = (clusterkv_batch_options)CLUSTERKV_BATCH_OPTIONS_INIT;
  options.captured = 1;
  CHECK_INVALID("needs the caller's stream",
                clusterkv_batch_create(client, twice, 1, &options, &batch));
}

// Steps of a batch that is not a captured one, which the host backend has none of.
static void uncaptured_batches_are_not_prepared(clusterkv_client* client) {
  const clusterkv_mode modes[] = {CLUSTERKV_MODE_DIRECT, CLUSTERKV_MODE_SERVED};
  for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); ++i) {
    dense.length = 0;
    clusterkv_sequence* const sequence =
        small_sequence(client, modes[i], CLUSTERKV_DTYPE_FP32, &dense, 100);
    clusterkv_batch* batch = NULL;
    CHECK_OK(clusterkv_batch_create(client, &sequence, 1, NULL, &batch));
    CHECK_REFUSED(CLUSTERKV_FAILED_PRECONDITION, "captured", clusterkv_batch_prepare(batch, 0));
    CHECK_REFUSED(CLUSTERKV_FAILED_PRECONDITION, "captured", clusterkv_batch_complete(batch));
    CHECK_OK(clusterkv_batch_begin(batch, 0));  // nothing was opened
    clusterkv_batch_destroy(batch);
    if (modes[i] == CLUSTERKV_MODE_SERVED) {
      clusterkv_batch_options options = CLUSTERKV_BATCH_OPTIONS_INIT;
      options.captured = 1;
      CHECK_INVALID("its steps are RPCs",
                    clusterkv_batch_create(client, &sequence, 1, &options, &batch));
    }
    clusterkv_sequence_destroy(sequence);
  }
}

static void bad_steps_are_refused(clusterkv_client* client, clusterkv_sequence* sequence) {
  static float out[kQHeads * kHeadDim];
  clusterkv_batch* batch = NULL;
  CHECK_OK(clusterkv_batch_create(client, &sequence, 1, NULL, &batch));
  CHECK_INVALID("budget_tokens", clusterkv_batch_begin(batch, kBudgetTokens + 1));
  CHECK_STATUS(CLUSTERKV_FAILED_PRECONDITION, clusterkv_batch_end(batch));
  CHECK_OK(clusterkv_batch_begin(batch, 16));
  clusterkv_kv kv = CLUSTERKV_KV_INIT;
  kv.k = dense.k;
  CHECK_INVALID("v is null", clusterkv_batch_append(batch, 0, &kv));
  kv.v = dense.v;
  CHECK_INVALID("layer 2", clusterkv_batch_append(batch, kLayers, &kv));
  CHECK_INVALID("clusterkv_kv is null", clusterkv_batch_append(batch, 0, NULL));
  CHECK_OK(clusterkv_batch_append(batch, 0, &kv));
  clusterkv_attention attention = CLUSTERKV_ATTENTION_INIT;
  CHECK_INVALID("q is null", clusterkv_batch_attend(batch, 0, &attention));
  attention.q = dense.k;
  CHECK_INVALID("out is null", clusterkv_batch_attend(batch, 0, &attention));
  attention.out = out;
  attention.lse_batch_stride = 2;
  CHECK_INVALID("stride of lse is 2", clusterkv_batch_attend(batch, 0, &attention));
  attention.lse_batch_stride = 0;
  CHECK_INVALID("clusterkv_attention is null", clusterkv_batch_attend(batch, 0, NULL));
  CHECK_OK(clusterkv_batch_attend(batch, 0, &attention));
  int32_t position;
  CHECK_INVALID("positions is null", clusterkv_batch_selection(batch, 0, NULL, 1, NULL));
  CHECK_REFUSED(CLUSTERKV_FAILED_PRECONDITION, "want_selection",
                clusterkv_batch_selection(batch, 0, &position, 1, NULL));
  CHECK_STATUS(CLUSTERKV_FAILED_PRECONDITION, clusterkv_sequence_release(sequence));
  CHECK_OK(clusterkv_batch_append(batch, 1, &kv));
  CHECK_OK(clusterkv_batch_attend(batch, 1, &attention));
  CHECK_OK(clusterkv_batch_end(batch));
  clusterkv_batch_destroy(batch);
}

static void handles_go_in_any_order(const char* address) {
  const clusterkv_mode modes[] = {CLUSTERKV_MODE_DIRECT, CLUSTERKV_MODE_SERVED};
  for (size_t i = 0; i < sizeof(modes) / sizeof(modes[0]); ++i) {
    clusterkv_client* const client = connect_to(address);
    clusterkv_sequence* sequences[3];
    clusterkv_batch* batches[2];
    for (int n = 0; n < 3; ++n) {
      dense.length = 0;
      sequences[n] = small_sequence(client, modes[i], CLUSTERKV_DTYPE_FP32, &dense, 100);
    }
    for (int n = 0; n < 2; ++n) {
      CHECK_OK(clusterkv_batch_create(client, &sequences[n], 1, NULL, &batches[n]));
    }
    clusterkv_sequence_destroy(sequences[0]);
    CHECK_REFUSED(CLUSTERKV_FAILED_PRECONDITION, "released", clusterkv_batch_begin(batches[0], 0));
    CHECK_OK(clusterkv_batch_begin(batches[1], 0));
    clusterkv_sequence_destroy(sequences[1]);
    clusterkv_batch_destroy(batches[1]);
    clusterkv_client_close(client);
    CHECK_REFUSED(CLUSTERKV_CANCELLED, "closed",
                  clusterkv_sequence_wait_published(sequences[2], 0, 1.0, NULL, NULL));
    CHECK_STATUS(CLUSTERKV_CANCELLED, clusterkv_batch_begin(batches[0], 0));
    clusterkv_batch_destroy(batches[0]);
    clusterkv_sequence_destroy(sequences[2]);
  }
}

int main(void) {
  static struct private_daemon daemon;
  dense.random = 11;
  header_and_library_agree();
  CHECK(strcmp(clusterkv_last_error(), "") == 0);
  null_handles_are_refused();
  last_error_is_of_the_thread();
  private_daemon_start(&daemon, CLUSTERKVD_PATH, "host");
  bad_client_options_are_refused(daemon.address);
  clusterkv_client* const client = connect_to(daemon.address);
  CHECK_INVALID("clusterkv_client_info", clusterkv_client_get_info(client, NULL));
  bad_sequence_options_are_refused(client);
  method_is_the_preset_but_for_what_differs(client);
  clusterkv_sequence* const sequence =
      small_sequence(client, CLUSTERKV_MODE_DIRECT, CLUSTERKV_DTYPE_FP32, &dense, 100);
  bad_ranges_are_refused(sequence);
  bad_batches_are_refused(client, sequence);
  bad_steps_are_refused(client, sequence);
  clusterkv_sequence_destroy(sequence);
  uncaptured_batches_are_not_prepared(client);
  clusterkv_client_close(client);
  handles_go_in_any_order(daemon.address);
  CHECK(private_daemon_stop(&daemon, SIGTERM) == 0);
  return 0;
}
