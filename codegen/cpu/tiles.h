// Products of a few rows of inputs with blocks of weight rows, for any form of weights.
//
// A form of weights has `row(n)`, a cursor on weight row n; the cursor's `load(k, v)` puts the
// weights of columns k to k + width - 1 into vectors. All forms add in the same order, so quantised
// weights give exactly the bits that their dequantised values give.

#pragma once

#include <algorithm>

#include "lanes.h"

#if defined(__AVX512BF16__)

namespace eepass {

// Weight rows of a task: their products with one row of x fill a vector.
constexpr int64_t BLOCK = 16;
// How far ahead weights are prefetched: several times what arrives during the latency of memory.
constexpr int64_t AHEAD_BYTES = 8192;

// R rows (a power of two) of x times 16 / R weight rows from n on -> sums[r * BLOCK + t].
//
// For few rows, weight rows are read one after another, which hardware prefetchers follow best.
// With more rows, loads are further apart in time and weights are prefetched by instructions, into
// L2, since L1 allows too few requests in flight.
template <typename W, int R, bool FETCH>
inline void tile_sums(const typename W::L::T* x, const W& weights, int64_t n, int64_t N, int64_t K,
                      float* sums) {
  using L = typename W::L;
  constexpr int T = 16 / R, S = R == 8 ? 2 : 1, P = W::width / L::width;
  const int64_t whole = K / W::width * W::width, rest = K - whole;
  __m512 acc[16];
  for (auto& a : acc) a = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int first = 0; first < T; first += S) {
    typename W::Row rows[S];
    // a tile past the end reads the last row again, and its result is not stored
    for (int s = 0; s < S; s++) rows[s] = weights.row(std::min<int64_t>(n + first + s, N - 1));
    for (int64_t k = 0; k < whole; k += W::width) {
      typename L::V values[S][P];
      for (int s = 0; s < S; s++) {
        rows[s].load(k, values[s]);
        if (FETCH) _mm_prefetch(rows[s].at(k) + AHEAD_BYTES, _MM_HINT_T1);
      }
      for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) {
          const auto value = L::load(x + r * K + k + p * L::width);
          for (int s = 0; s < S; s++) {
            __m512& sum = acc[r * T + first + s];
            sum = L::fma(sum, values[s][p], value);
          }
        }
    }
    if constexpr (W::any_width)
      for (int r = 0; rest && r < R; r++) {
        const auto value = L::load(x + r * K + whole, rest);
        for (int s = 0; s < S; s++) {
          __m512& sum = acc[r * T + first + s];
          sum = L::fma(sum, rows[s].load_rest(whole, rest), value);
        }
      }
  }
  alignas(64) float found[16];
  _mm512_store_ps(found, sum16(acc));
  for (int r = 0; r < R; r++) std::memcpy(sums + r * BLOCK, found + r * T, T * sizeof(float));
}

// The bias [N] (or null) and the output [R, N] of a linear layer.
template <typename O>
struct Output {
  const float* bias;
  O* out;
  int64_t N;
};

// R rows from `row` on, times up to BLOCK weight rows from n on.
template <typename W, typename O, int R, bool FETCH>
void block_rows(const typename W::L::T* x, const W& weights, const Output<O>& output, int64_t row,
                int64_t n, int64_t K) {
  const int64_t count = std::min(BLOCK, output.N - n);
  alignas(64) float sums[R * BLOCK];
  for (int64_t t = 0; t < BLOCK; t += 16 / R)
    tile_sums<W, R, FETCH>(x + row * K, weights, n + t, output.N, K, sums + t);
  const __m512 bias = output.bias ? load_floats(output.bias + n, count) : _mm512_setzero_ps();
  for (int r = 0; r < R; r++)
    store(output.out + (row + r) * output.N + n,
          _mm512_add_ps(_mm512_load_ps(sums + r * BLOCK), bias), count);
}

// All rows, 8 at a time, while the weights of the block stay in the cache.
template <typename W, typename O>
void block(const typename W::L::T* x, const W& weights, const Output<O>& output, int64_t R,
           int64_t n, int64_t K) {
  int64_t row = 0;
  if (R >= 8) block_rows<W, O, 8, true>(x, weights, output, 0, n, K), row = 8;
  for (; row + 8 <= R; row += 8) block_rows<W, O, 8, false>(x, weights, output, row, n, K);
  if (R - row >= 4) block_rows<W, O, 4, true>(x, weights, output, row, n, K), row += 4;
  if (R - row >= 2) block_rows<W, O, 2, true>(x, weights, output, row, n, K), row += 2;
  if (R - row >= 1) block_rows<W, O, 1, true>(x, weights, output, row, n, K);
}

}  // namespace eepass

#endif
