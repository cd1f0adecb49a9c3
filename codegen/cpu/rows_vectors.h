// Vectors of floats, and products of weights with rows, in the instruction set `EEPASS_ISA`.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// where what is in an array has to stay in registers
#define EEPASS_INLINE inline __attribute__((always_inline))

namespace eepass::EEPASS_ISA {

#if defined(__AVX512F__)

constexpr int LANES = 16;
// Weight rows of a tile over many rows of x: with 8 of these, accumulators fill half the registers.
constexpr int PAIR = 2;
using V = __m512;

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xFFFF); }
inline V splat(float x) { return _mm512_set1_ps(x); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline V load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline void store(float* p, V v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// b where one of them is not a number
inline V largest(V a, V b) { return _mm512_max_ps(a, b); }
inline V nearest(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | 8); }
// a * 2^n
inline V scaled(V a, V n) { return _mm512_scalef_ps(a, n); }
inline V zero_where_below(V a, V x, float least) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, splat(least), _CMP_NLT_UQ), a);
}
inline uint32_t where_at_least(V a, float least) {
  return _mm512_cmp_ps_mask(a, splat(least), _CMP_GE_OQ);
}
inline void store_counting(int32_t* p, int32_t from) {
  const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  _mm512_storeu_si512(p, _mm512_add_epi32(steps, _mm512_set1_epi32(from)));
}
inline float sum_of(V v) { return _mm512_reduce_add_ps(v); }
inline float largest_of(V v) { return _mm512_reduce_max_ps(v); }

