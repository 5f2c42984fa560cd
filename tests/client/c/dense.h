// A sequence with all its K and V at hand, and attention over all of it in double. Shares nothing
// with the library under test.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum { kLayers = 2, kKvHeads = 2, kQHeads = 4, kHeadDim = 64, kMaxTokens = 512 };

// Floats that are bf16 exactly, so that one truth serves both dtypes.
struct dense {
  uint64_t random;
  uint32_t length;
  float k[kLayers][kMaxTokens][kKvHeads][kHeadDim];
  float v[kLayers][kMaxTokens][kKvHeads][kHeadDim];
};

// Random values of the standard normal distribution, roughly.
void dense_random(uint64_t* random, float* values, size_t count);
// Appends random tokens.
void dense_add(struct dense* sequence, uint32_t count);
// Attention of one query head over all tokens: the output, and the log of the sum of exponentials.
double dense_attention(const struct dense* sequence, uint32_t layer, uint32_t q_head,
                       const float* query, double out[kHeadDim]);

// What `elements` floats become in storage, and how far `actual` is from `expected`: the L2
// distance relative to the norm.
void to_bf16(const float* values, size_t elements, uint16_t* stored);
double relative_error(const double expected[kHeadDim], const float actual[kHeadDim]);
