// Exact dot products of a block's codes, 16 outputs, with rows that are rounded to bytes.
//
// The codes of 32 inputs lie as `packed.h` says. One instruction multiplies a vector of them with 4
// inputs of a row: with VNNI it adds up in 32 bits; AVX2's adds two products in 16, and several of
// its results fit there as well, so that they are widened once for as many as fit.

#pragma once

#include <utility>

#include "simd.h"

namespace eepass::EEPASS_ISA {

// Codes of 32 inputs as vectors of 4 inputs each: `pair<I>` gives inputs 8 I .. 8 I + 7 as two.
struct FourBits {
  static constexpr int BITS = 4, BYTES = 256;
  template <int I, typename V>
  static void pair(const uint8_t* p, V& first, V& second) {
    const V line = codes<V>(p + 64 * I);
    first = bits(line, 15), second = bits(right<4>(line), 15);
  }
};
struct FiveBits {
  static constexpr int BITS = 5, BYTES = 320;
  template <int I, typename V>
  static void pair(const uint8_t* p, V& first, V& second) {
    FourBits::pair<I>(p, first, second);
    const V high = codes<V>(p + 256);
    first = either(first, fifth<2 * I>(high)), second = either(second, fifth<2 * I + 1>(high));
  }
  // bit N of each byte as bit 4
  template <int N, typename V>
  static V fifth(V high) {
    if constexpr (N < 4) return bits(left<4 - N>(high), 16);
    return bits(right<N < 4 ? 0 : N - 4>(high), 16);
  }
};
struct SixBits {
  static constexpr int BITS = 6, BYTES = 384;
  template <int I, typename V>
  static void pair(const uint8_t* p, V& first, V& second) {
    FourBits::pair<I>(p, first, second);
    const V high = codes<V>(p + 256 + 64 * (I / 2));
    if constexpr (I % 2 == 0)
      first = either(first, bits(left<4>(high), 48)), second = either(second, bits(left<2>(high), 48));
    else
      first = either(first, bits(high, 48)), second = either(second, bits(right<2>(high), 48));
  }
};
struct EightBits {
  static constexpr int BITS = 8, BYTES = 512;
  template <int I, typename V>
  static void pair(const uint8_t* p, V& first, V& second) {
    first = codes<V>(p + 128 * I), second = codes<V>(p + 128 * I + 64);
  }
};

// Sums stay in registers only where all is inlined, which compilers do not always find worth it.
#define EEPASS_INLINED __attribute__((always_inline))

// Calls `body<0>()` to `body<COUNT - 1>()`.
template <int COUNT, typename Body>
EEPASS_INLINED inline void unrolled(const Body& body) {
  [&]<int... I>(std::integer_sequence<int, I...>) EEPASS_INLINED {
    (body.template operator()<I>(), ...);
  }(std::make_integer_sequence<int, COUNT>());
}

#if defined(__AVX512F__) || defined(__AVXVNNI__)

// Sums of a pair of code vectors with R rows; `x` points at the 8 inputs' words of R rows. With few
// rows, `others` takes the second vector's: one sum would wait for itself. Integers add up to the
// same in any order.
template <int R>
constexpr int OTHERS = R <= 2 ? R : 0;
template <int R>
EEPASS_INLINED inline void add_pair(Ints first, Ints second, const int32_t* x, Ints* sums,
                                    Ints* others) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    sums[r] = dot(sums[r], first, x[r]);
    Ints& sum = OTHERS<R> ? others[r] : sums[r];
    sum = dot(sum, second, x[R + r]);
  }
}

// Dot products of R rows with pairs FIRST .. FIRST + PAIRS - 1 of a group; `x`: the words of the
// first of them.
template <typename C, int R, int FIRST, int PAIRS>
EEPASS_INLINED inline void dots(const uint8_t* p, const int32_t* x, Floats* out) {
  Ints sums[R], others[OTHERS<R> + 1];
  for (auto& sum : sums) sum = zero_ints();
  for (auto& sum : others) sum = zero_ints();
  unrolled<PAIRS>([&]<int I>() EEPASS_INLINED {
    Ints first, second;
    C::template pair<FIRST + I>(p, first, second);
    add_pair<R>(first, second, x + 2 * R * I, sums, others);
  });
  for (int r = 0; r < R; r++) out[r] = to_floats(OTHERS<R> ? add(sums[r], others[r]) : sums[r]);
}