using Halves = __m512i;  // 2 * LANES numbers of 16 bits
inline Halves load(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline Halves load(const uint16_t* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(n < 32 ? (1ull << n) - 1 : ~0ull), p);
}
inline V even(Halves h) { return _mm512_castsi512_ps(_mm512_slli_epi32(h, 16)); }
inline V odd(Halves h) {
  return _mm512_castsi512_ps(_mm512_and_si512(h, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
// LANES numbers of 16 bits as floats, or the first n of them and zeros.
inline V floats(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline V floats(const uint16_t* p, int64_t n) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(uint16_t* p, V v, int64_t n) {
  // rounds to nearest even; what is not a number stays so
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd_bit = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd_bit, _mm512_set1_epi32(0x7FFF)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
}

// The numbers of two vectors in turn: even[0], odd[0], even[1], ...
inline void store_in_turn(float* p, V even, V odd) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  store(p, _mm512_permutex2var_ps(even, low, odd));
  store(p + 16, _mm512_permutex2var_ps(even, high, odd));
}

// Adds halves of each of two vectors to the other: a and b, shuffled by `swap` and blended by
// `keep`. Every vector's elements are added in the same order, whichever of the 16 it is.
#define EEPASS_FOLD(shuffle, swap, keep, a, b) \
  _mm512_add_ps(_mm512_mask_blend_ps(keep, a, b), shuffle(a, b, swap))

// The sums of 16 vectors, `stride` vectors apart.
EEPASS_INLINE V sums(const V* v, int64_t stride) {
  V a[8], b[4];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    a[i] = EEPASS_FOLD(_mm512_shuffle_f32x4, 0x4E, 0xFF00, v[i * stride], v[(i + 8) * stride]);
  // 128-bit lanes of a[i]: v[i] twice, then v[i + 8] twice
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    b[i] = add(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
  // lanes of b[i]: v[i], v[i + 8], v[i + 4], v[i + 12]
  const V lo = EEPASS_FOLD(_mm512_shuffle_ps, 0x4E, 0xCCCC, b[0], b[2]);
  const V hi = EEPASS_FOLD(_mm512_shuffle_ps, 0x4E, 0xCCCC, b[1], b[3]);
  // within lanes of lo: 0 0 2 2, of hi: 1 1 3 3
  const V mixed = add(_mm512_shuffle_ps(lo, hi, 0x88), _mm512_shuffle_ps(lo, hi, 0xDD));
  // within lanes: 0 2 1 3
  const __m512i order = _mm512_set_epi32(15, 13, 14, 12, 7, 5, 6, 4, 11, 9, 10, 8, 3, 1, 2, 0);
  return _mm512_permutexvar_ps(order, mixed);
}
#undef EEPASS_FOLD

#else

constexpr int LANES = 8;
constexpr int PAIR = 1;
using V = __m256;

inline __m256i first(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)),
                            _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}
inline V splat(float x) { return _mm256_set1_ps(x); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline V load(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline void store(float* p, V v, int64_t n) { _mm256_maskstore_ps(p, first(n), v); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V largest(V a, V b) { return _mm256_max_ps(a, b); }
inline V nearest(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | 8); }
inline V scaled(V a, V n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(a, _mm256_castsi256_ps(power));
}
inline V zero_where_below(V a, V x, float least) {
  return _mm256_and_ps(_mm256_cmp_ps(x, splat(least), _CMP_NLT_UQ), a);
}
inline uint32_t where_at_least(V a, float least) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, splat(least), _CMP_GE_OQ)));
}
inline void store_counting(int32_t* p, int32_t from) {
  const __m256i steps = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_add_epi32(steps, _mm256_set1_epi32(from)));
}
inline float sum_of(V v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(V v) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

using Halves = __m256i;
inline Halves load(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Halves load(const uint16_t* p, int64_t n) {
  if (n >= 16) return load(p);
  alignas(32) uint16_t some[16] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof *p);
  return load(some);
}
inline V even(Halves h) { return _mm256_castsi256_ps(_mm256_slli_epi32(h, 16)); }
inline V odd(Halves h) {
  return _mm256_castsi256_ps(_mm256_and_si256(h, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline V floats(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline V floats(const uint16_t* p, int64_t n) {
  if (n >= 8) return floats(p);
  alignas(16) uint16_t some[8] = {};
  std::memcpy(some, p, static_cast<size_t>(n) * sizeof *p);
  return floats(some);
}
inline void store(uint16_t* p, V v, int64_t n) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd_bit = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd_bit, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
  const __m128i low = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  alignas(16) uint16_t all[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(all), low);
  std::memcpy(p, all, static_cast<size_t>(n < 8 ? n : 8) * sizeof *p);
}

inline void store_in_turn(float* p, V even, V odd) {
  const V low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  store(p, _mm256_permute2f128_ps(low, high, 0x20));
  store(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
}

// The sums of 8 vectors, `stride` vectors apart; each adds its elements in the same order.
EEPASS_INLINE V sums(const V* v, int64_t stride) {
  V four[2];
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) {
    const V* at = v + i * 4 * stride;
    four[i] = _mm256_hadd_ps(_mm256_hadd_ps(at[0], at[stride]), _mm256_hadd_ps(at[2 * stride], at[3 * stride]));
  }
  return add(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

#endif

inline V zero() { return splat(0.0f); }
inline V floats(const float* p) { return load(p); }
inline V floats(const float* p, int64_t n) { return n >= LANES ? load(p) : load(p, n); }

// e^x for x <= 0; relative error 2e-7, and 0 where it would be a subnormal number.
inline V exp_negative(V given) {
  const V x = largest(splat(-87.0f), given);
  const V n = nearest(mul(x, splat(1.44269504f)));
  V r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  V p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(mul(p, r), r, r), splat(1.0f));
  return zero_where_below(scaled(p, n), given, -87.0f);
}

// Numbers in memory as vectors of floats, two vectors for 16 bits: in an order of their own, which
// `store_vectors` undoes.
inline void load_vectors(const float* p, V* to) { to[0] = load(p); }
inline void load_vectors(const float* p, int64_t n, V* to) { to[0] = load(p, n); }
inline void load_vectors(const uint16_t* p, V* to) {
  const Halves h = load(p);
  to[0] = even(h), to[1] = odd(h);
}
inline void load_vectors(const uint16_t* p, int64_t n, V* to) {
  const Halves h = load(p, n);
  to[0] = even(h), to[1] = odd(h);
}
template <typename T>
void store_vectors(float* p, const V* v) {
  if constexpr (sizeof(T) == sizeof(float)) store(p, v[0]);
  else store_in_turn(p, v[0], v[1]);
}

// Forms of numbers: `STEP` weights are a vector W, whose products with as many numbers of x, laid
// out by `pack`, `dot` adds to LANES partial sums. `pack` fills up with zeros.
struct Float32 {
  using T = float;
  using W = V;
  static constexpr int64_t STEP = LANES, PACKED = LANES * 4;
  static W load(const T* p) { return EEPASS_ISA::load(p); }
  static W load(const T* p, int64_t n) { return EEPASS_ISA::load(p, n); }
  static void pack(const T* p, int64_t n, char* to) {
    EEPASS_ISA::store(reinterpret_cast<float*>(to), floats(p, n));
  }
  static V dot(V sum, W w, const char* x) {
    return fma(w, EEPASS_ISA::load(reinterpret_cast<const float*>(x)), sum);
  }
};

#if defined(__AVX512BF16__)

struct Bf16 {
  using T = uint16_t;
  using W = Halves;
  static constexpr int64_t STEP = 2 * LANES, PACKED = LANES * 4;
  static W load(const T* p) { return EEPASS_ISA::load(p); }
  static W load(const T* p, int64_t n) { return EEPASS_ISA::load(p, n); }
  static void pack(const T* p, int64_t n, char* to) {
    _mm512_storeu_si512(to, EEPASS_ISA::load(p, n));
  }
  static V dot(V sum, W w, const char* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x));
  }
};

#else

// Products in float32, in the order in which the instruction for bf16 adds them.
struct Bf16 {
  using T = uint16_t;
  struct W {
    V even, odd;
  };
  static constexpr int64_t STEP = 2 * LANES, PACKED = LANES * 8;
  static W split(Halves h) { return {EEPASS_ISA::even(h), EEPASS_ISA::odd(h)}; }
  static W load(const T* p) { return split(EEPASS_ISA::load(p)); }
  static W load(const T* p, int64_t n) { return split(EEPASS_ISA::load(p, n)); }
  static void pack(const T* p, int64_t n, char* to) {
    const W w = load(p, n);
    auto* x = reinterpret_cast<float*>(to);
    EEPASS_ISA::store(x, w.even), EEPASS_ISA::store(x + LANES, w.odd);
  }
  static V dot(V sum, W w, const char* to) {
    const auto* x = reinterpret_cast<const float*>(to);
    sum = fma(w.odd, EEPASS_ISA::load(x + LANES), sum);
    return fma(w.even, EEPASS_ISA::load(x), sum);
  }
};

#endif

// Into the L2 cache: there are fewer places to wait for a line of L1, and what finds none is dropped or
// holds up the loads behind it.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace eepass::EEPASS_ISA
