// The C interface against a real daemon: with a budget over the context, outputs are those of dense
// attention, direct and served.
#include <math.h>
#include <signal.h>
#include <string.h>

#include "client/c/clusterkv.h"
#include "tests/client/c/check.h"
#include "tests/client/c/dense.h"
#include "tests/client/c/private_daemon.h"
#include "tests/client/c/scene.h"

enum { kPrompt = 200, kSteps = 60, kBatch = 2, kRow = kHeadDim * (int)sizeof(float) };

static struct dense dense[kBatch];

static void reset_dense(void) {
  for (int i = 0; i < kBatch; ++i) {
    memset(&dense[i], 0, sizeof(dense[i]));
    dense[i].random = (uint64_t)i + 1;
  }
}

// --- A step, fp32 with strides: each sequence's rows are a field apart ---------------------------

struct rows {
  float k[kKvHeads][kHeadDim];
  float v[kKvHeads][kHeadDim];
  float q[kQHeads][kHeadDim];
  float out[kQHeads][kHeadDim + 1];  // rows are 65 floats apart
  float lse[kQHeads];
};

static void attend_strided(clusterkv_batch* batch, uint32_t layer, struct rows rows[kBatch]) {
  clusterkv_kv kv = CLUSTERKV_KV_INIT;
  kv.k = rows[0].k;
  kv.v = rows[0].v;
  kv.batch_stride = sizeof(struct rows);
  CHECK_OK(clusterkv_batch_append(batch, layer, &kv));
  clusterkv_attention attention = CLUSTERKV_ATTENTION_INIT;
  attention.q = rows[0].q;
  attention.q_batch_stride = sizeof(struct rows);
  attention.out = rows[0].out[0];
  attention.out_batch_stride = sizeof(struct rows);
  attention.out_head_stride = sizeof(rows[0].out[0]);
  attention.lse = rows[0].lse;
  attention.lse_batch_stride = sizeof(struct rows);
  CHECK_OK(clusterkv_batch_attend(batch, layer, &attention));
}

// --- The same, bf16 and packed -------------------------------------------------------------------

struct packed {
  uint16_t k[kBatch][kKvHeads][kHeadDim];
  uint16_t v[kBatch][kKvHeads][kHeadDim];
  uint16_t q[kBatch][kQHeads][kHeadDim];
  float out[kBatch][kQHeads][kHeadDim];
  float lse[kBatch][kQHeads];
};

static void attend_packed(clusterkv_batch* batch, uint32_t layer, const struct rows rows[kBatch],
                          struct packed* packed) {
  for (int i = 0; i < kBatch; ++i) {
    to_bf16(rows[i].k[0], kKvHeads * kHeadDim, packed->k[i][0]);
    to_bf16(rows[i].v[0], kKvHeads * kHeadDim, packed->v[i][0]);
    to_bf16(rows[i].q[0], kQHeads * kHeadDim, packed->q[i][0]);
  }
  clusterkv_kv kv = CLUSTERKV_KV_INIT;
  kv.k = packed->k;
  kv.v = packed->v;
  CHECK_OK(clusterkv_batch_append(batch, layer, &kv));
  clusterkv_attention attention = CLUSTERKV_ATTENTION_INIT;
  attention.q = packed->q;
  attention.out = packed->out[0][0];
  attention.lse = packed->lse[0];
  CHECK_OK(clusterkv_batch_attend(batch, layer, &attention));
}

static void unpack(const struct packed* packed, struct rows rows[kBatch]) {
  for (int i = 0; i < kBatch; ++i) {
    for (int head = 0; head < kQHeads; ++head) {
      memcpy(rows[i].out[head], packed->out[i][head], kRow);
    }
    memcpy(rows[i].lse, packed->lse[i], sizeof(rows[i].lse));
  }
}

// --- Decode --------------------------------------------------------------------------------------

