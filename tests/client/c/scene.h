// What the tests of the C interface begin with: a client, small sequences, their prompts.
#pragma once

#include "client/c/clusterkv.h"
#include "tests/client/c/dense.h"

// Retrieves all of a sequence that is no longer than this.
enum { kBudgetTokens = 512, kSinkTokens = 4, kMinWindowTokens = 8 };

clusterkv_client* connect_to(const char* address);
// Small segments. `options->method` is `method`, which is filled in too.
void small_options(clusterkv_mode mode, clusterkv_dtype dtype, clusterkv_method_options* method,
                   clusterkv_sequence_options* options);
// Registers a sequence of small_options, and ingests `tokens` of an empty `dense` as its prompt.
clusterkv_sequence* small_sequence(clusterkv_client* client, clusterkv_mode mode,
                                   clusterkv_dtype dtype, struct dense* dense, uint32_t tokens);
