// A captured step by the C interface: one CUDA graph, replayed while segments are published, gives
// what dense attention does. Needs a GPU.
#include <cuda_runtime_api.h>
#include <math.h>
#include <signal.h>
#include <string.h>

#include "client/c/clusterkv.h"
#include "tests/client/c/check.h"
#include "tests/client/c/dense.h"
#include "tests/client/c/private_daemon.h"
#include "tests/client/c/scene.h"

enum { kPrompt = 200, kSteps = 60, kBatch = 2, kSkipped = 77 };

#define CHECK_CUDA(call) CHECK((call) == cudaSuccess)

static struct dense dense[kBatch];

// What the graph reads and writes, pinned: the same addresses at each replay.
struct tensors {
  uint16_t k[kLayers][kBatch][kKvHeads][kHeadDim];
  uint16_t v[kLayers][kBatch][kKvHeads][kHeadDim];
  uint16_t q[kLayers][kBatch][kQHeads][kHeadDim];
  float out[kLayers][kBatch][kQHeads][kHeadDim];
  float lse[kLayers][kBatch][kQHeads];
};

static float queries[kLayers][kBatch][kQHeads][kHeadDim];

static void next_token(struct tensors* tensors) {
  for (int i = 0; i < kBatch; ++i) {
    dense_add(&dense[i], 1);
    const uint32_t last = dense[i].length - 1;
    for (int layer = 0; layer < kLayers; ++layer) {
      to_bf16(dense[i].k[layer][last][0], kKvHeads * kHeadDim, tensors->k[layer][i][0]);
      to_bf16(dense[i].v[layer][last][0], kKvHeads * kHeadDim, tensors->v[layer][i][0]);
      dense_random(&dense[i].random, queries[layer][i][0], kQHeads * kHeadDim);
      to_bf16(queries[layer][i][0], kQHeads * kHeadDim, tensors->q[layer][i][0]);
    }
  }
  memset(tensors->out, 0xff, sizeof(tensors->out));  // NaN
  memset(tensors->lse, 0xff, sizeof(tensors->lse));
}

static void compare(const struct tensors* tensors) {
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (int i = 0; i < kBatch; ++i) {
      for (uint32_t head = 0; head < kQHeads; ++head) {
        double expected[kHeadDim];
        const double lse =
            dense_attention(&dense[i], layer, head, queries[layer][i][head], expected);
        CHECK(relative_error(expected, tensors->out[layer][i][head]) < 1e-4);
        CHECK(fabs(lse - (double)tensors->lse[layer][i][head]) < 1e-4);
      }
    }
  }
}

static cudaGraphExec_t capture(clusterkv_batch* batch, struct tensors* tensors,
                               cudaStream_t stream) {
  CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CHECK_OK(clusterkv_batch_begin(batch, 0));
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    clusterkv_kv kv = CLUSTERKV_KV_INIT;
    kv.k = tensors->k[layer];
    kv.v = tensors->v[layer];
    CHECK_OK(clusterkv_batch_append(batch, layer, &kv));
    clusterkv_attention attention = CLUSTERKV_ATTENTION_INIT;
    attention.q = tensors->q[layer];
    attention.out = tensors->out[layer][0][0];
    attention.lse = tensors->lse[layer][0];
    CHECK_OK(clusterkv_batch_attend(batch, layer, &attention));
  }
  CHECK_OK(clusterkv_batch_end(batch));
  cudaGraph_t graph = NULL;
  cudaGraphExec_t exec = NULL;
  CHECK_CUDA(cudaStreamEndCapture(stream, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  CHECK_CUDA(cudaGraphDestroy(graph));
  return exec;
}

static void replays_what_dense_attention_does(const char* address) {
  clusterkv_client* const client = connect_to(address);
  clusterkv_sequence* sequences[kBatch];
  for (int i = 0; i < kBatch; ++i) {
    dense[i].random = (uint64_t)i + 1;
    sequences[i] =
        small_sequence(client, CLUSTERKV_MODE_DIRECT, CLUSTERKV_DTYPE_BF16, &dense[i], kPrompt);
  }
  cudaStream_t stream = NULL;
  CHECK_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  struct tensors* tensors = NULL;
  CHECK_CUDA(cudaMallocHost((void**)&tensors, sizeof(*tensors)));
  clusterkv_batch_options options = CLUSTERKV_BATCH_OPTIONS_INIT;
  options.cuda_stream = stream;
  options.captured = 1;
  clusterkv_batch* batch = NULL;
  CHECK_OK(clusterkv_batch_create(client, sequences, kBatch, &options, &batch));
  CHECK_STATUS(CLUSTERKV_FAILED_PRECONDITION, clusterkv_batch_complete(batch));
  CHECK_STATUS(CLUSTERKV_FAILED_PRECONDITION, clusterkv_batch_begin(batch, 0));

  cudaGraphExec_t exec = NULL;
  for (int step = 0; step < kSteps; ++step) {
    for (int i = 0; i < kBatch; ++i) {
      CHECK_OK(clusterkv_sequence_wait_published(sequences[i], dense[i].length, 60.0, NULL, NULL));
    }
    next_token(tensors);
    CHECK_OK(clusterkv_batch_prepare(batch, 0));
    if (exec == NULL) exec = capture(batch, tensors, stream);
    CHECK_CUDA(cudaGraphLaunch(exec, stream));
    CHECK_OK(clusterkv_batch_complete(batch));
    compare(tensors);
  }
  CHECK_STATUS(CLUSTERKV_FAILED_PRECONDITION, clusterkv_batch_prepare(batch, kBudgetTokens / 2));

  CHECK_CUDA(cudaGraphExecDestroy(exec));
  clusterkv_batch_destroy(batch);
  for (int i = 0; i < kBatch; ++i) {
    uint32_t length = 0, segments = 0;
    CHECK_OK(clusterkv_sequence_length(sequences[i], &length));
    CHECK(length == kPrompt + kSteps);
    CHECK_OK(clusterkv_sequence_published(sequences[i], &segments, NULL));
    CHECK(segments > 3);  // those of the prompt: some were published between replays
    clusterkv_sequence_destroy(sequences[i]);
  }
  CHECK_CUDA(cudaFreeHost(tensors));
  CHECK_CUDA(cudaStreamDestroy(stream));
  clusterkv_client_close(client);
}

int main(void) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    CHECK(getenv("CLUSTERKV_REQUIRE_CUDA") == NULL);
    fprintf(stderr, "skipped: no GPU\n");
    return kSkipped;
  }
  static struct private_daemon daemon;
  const char* const program = getenv("CLUSTERKV_TEST_CLUSTERKVD");
  private_daemon_start(&daemon, program == NULL ? CLUSTERKVD_PATH : program, "cuda");
  replays_what_dense_attention_does(daemon.address);
  CHECK(private_daemon_stop(&daemon, SIGTERM) == 0);
  return 0;
}