static void compare(struct rows rows[kLayers][kBatch]) {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (int i = 0; i < kBatch; ++i) {
      for (uint32_t head = 0; head < kQHeads; ++head) {
        double expected[kHeadDim];
        const struct rows* const actual = &rows[layer][i];
        const double lse = dense_attention(&dense[i], layer, head, actual->q[head], expected);
        CHECK(relative_error(expected, actual->out[head]) < 1e-5);
        CHECK(fabs(lse - (double)actual->lse[head]) < 1e-4);
      }
    }
  }
}

// All that is published of the sequence is selected, each position once.
static void check_selection(clusterkv_batch* batch, size_t index, uint32_t cut) {
  static int32_t positions[kKvHeads * kBudgetTokens];
  size_t count = 0;
  CHECK_STATUS(CLUSTERKV_INVALID_ARGUMENT,
               clusterkv_batch_selection(batch, index, positions, 1, &count));
  CHECK(count == kKvHeads * kBudgetTokens);
  count = 0;
  CHECK_OK(clusterkv_batch_selection(batch, index, positions, kKvHeads * kBudgetTokens, &count));
  CHECK(count == kKvHeads * kBudgetTokens);
  for (size_t head = 0; head < kKvHeads; ++head) {
    char seen[kMaxTokens] = {0};
    for (size_t i = 0; i < kBudgetTokens; ++i) {
      const int32_t position = positions[head * kBudgetTokens + i];
      CHECK((position >= 0) == (i < cut - kSinkTokens));
      if (position < 0) continue;
      CHECK(position >= kSinkTokens && (uint32_t)position < cut && !seen[position]);
      seen[position] = 1;
    }
  }
}

static void step(clusterkv_batch* batch, clusterkv_dtype dtype, const uint32_t cuts[kBatch]) {
  static struct rows rows[kLayers][kBatch];
  static struct packed packed[kLayers];
  for (int i = 0; i < kBatch; ++i) dense_add(&dense[i], 1);
  CHECK_OK(clusterkv_batch_begin(batch, 0));
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (int i = 0; i < kBatch; ++i) {
      const uint32_t last = dense[i].length - 1;
      struct rows* const own = &rows[layer][i];
      memcpy(own->k, dense[i].k[layer][last], sizeof(own->k));
      memcpy(own->v, dense[i].v[layer][last], sizeof(own->v));
      dense_random(&dense[i].random, own->q[0], kQHeads * kHeadDim);
    }
    if (dtype == CLUSTERKV_DTYPE_FP32) {
      attend_strided(batch, layer, rows[layer]);
    } else {
      attend_packed(batch, layer, rows[layer], &packed[layer]);
    }
    for (size_t i = 0; i < kBatch; ++i) check_selection(batch, i, cuts[i]);
  }
  CHECK_OK(clusterkv_batch_end(batch));
  for (uint32_t layer = 0; layer < kLayers && dtype != CLUSTERKV_DTYPE_FP32; ++layer) {
    unpack(&packed[layer], rows[layer]);
  }
  compare(rows);
}

static void check_sequence(clusterkv_sequence* sequence, uint32_t tokens) {
  uint32_t length = 0, segments = 0, cut = 0;
  CHECK_OK(clusterkv_sequence_length(sequence, &length));
  CHECK(length == tokens);
  CHECK_OK(clusterkv_sequence_published(sequence, &segments, &cut));
  // Of the prompt without sinks and window three segments of 64, of what was decoded full ones
  // of 16.
  const uint32_t prompt_cut = kPrompt - kMinWindowTokens;
  const uint32_t decoded = (tokens - kMinWindowTokens - prompt_cut) / 16;
  CHECK(segments == 3 + decoded);
  CHECK(cut == prompt_cut + 16 * decoded);
  clusterkv_counters counters = CLUSTERKV_COUNTERS_INIT;
  CHECK_OK(clusterkv_sequence_get_counters(sequence, kLayers - 1, &counters));
  CHECK(counters.hit_clusters > 0 && counters.missed_clusters > 0);
  CHECK(counters.hit_tokens > counters.hit_clusters);
  CHECK(counters.gathered_bytes > counters.missed_tokens);
}

