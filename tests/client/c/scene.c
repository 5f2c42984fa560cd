#include "tests/client/c/scene.h"

#include <stdlib.h>

#include "tests/client/c/check.h"

clusterkv_client* connect_to(const char* address) {
  clusterkv_client_options options = CLUSTERKV_CLIENT_OPTIONS_INIT;
  options.address = address;
  options.name = "c test";
  options.ring_bytes = 1 << 20;
  options.device_threads = 1;
  clusterkv_client* client = NULL;
  CHECK_OK(clusterkv_client_connect(&options, &client));
  return client;
}

void small_options(clusterkv_mode mode, clusterkv_dtype dtype, clusterkv_method_options* method,
                   clusterkv_sequence_options* options) {
  *method = (clusterkv_method_options)CLUSTERKV_METHOD_OPTIONS_INIT;
  method->preset = "paper";
  method->seed = 3;
  method->sink_tokens = kSinkTokens;
  method->min_window_tokens = kMinWindowTokens;
  method->decode_segment_tokens = 16;
  method->prompt_segment_tokens = 64;
  method->tokens_per_cluster = 8;
  method->budget_tokens = kBudgetTokens;
  *options = (clusterkv_sequence_options)CLUSTERKV_SEQUENCE_OPTIONS_INIT;
  options->method = method;
  options->layers = kLayers;
  options->kv_heads = kKvHeads;
  options->q_heads = kQHeads;
  options->head_dim = kHeadDim;
  options->dtype = dtype;
  options->max_tokens = kMaxTokens;
  options->mode = mode;
}

// fp32, in two ranges over all layers, right where the truth lies: strides, no copy.
static void ingest_in_place(clusterkv_sequence* sequence, const struct dense* dense) {
  const uint32_t half = dense->length / 2;
  for (uint32_t position = 0; position < dense->length; position += half) {
    clusterkv_range range = CLUSTERKV_RANGE_INIT;
    range.position = position;
    range.count = half;
    range.layer_count = kLayers;
    range.end_of_prompt = position + half == dense->length;
    clusterkv_kv kv = CLUSTERKV_KV_INIT;
    kv.k = dense->k[0][position];
    kv.v = dense->v[0][position];
    kv.layer_stride = sizeof(dense->k[0]);
    CHECK_OK(clusterkv_sequence_ingest(sequence, &range, &kv, 60.0));
  }
}

// bf16, a layer at a time, packed.
static void ingest_by_layer(clusterkv_sequence* sequence, const struct dense* dense) {
  const size_t elements = (size_t)dense->length * kKvHeads * kHeadDim;
  uint16_t* const k = malloc(2 * elements * sizeof(uint16_t));
  CHECK(k != NULL);
  uint16_t* const v = k + elements;
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    to_bf16(dense->k[layer][0][0], elements, k);
    to_bf16(dense->v[layer][0][0], elements, v);
    clusterkv_range range = CLUSTERKV_RANGE_INIT;
    range.count = dense->length;
    range.layer_begin = layer;
    range.layer_count = 1;
    range.end_of_prompt = 1;
    clusterkv_kv kv = CLUSTERKV_KV_INIT;
    kv.k = k;
    kv.v = v;
    CHECK_OK(clusterkv_sequence_ingest(sequence, &range, &kv, 60.0));
  }
  free(k);
}

clusterkv_sequence* small_sequence(clusterkv_client* client, clusterkv_mode mode,
                                   clusterkv_dtype dtype, struct dense* dense, uint32_t tokens) {
  clusterkv_method_options method;
  clusterkv_sequence_options options;
  small_options(mode, dtype, &method, &options);
  clusterkv_sequence* sequence = NULL;
  CHECK_OK(clusterkv_sequence_register(client, &options, &sequence));
  dense_add(dense, tokens);
  if (dtype == CLUSTERKV_DTYPE_FP32) {
    ingest_in_place(sequence, dense);
  } else {
    ingest_by_layer(sequence, dense);
  }
  CHECK_OK(clusterkv_sequence_wait_published(sequence, tokens, 60.0, NULL, NULL));
  return sequence;
}