#else

// Pairs of vectors whose products, four to a lane of 16 bits, stay within it: codes below 2^BITS
// times bytes from -128 on. Codes of 8 bits go as two of 4.
template <int BITS>
constexpr int PAIRS_THAT_FIT = BITS == 6 ? 1 : BITS == 5 ? 2 : 4;

// Of H halves of a block: adds the products of one vector each with R rows, in 16 bits, to `sums`;
// to `upper` those of the codes' upper halves.
template <typename C, int R, int H>
EEPASS_INLINED inline void add_vectors(const Half* codes, const int32_t* x, Half* sums,
                                       Half* upper) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Half row = splat_bytes(x[r]);
#pragma GCC unroll 2
    for (int h = 0; h < H; h++) {
      const Half low = C::BITS == 8 ? bits(codes[h], 15) : codes[h];
      sums[h * R + r] = add_products(sums[h * R + r], low, row);
      if constexpr (C::BITS == 8)
        upper[h * R + r] = add_products(upper[h * R + r], bits(right<4>(codes[h]), 15), row);
    }
  }
}

// Dot products of R rows with pairs FIRST .. FIRST + PAIRS - 1 of a group, of H halves of a block.
template <typename C, int R, int FIRST, int PAIRS, int H>
EEPASS_INLINED inline void half_dots(const uint8_t* p, const int32_t* x, Half* out) {
  constexpr int EACH = PAIRS_THAT_FIT<C::BITS> < PAIRS ? PAIRS_THAT_FIT<C::BITS> : PAIRS;
  constexpr int UPPER = C::BITS == 8 ? H * R : 1;
  unrolled<PAIRS / EACH>([&]<int RUN>() EEPASS_INLINED {
    Half sums[H * R], upper[UPPER];
    for (auto& sum : sums) sum = zero_half();
    for (auto& sum : upper) sum = zero_half();
    unrolled<EACH>([&]<int I>() EEPASS_INLINED {
      Half first[H], second[H];
      for (int h = 0; h < H; h++)
        C::template pair<FIRST + RUN * EACH + I>(p + 32 * h, first[h], second[h]);
      const int32_t* words = x + 2 * R * (RUN * EACH + I);
      add_vectors<C, R, H>(first, words, sums, upper);
      add_vectors<C, R, H>(second, words + R, sums, upper);
    });
    for (int i = 0; i < H * R; i++) {
      Half wide = widened(sums[i]);
      if constexpr (C::BITS == 8) wide = add(wide, sixteen_times(widened(upper[i])));
      out[i] = RUN == 0 ? wide : add(out[i], wide);
    }
  });
}

// Dot products of R rows with pairs FIRST .. FIRST + PAIRS - 1 of a group; `x`: the words of the
// first of them.
template <typename C, int R, int FIRST, int PAIRS>
EEPASS_INLINED inline void dots(const uint8_t* p, const int32_t* x, Floats* out) {
  Half sums[2 * R];
  if constexpr (C::BITS == 8 && R > 2) {
    half_dots<C, R, FIRST, PAIRS, 1>(p, x, sums);
    // the compiler would keep the words of all rows for the other half, which fit no registers
    asm volatile("" : "+r"(x) : : "memory");
    half_dots<C, R, FIRST, PAIRS, 1>(p + 32, x, sums + R);
  } else {
    half_dots<C, R, FIRST, PAIRS, 2>(p, x, sums);
  }
  for (int r = 0; r < R; r++) out[r] = to_floats({sums[r].v, sums[R + r].v});
}

#endif

}  // namespace eepass::EEPASS_ISA