static void decodes_as_dense_attention_does(const char* address, clusterkv_mode mode,
                                            clusterkv_dtype dtype) {
  reset_dense();
  clusterkv_client* const client = connect_to(address);
  clusterkv_sequence* sequences[kBatch];
  for (int i = 0; i < kBatch; ++i) {
    sequences[i] = small_sequence(client, mode, dtype, &dense[i], kPrompt);
  }
  clusterkv_batch_options options = CLUSTERKV_BATCH_OPTIONS_INIT;
  options.want_selection = 1;
  clusterkv_batch* batch = NULL;
  CHECK_OK(clusterkv_batch_create(client, sequences, kBatch, &options, &batch));
  for (int n = 0; n < kSteps; ++n) {
    uint32_t cuts[kBatch];
    for (int i = 0; i < kBatch; ++i) {
      CHECK_OK(
          clusterkv_sequence_wait_published(sequences[i], dense[i].length, 60.0, NULL, &cuts[i]));
    }
    step(batch, dtype, cuts);
  }
  clusterkv_batch_destroy(batch);
  for (int i = 0; i < kBatch; ++i) {
    CHECK_OK(clusterkv_sequence_wait_published(sequences[i], dense[i].length, 60.0, NULL, NULL));
    check_sequence(sequences[i], dense[i].length);
    CHECK_OK(clusterkv_sequence_release(sequences[i]));
    CHECK_OK(clusterkv_sequence_release(sequences[i]));
    clusterkv_sequence_destroy(sequences[i]);
  }
  clusterkv_client_close(client);
}

static void tells_what_it_runs_on(const char* address) {
  clusterkv_client* const client = connect_to(address);
  clusterkv_client_info info = CLUSTERKV_CLIENT_INFO_INIT;
  CHECK_OK(clusterkv_client_get_info(client, &info));
  CHECK(info.struct_size == sizeof(info));
  CHECK(strcmp(info.backend, "host") == 0);
  CHECK(strcmp(info.device_uuid, "") == 0);
  CHECK(strlen(info.device_description) > 0);
  CHECK(info.session_id != 0);
  CHECK_OK(clusterkv_client_health(client));
  clusterkv_client_close(client);
}

static void dead_daemon_is_unavailable(struct private_daemon* daemon) {
  reset_dense();
  clusterkv_client* const client = connect_to(daemon->address);
  clusterkv_sequence* const sequence =
      small_sequence(client, CLUSTERKV_MODE_DIRECT, CLUSTERKV_DTYPE_FP32, &dense[0], kPrompt);
  CHECK(private_daemon_stop(daemon, SIGKILL) == 128 + SIGKILL);
  CHECK_STATUS(CLUSTERKV_UNAVAILABLE,
               clusterkv_sequence_wait_published(sequence, dense[0].length + 1, 60.0, NULL, NULL));
  CHECK(strlen(clusterkv_last_error()) > 0);
  clusterkv_sequence_destroy(sequence);
  clusterkv_client_close(client);
}

int main(void) {
  static struct private_daemon daemon;
  private_daemon_start(&daemon, CLUSTERKVD_PATH, "host");
  tells_what_it_runs_on(daemon.address);
  decodes_as_dense_attention_does(daemon.address, CLUSTERKV_MODE_DIRECT, CLUSTERKV_DTYPE_FP32);
  decodes_as_dense_attention_does(daemon.address, CLUSTERKV_MODE_SERVED, CLUSTERKV_DTYPE_FP32);
  decodes_as_dense_attention_does(daemon.address, CLUSTERKV_MODE_DIRECT, CLUSTERKV_DTYPE_BF16);
  decodes_as_dense_attention_does(daemon.address, CLUSTERKV_MODE_SERVED, CLUSTERKV_DTYPE_BF16);
  dead_daemon_is_unavailable(&daemon);
  private_daemon_start(&daemon, CLUSTERKVD_PATH, "host");
  CHECK(private_daemon_stop(&daemon, SIGTERM) == 0);
  return 0;
}
