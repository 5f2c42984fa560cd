// Vector kernels of the host backend on rows of 64 to 256 elements; the instruction set is chosen
// at run time by Highway (SSE4 to AVX-512). fp32 arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/dtype.h"

namespace clusterkv::gpu::host {

// n elements of storage to fp32 and back (round to nearest even; fp16 saturates to infinity as
// IEEE does). Any n, any alignment.
void ToFloat(DType dtype, const void* source, float* destination, size_t n);
void FromFloat(DType dtype, const float* source, void* destination, size_t n);

float Dot(const float* a, const float* b, size_t n);
// Dot of an fp32 vector with each of `rows` rows of storage, `row_stride` bytes apart.
void DotRows(DType dtype, const float* vector, const std::byte* first_row, size_t row_stride,
             size_t rows, size_t n, float* result);
// accumulator += weight * row (storage).
void AddScaled(DType dtype, float weight, const void* row, float* accumulator, size_t n);
void Scale(float factor, float* vector, size_t n);

// The largest of n values; NaNs do not count; -inf if there is none.
float Max(const float* values, size_t n);
// values[i] = exp(values[i] - shift); returns their sum. NaN stays NaN.
float ExpSum(float shift, float* values, size_t n);

// Several vectors against rows that lie anywhere: each row is read and widened once for all.
// dots[g * dots_stride + r] = vectors[g * n ...] . rows[r]
void DotGroup(DType dtype, const float* vectors, size_t group, const std::byte* const* rows,
              size_t count, size_t n, float* dots, size_t dots_stride);
// accumulators[g * n ...] += sum over r of weights[g * weights_stride + r] * rows[r]
void AddWeightedRows(DType dtype, const float* weights, size_t weights_stride, size_t group,
                     const std::byte* const* rows, size_t count, size_t n, float* accumulators);

}  // namespace clusterkv::gpu::host
