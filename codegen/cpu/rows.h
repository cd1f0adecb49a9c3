// What the kernels over bf16 and fp32 numbers are given; each instruction set has its own.

#pragma once

#include <cstdint>

namespace eepass {

// A linear layer: weight [N, K], bias [N] or null, out [R, N].
struct Linear {
  const void* weight;
  const float* bias;
  void* out;
  int64_t N;
};

// Linear layers over the same rows x [R, K]; everything is contiguous and 16 bits wide where `bf16`,
// else float32; out is float32 where `float_out`.
struct LinearCall {
  const void* x;
  int64_t R, K;
  const Linear* layers;
  int64_t count;
  bool bf16, float_out;
};

// Attention of q [Q, R, D] over k [G, C, D] and v [G, C, E] with an additive mask [R, C] -> out
// [Q, R, E], which is contiguous. Strides are in elements, last dimensions are contiguous. With
// `slots` [R, K] a row looks at no others of the C, in their order; negative ones are none.
struct AttendCall {
  const void *q, *k, *v, *mask;
  void* out;
  int64_t q0, q1, k0, k1, v0, v1, m0, Q, G, R, C, D, E;
  float scale;
  bool bf16;
  const int32_t* slots = nullptr;
  int64_t s0 = 0, K = 0;
  int64_t most() const { return slots ? K : C; }
};

struct RowKernels {
  void (*linears)(const LinearCall&);
  void (*attend)(const AttendCall&);
};

// For the instruction set in use; null where there are no kernels.
const RowKernels* row_kernels();

// at no address where the library was built without them
[[gnu::weak]] extern const RowKernels avx2_rows, avx512_rows, avx512bf16_rows;

}  // namespace eepass
