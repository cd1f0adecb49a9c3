// CPU kernels of eepass::linear_rows and eepass::logits_rows.
//
// Decoding reads every weight once a pass, so what counts is that a weight is loaded once for all
// rows and that nothing else takes time. The sum of a row does not depend on how many rows there
// are: the same token gives the same bits alone and with others.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace eepass {
namespace {

#if defined(__AVX512BF16__)

// Weight rows of a task: their sums for one row of x fill a vector.
constexpr int64_t BLOCK = 16;
// How far ahead weights are asked for: what arrives while the memory answers, several times over.
constexpr int64_t AHEAD_BYTES = 8192;

// One linear layer: weight [N, K], its bias [N] in float32 or null, its output [R, N].
template <typename T, typename O>
struct Linear {
  const T* weight;
  const float* bias;
  O* out;
  int64_t N, blocks;
};

// Sums of R rows (a power of two) of x with 16 / R weight rows from n on -> sums[r * BLOCK + t].
//
// For few rows the weights go by one after another, as the hardware foresees best; with more, time
// between loads grows and they are asked for ahead, into L2: L1 has too few requests in flight.
template <typename L, int R, bool FETCH>
inline void tile_sums(const typename L::T* x, const typename L::T* weight, int64_t n, int64_t N,
                      int64_t K, float* sums) {
  constexpr int T = 16 / R, S = R == 8 ? 2 : 1;
  const int64_t whole = K / L::width * L::width, rest = K - whole;
  __m512 acc[16];
  for (auto& a : acc) a = _mm512_setzero_ps();
#pragma GCC unroll 16
  for (int first = 0; first < T; first += S) {
    const typename L::T* rows[S];
    // a tile past the end reads the last row again and its result is dropped
    for (int s = 0; s < S; s++) rows[s] = weight + std::min<int64_t>(n + first + s, N - 1) * K;
    for (int64_t k = 0; k < whole; k += L::width) {
      typename L::V weights[S];
      for (int s = 0; s < S; s++) {
        weights[s] = L::load(rows[s] + k);
        if (FETCH)
          _mm_prefetch(reinterpret_cast<const char*>(rows[s] + k) + AHEAD_BYTES, _MM_HINT_T1);
      }
      for (int r = 0; r < R; r++) {
        const auto value = L::load(x + r * K + k);
        for (int s = 0; s < S; s++) {
          __m512& sum = acc[r * T + first + s];
          sum = L::fma(sum, weights[s], value);
        }
      }
    }
    for (int r = 0; rest && r < R; r++) {
      const auto value = L::load(x + r * K + whole, rest);
      for (int s = 0; s < S; s++) {
        __m512& sum = acc[r * T + first + s];
        sum = L::fma(sum, L::load(rows[s] + whole, rest), value);
      }
    }
  }
  alignas(64) float found[16];
  _mm512_store_ps(found, sum16(acc));
  for (int r = 0; r < R; r++) std::memcpy(sums + r * BLOCK, found + r * T, T * sizeof(float));
}

// R rows from `row` on, times the weight rows from n on, up to BLOCK of them.
template <typename L, typename O, int R, bool FETCH>
void block_rows(const typename L::T* x, const Linear<typename L::T, O>& linear, int64_t row,
                int64_t n, int64_t K) {
  const int64_t count = std::min(BLOCK, linear.N - n);
  alignas(64) float sums[R * BLOCK];
  for (int64_t t = 0; t < BLOCK; t += 16 / R)
    tile_sums<L, R, FETCH>(x + row * K, linear.weight, n + t, linear.N, K, sums + t);
  const __m512 bias = linear.bias ? load_floats(linear.bias + n, count) : _mm512_setzero_ps();
  for (int r = 0; r < R; r++)
    store(linear.out + (row + r) * linear.N + n,
          _mm512_add_ps(_mm512_load_ps(sums + r * BLOCK), bias), count);
}

// All rows, 8 at a time, while the weights of the block are in the cache.
template <typename L, typename O>
void block(const typename L::T* x, const Linear<typename L::T, O>& linear, int64_t R, int64_t n,
           int64_t K) {
  int64_t row = 0;
  if (R >= 8) block_rows<L, O, 8, true>(x, linear, 0, n, K), row = 8;
  for (; row + 8 <= R; row += 8) block_rows<L, O, 8, false>(x, linear, row, n, K);
  if (R - row >= 4) block_rows<L, O, 4, true>(x, linear, row, n, K), row += 4;
  if (R - row >= 2) block_rows<L, O, 2, true>(x, linear, row, n, K), row += 2;
  if (R - row >= 1) block_rows<L, O, 1, true>(x, linear, row, n, K);
}

template <typename L, typename O>
std::vector<at::Tensor> linears_of(const at::Tensor& x, at::TensorList weights,
                                   const c10::List<std::optional<at::Tensor>>& biases) {
  using T = typename L::T;
  const int64_t R = x.size(0), K = x.size(1);
  std::vector<at::Tensor> outs, kept;
  std::vector<Linear<T, O>> linears;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const int64_t N = weights[i].size(0), blocks = (N + BLOCK - 1) / BLOCK;
    outs.push_back(at::empty({R, N}, x.options().dtype(c10::CppTypeToScalarType<O>::value)));
    const float* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      kept.push_back(b->to(at::kFloat).contiguous());
      bias = kept.back().const_data_ptr<float>();
    }
    linears.push_back(
        {weights[i].const_data_ptr<T>(), bias, outs.back().mutable_data_ptr<O>(), N, blocks});
    total += blocks;
  }
  const T* rows = x.const_data_ptr<T>();
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < total; task++) {
    int64_t index = task, which = 0;
    while (index >= linears[which].blocks) index -= linears[which++].blocks;
    block<L, O>(rows, linears[which], R, index * BLOCK, K);
  }
  return outs;
}

bool fits(const at::Tensor& x, at::TensorList weights) {
  for (const auto& weight : weights)
    if (weight.scalar_type() != x.scalar_type() || !weight.is_contiguous()) return false;
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat;
}

#endif

std::vector<at::Tensor> linear_rows(const at::Tensor& x, at::TensorList weights,
                                    const c10::List<std::optional<at::Tensor>>& biases) {
#if defined(__AVX512BF16__)
  if (fits(x, weights)) {
    if (x.scalar_type() == at::kFloat)
      return linears_of<FloatLanes, float>(x.contiguous(), weights, biases);
    return linears_of<Bf16Lanes, BFloat16>(x.contiguous(), weights, biases);
  }
#endif
  std::vector<at::Tensor> outs;
  for (size_t i = 0; i < weights.size(); i++)
    outs.push_back(at::linear(x, weights[i], std::optional<at::Tensor>(biases.get(i))));
  return outs;
}

at::Tensor logits_rows(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
#if defined(__AVX512BF16__)
  if (fits(x, weight)) {
    const c10::List<std::optional<at::Tensor>> biases({bias});
    if (x.scalar_type() == at::kFloat)
      return linears_of<FloatLanes, float>(x.contiguous(), weight, biases)[0];
    return linears_of<Bf16Lanes, float>(x.contiguous(), weight, biases)[0];
  }
#endif
  return at::linear(x, weight, bias).to(at::kFloat);
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("linear_rows", &eepass::linear_rows);
  m.impl("logits_rows", &eepass::logits_rows);
}
