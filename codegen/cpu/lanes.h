// Shared by the kernels: bf16 as float, vectors of weights, the sums of 16 vectors at once.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace eepass {

using c10::BFloat16;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

#if defined(__AVX512BF16__)

// A vector of the sums of 16 vectors; each sum adds its elements in the same order.
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

inline __mmask16 first(int64_t n) { return n < 16 ? (1u << n) - 1 : 0xFFFF; }

// Stores the first n of 16 floats, rounded to the type of p.
inline void store(float* p, __m512 v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline void store(BFloat16* p, __m512 v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first(n), (__m256i)_mm512_cvtneps_pbh(v));
}

// Loads the first n of 16 values as floats, followed by zeros.
inline __m512 load_floats(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline __m512 load_floats(const BFloat16* p, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Vectors of weights and inputs of one type; fma adds their products to 16 partial sums.
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
  static V load(const T* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static __m512 fma(__m512 sum, V a, V b) { return _mm512_fmadd_ps(a, b, sum); }
};

#endif

}  // namespace eepass
