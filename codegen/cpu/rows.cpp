// CPU kernels of eepass::linear_rows, eepass::logits_rows and eepass::attend_rows.
//
// Decoding reads every weight once a pass, so what counts is that a weight is loaded once for all
// rows and that nothing else takes time. The sum of a row does not depend on how many rows there
// are: the same token gives the same bits alone and with others.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

using at::BFloat16;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

#if defined(__AVX512BF16__)

// The sums of 16 vectors, in order, as one vector.
inline __m512 sum16(const __m512 v[16]) {
  __m512 a[8], b[4];
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44),
                         _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
  for (int i = 0; i < 4; i++)
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                         _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
  __m512 lo = _mm512_add_ps(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1]));
  __m512 hi = _mm512_add_ps(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3]));
  __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(lo, hi, 0x44), _mm512_shuffle_ps(lo, hi, 0xEE));
  return _mm512_shuffle_f32x4(sums, sums, 0xD8);
}

// A vector of weights times a vector of inputs, added to 16 partial sums.
struct Bf16Lanes {
  using T = BFloat16;
  using V = __m512bh;
  static constexpr int64_t width = 32;
  static V load(const T* p) { return (V)_mm512_loadu_si512(p); }
  static V load(const T* p, int64_t n) {
    return (V)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
  }
  static __m512 fma(__m512 sum, V a, V b) { return _mm512_dpbf16_ps(sum, a, b); }
};
struct FloatLanes {
  using T = float;
  using V = __m512;
  static constexpr int64_t width = 16;
  static V load(const T* p) { return _mm512_loadu_ps(p); }
  static V load(const T* p, int64_t n) {
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  }
  static __m512 fma(__m512 sum, V a, V b) { return _mm512_fmadd_ps(a, b, sum); }
};

// One linear layer: weight [N, K], its bias or null, its output [R, N].
template <typename T, typename O>
struct Linear {
  const T* weight;
  const float* bias;
  O* out;
  int64_t N, tiles;
};

// R rows (a power of two) times a tile of 16 / R weight rows of depth K.
template <typename L, typename O, int R>
void linear_tile(const typename L::T* x, const Linear<typename L::T, O>& linear, int64_t tile,
                 int64_t K) {
  constexpr int T = 16 / R;
  const int64_t n = tile * T, N = linear.N, whole = K / L::width * L::width;
  const typename L::T* rows[T];
  // a tile past the end reads its last row again and drops the result
  for (int t = 0; t < T; t++) rows[t] = linear.weight + std::min<int64_t>(n + t, N - 1) * K;
  __m512 acc[16];
  for (auto& a : acc) a = _mm512_setzero_ps();
  for (int64_t k = 0; k < whole; k += L::width) {
    typename L::V weights[T];
    for (int t = 0; t < T; t++) {
      weights[t] = L::load(rows[t] + k);
      // the tile after this one arrives while this one is summed
      _mm_prefetch(reinterpret_cast<const char*>(rows[t] + T * K + k), _MM_HINT_T0);
    }
    for (int r = 0; r < R; r++) {
      const auto value = L::load(x + r * K + k);
      for (int t = 0; t < T; t++) acc[r * T + t] = L::fma(acc[r * T + t], weights[t], value);
    }
  }
  if (const int64_t rest = K - whole)
    for (int r = 0; r < R; r++) {
      const auto value = L::load(x + r * K + whole, rest);
      for (int t = 0; t < T; t++)
        acc[r * T + t] = L::fma(acc[r * T + t], L::load(rows[t] + whole, rest), value);
    }
  alignas(64) float sums[16];
  _mm512_store_ps(sums, sum16(acc));
  for (int r = 0; r < R; r++)
    for (int64_t t = 0; t < std::min<int64_t>(T, N - n); t++)
      linear.out[r * N + n + t] =
          O(sums[r * T + t] + (linear.bias ? linear.bias[n + t] : 0.0f));
}

template <typename L, typename O, int R>
void linear_all(const typename L::T* x, std::vector<Linear<typename L::T, O>>& linears,
                int64_t K) {
  int64_t total = 0;
  for (auto& linear : linears) {
    linear.tiles = (linear.N + 16 / R - 1) / (16 / R);
    total += linear.tiles;
  }
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < total; task++) {
    int64_t tile = task, which = 0;
    while (tile >= linears[which].tiles) tile -= linears[which++].tiles;
    linear_tile<L, O, R>(x, linears[which], tile, K);
  }
}

template <typename L, typename O>
std::vector<at::Tensor> linears_of(const at::Tensor& x, at::TensorList weights,
                                   const c10::List<std::optional<at::Tensor>>& biases) {
  using T = typename L::T;
  const int64_t R = x.size(0), K = x.size(1);
  std::vector<at::Tensor> outs, kept;
  std::vector<Linear<T, O>> linears;
  for (size_t i = 0; i < weights.size(); i++) {
    outs.push_back(at::empty({R, weights[i].size(0)},
                             x.options().dtype(c10::CppTypeToScalarType<O>::value)));
    const float* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      kept.push_back(b->to(at::kFloat).contiguous());
      bias = kept.back().const_data_ptr<float>();
    }
    linears.push_back({weights[i].const_data_ptr<T>(), bias, outs.back().mutable_data_ptr<O>(),
                       weights[i].size(0), 0});
  }
  const T* xp = x.const_data_ptr<T>();
  switch (R) {
    case 1: linear_all<L, O, 1>(xp, linears, K); break;
    case 2: linear_all<L, O, 2>(xp, linears, K); break;
    case 4: linear_all<L, O, 4>(xp, linears, K); break;
    default: linear_all<L, O, 8>(xp, linears, K);
  }
  return outs;
}

