#include "tests/client/c/dense.h"

#include <math.h>
#include <string.h>

// SplitMix64.
static uint64_t next(uint64_t* state) {
  uint64_t z = (*state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void dense_random(uint64_t* random, float* values, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    // The sum of four uniform numbers, scaled to variance 1.
    double sum = 0;
    for (int j = 0; j < 4; ++j) sum += (double)(next(random) >> 11) / 9007199254740992.0 - 0.5;
    const float value = (float)(sum * 1.7320508);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    bits &= 0xFFFF0000u;
    memcpy(&values[i], &bits, sizeof(bits));
  }
}

void dense_add(struct dense* sequence, uint32_t count) {
  for (uint32_t token = sequence->length; token < sequence->length + count; ++token) {
    for (int layer = 0; layer < kLayers; ++layer) {
      dense_random(&sequence->random, sequence->k[layer][token][0], kKvHeads * kHeadDim);
      dense_random(&sequence->random, sequence->v[layer][token][0], kKvHeads * kHeadDim);
    }
  }
  sequence->length += count;
}

double dense_attention(const struct dense* sequence, uint32_t layer, uint32_t q_head,
                       const float* query, double out[kHeadDim]) {
  const uint32_t head = q_head / (kQHeads / kKvHeads);
  double scores[kMaxTokens];
  double top = -INFINITY;
  for (uint32_t token = 0; token < sequence->length; ++token) {
    const float* const k = sequence->k[layer][token][head];
    scores[token] = 0;
    for (int i = 0; i < kHeadDim; ++i) scores[token] += (double)query[i] * k[i];
    scores[token] /= sqrt(kHeadDim);
    if (scores[token] > top) top = scores[token];
  }
  double sum = 0;
  for (int i = 0; i < kHeadDim; ++i) out[i] = 0;
  for (uint32_t token = 0; token < sequence->length; ++token) {
    const double weight = exp(scores[token] - top);
    const float* const v = sequence->v[layer][token][head];
    sum += weight;
    for (int i = 0; i < kHeadDim; ++i) out[i] += weight * v[i];
  }
  for (int i = 0; i < kHeadDim; ++i) out[i] /= sum;
  return top + log(sum);
}

void to_bf16(const float* values, size_t elements, uint16_t* stored) {
  for (size_t i = 0; i < elements; ++i) {
    uint32_t bits;
    memcpy(&bits, &values[i], sizeof(bits));
    stored[i] = (uint16_t)(bits >> 16);
  }
}

double relative_error(const double expected[kHeadDim], const float actual[kHeadDim]) {
  double difference = 0, norm = 0;
  for (int i = 0; i < kHeadDim; ++i) {
    difference += (expected[i] - actual[i]) * (expected[i] - actual[i]);
    norm += expected[i] * expected[i];
  }
  return sqrt(difference / norm);
}
