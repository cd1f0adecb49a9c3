// Vectors of 16 lanes, whatever the processor has: one 512-bit register, or two of 256 bits.
//
// The kernels over packed weights are written against these and compiled once for each instruction
// set (see `native.py`), so everything here lies in the namespace of its own instruction set.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace eepass::EEPASS_ISA {

#if defined(__AVX512F__)

// Rows of x that are multiplied together: their sums, twice, fit the registers.
constexpr int MOST_ROWS = 8;

struct Ints {
  __m512i v;
};
struct Floats {
  __m512 v;
};

inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats halves(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats unsigned_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Floats signed_bytes(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }

// 64 bytes: of each of 16 outputs the codes of 4 inputs.
template <typename V>
inline V codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints bits(Ints a, char mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(mask))}; }
inline Ints either(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int N>
inline Ints right(Ints a) { return {_mm512_srli_epi16(a.v, N)}; }
template <int N>
inline Ints left(Ints a) { return {_mm512_slli_epi16(a.v, N)}; }
// Byte `n` of each lane.
template <int N>
inline Floats byte_of(Ints a) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(a.v, 8 * N), _mm512_set1_epi32(255)))};
}
// sum + the products of each lane's 4 unsigned codes with the 4 signed bytes of x.
inline Ints dot(Ints sum, Ints codes, int32_t x) {
  return {_mm512_dpbusd_epi32(sum.v, codes.v, _mm512_set1_epi32(x))};
}

// 16 values as floats, of float32 or bfloat16.
inline Floats values(const float* p) { return floats(p); }
inline Floats values(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
inline Floats most(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats magnitude(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline bool any_nan(Floats a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
// Rounds to the nearest bytes, ties to even; returns their sum.
inline int32_t round_bytes(Floats a, int8_t* out) {
  const __m512i codes = _mm512_min_epi32(
      _mm512_max_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(-128)), _mm512_set1_epi32(127));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(codes));
  return _mm512_reduce_add_epi32(codes);
}

#else

constexpr int MOST_ROWS = 4;

struct Ints {
  __m256i a, b;
};
struct Floats {
  __m256 a, b;
};

inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats halves(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
inline Floats unsigned_bytes(const uint8_t* p) {
  const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(q)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(q, 8)))};
}
inline Floats signed_bytes(const uint8_t* p) {
  const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(q, 8)))};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }

template <typename V>
inline V codes(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Ints bits(Ints x, char mask) {
  const __m256i m = _mm256_set1_epi8(mask);
  return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Ints either(Ints x, Ints y) {
  return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
inline Ints add(Ints x, Ints y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
template <int N>
inline Ints right(Ints x) { return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)}; }
template <int N>
inline Ints left(Ints x) { return {_mm256_slli_epi16(x.a, N), _mm256_slli_epi16(x.b, N)}; }
template <int N>
inline Floats byte_of(Ints x) {
  const __m256i m = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * N), m)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.b, 8 * N), m))};
}

#if defined(__AVXVNNI__)

inline Ints dot(Ints sum, Ints codes, int32_t x) {
  const __m256i four = _mm256_set1_epi32(x);
  return {_mm256_dpbusd_avx_epi32(sum.a, codes.a, four),
          _mm256_dpbusd_avx_epi32(sum.b, codes.b, four)};
}

#else

// 8 of the 16 outputs: their codes, or sums in 32 bits, or twice as many in 16.
struct Half {
  __m256i v;
};
template <>
inline Half codes<Half>(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Half zero_half() { return {_mm256_setzero_si256()}; }
inline Half bits(Half x, char mask) { return {_mm256_and_si256(x.v, _mm256_set1_epi8(mask))}; }
inline Half either(Half x, Half y) { return {_mm256_or_si256(x.v, y.v)}; }
inline Half add(Half x, Half y) { return {_mm256_add_epi32(x.v, y.v)}; }
template <int N>
inline Half right(Half x) { return {_mm256_srli_epi16(x.v, N)}; }
template <int N>
inline Half left(Half x) { return {_mm256_slli_epi16(x.v, N)}; }
inline Half splat_bytes(int32_t x) { return {_mm256_set1_epi32(x)}; }
// In 16 bits: sum + the products of codes with signed bytes, two by two. The compiler would add up
// all products of a group at its end, which fit no registers.
inline Half add_products(Half sum, Half codes, Half x) {
  const __m256i products = _mm256_maddubs_epi16(codes.v, x.v);
  asm("vpaddw %1, %0, %0" : "+x"(sum.v) : "x"(products));
  return sum;
}
inline Half widened(Half x) { return {_mm256_madd_epi16(x.v, _mm256_set1_epi16(1))}; }
inline Half sixteen_times(Half x) { return {_mm256_slli_epi32(x.v, 4)}; }

#endif

inline Floats values(const float* p) { return floats(p); }
inline Floats values(const uint16_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  const auto widened = [](__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  };
  return {widened(_mm_loadu_si128(q)), widened(_mm_loadu_si128(q + 1))};
}
inline Floats most(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats magnitude(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 found = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  found = _mm_max_ps(found, _mm_movehl_ps(found, found));
  return _mm_cvtss_f32(_mm_max_ss(found, _mm_movehdup_ps(found)));
}
inline bool any_nan(Floats x) {
  const auto nan = [](__m256 a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); };
  return (nan(x.a) | nan(x.b)) != 0;
}
inline int32_t round_bytes(Floats x, int8_t* out) {
  // packing clamps: to 16 bits, then to 8
  const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), bytes);
  // bytes + 128 as unsigned ones, summed by eights
  const __m128i shifted = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(128)));
  const __m128i sums = _mm_sad_epu8(shifted, _mm_setzero_si128());
  return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

#endif

inline float total(Floats x) {
  float lanes[16], sum = 0;
  store(lanes, x);
  for (float lane : lanes) sum += lane;
  return sum;
}

inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
}

}  // namespace eepass::EEPASS_ISA