bool fits(const at::Tensor& x, at::TensorList weights) {
  const int64_t rows = x.size(0);
  if (rows != 1 && rows != 2 && rows != 4 && rows != 8) return false;
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

// e^x for x <= 0 in plain arithmetic, so that a loop over it vectorises; 2e-7 relative.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// Scores of the slots [begin, end) for one query; returns the largest.
template <typename T>
float scores_of(const T* query, const T* keys, int64_t stride, const T* mask, int64_t begin,
                int64_t end, int64_t D, float scale, float* score) {
  float top = -std::numeric_limits<float>::infinity();
  int64_t c = begin;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (D % 32 == 0)
      for (; c + 16 <= end; c += 16) {
        __m512 dots[16];
        for (int i = 0; i < 16; i++) {
          const T* key = keys + (c + i) * stride;
          dots[i] = _mm512_setzero_ps();
          for (int64_t d = 0; d < D; d += 32)
            dots[i] = Bf16Lanes::fma(dots[i], Bf16Lanes::load(query + d), Bf16Lanes::load(key + d));
        }
        const __m512 bias = _mm512_castsi512_ps(_mm512_slli_epi32(
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(mask + c))), 16));
        const __m512 sums = _mm512_fmadd_ps(sum16(dots), _mm512_set1_ps(scale), bias);
        _mm512_storeu_ps(score + c, sums);
        top = std::max(top, _mm512_reduce_max_ps(sums));
      }
#endif
  for (; c < end; c++) {
    const T* key = keys + c * stride;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; d++) dot += to_float(query[d]) * to_float(key[d]);
    score[c] = dot * scale + to_float(mask[c]);
    top = std::max(top, score[c]);
  }
  return top;
}

// One task is one query head of one row; slots the mask forbids at either end are never read.
template <typename T>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
            float scale, at::Tensor& out) {
  const int64_t Q = q.size(0), R = q.size(1), D = q.size(2), G = k.size(0), C = k.size(1);
  const int64_t E = v.size(2), group = Q / G;
  const T *qp = q.const_data_ptr<T>(), *kp = k.const_data_ptr<T>(), *vp = v.const_data_ptr<T>();
  const T* mp = mask.const_data_ptr<T>();
  T* op = out.mutable_data_ptr<T>();
  const int64_t q0 = q.stride(0), q1 = q.stride(1), k0 = k.stride(0), k1 = k.stride(1);
  const int64_t v0 = v.stride(0), v1 = v.stride(1), m0 = mask.stride(0);
#pragma omp parallel
  {
    std::vector<float> score(C), sum(E);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < Q * R; task++) {
      const int64_t head = task / R, row = task % R;
      const T* m = mp + row * m0;
      int64_t end = C, begin = 0;
      while (end > 0 && to_float(m[end - 1]) < -1e30f) end--;
      while (begin < end && to_float(m[begin]) < -1e30f) begin++;
      const float top = scores_of(qp + head * q0 + row * q1, kp + head / group * k0, k1, m, begin,
                                  end, D, scale, score.data());
      float total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t c = begin; c < end; c++) {
        score[c] = exp_negative(score[c] - top);
        total += score[c];
      }
      const T* values = vp + head / group * v0;
      const float inverse = end > begin ? 1.0f / total : 0.0f;
      int64_t e = 0;
#if defined(__AVX512BF16__)
      if constexpr (std::is_same_v<T, BFloat16>)
        for (; e + 32 <= E; e += 32) {
          // two slots at a time, so that additions do not wait for one another
          __m512 even[2] = {}, odd[2] = {};
          const auto add = [&](__m512* acc, int64_t c) {
            const __m512 weight = _mm512_set1_ps(score[c]);
            const __m512i pair = _mm512_loadu_si512(values + c * v1 + e);
            acc[0] = _mm512_fmadd_ps(
                weight, _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)), acc[0]);
            acc[1] = _mm512_fmadd_ps(
                weight,
                _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(0xFFFF0000))),
                acc[1]);
          };
          int64_t c = begin;
          for (; c + 2 <= end; c += 2) add(even, c), add(odd, c + 1);
          if (c < end) add(even, c);
          alignas(64) float lower[16], upper[16];
          _mm512_store_ps(lower, _mm512_add_ps(even[0], odd[0]));
          _mm512_store_ps(upper, _mm512_add_ps(even[1], odd[1]));
          for (int i = 0; i < 16; i++) {
            op[task * E + e + 2 * i] = T(lower[i] * inverse);
            op[task * E + e + 2 * i + 1] = T(upper[i] * inverse);
          }
        }
#endif
      if (e == E) continue;
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t c = begin; c < end; c++)
#pragma omp simd
        for (int64_t i = e; i < E; i++) sum[i] += score[c] * to_float(values[c * v1 + i]);
      for (int64_t i = e; i < E; i++) op[task * E + i] = T(sum[i] * inverse);
    }
  }
}

at::Tensor attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& mask, double scale) {
  TORCH_CHECK(q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1 && mask.stride(1) == 1,
              "attend_rows wants the last dimension contiguous");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  q.scalar_type() == mask.scalar_type(),
              "attend_rows wants one dtype");
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  if (q.scalar_type() == at::kBFloat16)
    attend<BFloat16>(q, k, v, mask, static_cast<float>(scale), out);
  else if (q.scalar_type() == at::kFloat)
    attend<float>(q, k, v, mask, static_cast<float>(scale), out);
  else
    TORCH_CHECK(false, "attend_rows is written for float32 and bfloat16");
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("linear_rows", &linear_rows);
  m.impl("logits_rows", &logits_rows);
  m.impl("attend_rows", &attend_rows);
}
