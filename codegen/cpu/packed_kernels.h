// Kernels over packed weights, for the instruction set this file is compiled for.
//
// Of each block of 16 outputs and each row, per 256 inputs:
//     t = sum over groups of 32 (or 16) inputs of  scale * dot(codes, x) + min * sum(x)
//     y += t * scale of x
// or, where x has a scale for each 32 inputs, y += t * scale of x for each of them;
// in this order whatever the number of rows, so a row has the same bits alone and with others. Dot
// products of integers are exact, so they are the same on every processor.

#include <limits>

#include "packed.h"
#include "packed_dots.h"
#include "simd.h"

namespace eepass::EEPASS_ISA {

// How far ahead weights are asked for: what arrives while the memory answers. Few rows keep no load
// waiting, so the processor's own prefetchers run ahead of them, and asking only fills their queue.
constexpr int64_t AHEAD = 4096;
constexpr int FETCHING_ROWS = 4;

// Forms: `begin` reads what 256 inputs share, `group` what 32 do; both move p past it. s and m are
// the scale and what is added per unit of the sum of x, for each part of the group.

// One float16 scale, and a min or a fixed zero point, for each 32 inputs.
template <typename Codes_, bool MIN, int ZERO>
struct PerGroup {
  using Codes = Codes_;
  static constexpr int PARTS = 1;
  static constexpr bool COARSE = false;
  Floats s[1], m[1];
  explicit PerGroup(Form) {}
  void begin(const uint8_t*&) {}
  void group(const uint8_t*& p, int64_t) {
    s[0] = halves(p);
    m[0] = MIN ? halves(p + 32) : mul(s[0], splat(-ZERO));
    p += MIN ? 64 : 32;
  }
};

// Q4_K and Q5_K: for each 256 inputs a step for scales and one for mins, then both as bytes.
template <typename Codes_>
struct Stepped {
  using Codes = Codes_;
  static constexpr int PARTS = 1;
  static constexpr bool COARSE = true;
  Floats step, low, s[1], m[1];
  const uint8_t* bytes = nullptr;
  explicit Stepped(Form) {}
  void begin(const uint8_t*& p) {
    step = halves(p), low = halves(p + 32), bytes = p + 64, p += 64 + 8 * 32;
  }
  void group(const uint8_t*&, int64_t) {
    s[0] = mul(step, unsigned_bytes(bytes)), m[0] = mul(low, unsigned_bytes(bytes + 16));
    bytes += 32;
  }
};

// Q6_K: a step for each 256 inputs, then a signed byte for each 16.
struct Halved {
  using Codes = SixBits;
  static constexpr int PARTS = 2;
  static constexpr bool COARSE = true;
  Floats step, zero_point, s[2], m[2];
  const uint8_t* bytes = nullptr;
  explicit Halved(Form) {}
  void begin(const uint8_t*& p) {
    step = floats(reinterpret_cast<const float*>(p)), zero_point = mul(step, splat(-32));
    bytes = p + 64, p += 64 + 8 * 32;
  }
  void group(const uint8_t*&, int64_t) {
    for (int i = 0; i < 2; i++, bytes += 16) {
      const Floats scale = signed_bytes(bytes);
      s[i] = mul(step, scale), m[i] = mul(zero_point, scale);
    }
  }
};

// Float32 scales and mins, for each so many inputs or for all.
template <typename Codes_>
struct Spaced {
  using Codes = Codes_;
  static constexpr int PARTS = 1;
  static constexpr bool COARSE = false;
  Floats s[1], m[1];
  int64_t every;
  explicit Spaced(Form form) : every(form.group / GROUP) {}
  void begin(const uint8_t*&) {}
  void group(const uint8_t*& p, int64_t index) {
    if (every ? index % every : index) return;
    s[0] = floats(reinterpret_cast<const float*>(p));
    m[0] = floats(reinterpret_cast<const float*>(p) + 16);
    p += 128;
  }
};

template <int R, int N>
inline void add_column(Ints four, const float* x, Floats* sums) {
  const Floats code = byte_of<N>(four);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) sums[r] = fma(code, splat(x[N * R + r]), sums[r]);
}
template <int R>
inline void add_floats(Ints four, const float* x, Floats* sums) {
  add_column<R, 0>(four, x, sums), add_column<R, 1>(four, x, sums);
  add_column<R, 2>(four, x, sums), add_column<R, 3>(four, x, sums);
}

template <typename F, int R, bool INTEGERS, bool FINE>
struct Rows {
  using C = typename F::Codes;
  static constexpr int PARTS = F::PARTS, PAIRS = 4 / PARTS;

  // Dot products of part `PART` of a group with R rows.
  template <int PART>
  EEPASS_INLINED static void products(const uint8_t* p, const int32_t* x, Floats* out) {
    if constexpr (INTEGERS) {
      dots<C, R, PART * PAIRS, PAIRS>(p, x, out);
    } else {
      for (int r = 0; r < R; r++) out[r] = zero();
      const auto* values = reinterpret_cast<const float*>(x);
      pairs<PART * PAIRS>(p, values, out), pairs<PART * PAIRS + 1>(p, values + 8 * R, out);
      if constexpr (PARTS == 1) pairs<2>(p, values + 16 * R, out), pairs<3>(p, values + 24 * R, out);
    }
  }
  template <int I>
  static void pairs(const uint8_t* p, const float* x, Floats* out) {
    Ints first, second;
    C::template pair<I>(p, first, second);
    add_floats<R>(first, x, out), add_floats<R>(second, x + 4 * R, out);
  }

  static void run(const PackedLayer& layer, const uint8_t* p, const int32_t* x, bool fetch,
                  float* out) {
    constexpr int64_t words = words_of(INTEGERS), part_words = words / 8 / PARTS * R;
    F form(layer.form);
    Floats y[R];
    for (auto& sum : y) sum = zero();
    for (int64_t k = 0, group = 0; k < layer.K; k += SPAN) {
      const auto* sums = reinterpret_cast<const float*>(x) + words * R + (PARTS == 2 ? 8 * R : 0);
      const auto* scales = reinterpret_cast<const float*>(x) + (words + 24) * R;
      form.begin(p);
      Floats t[R];
      for (auto& sum : t) sum = zero();
      const int64_t groups = layer.K - k < SPAN ? (layer.K - k) / GROUP : SPAN / GROUP;
      for (int64_t g = 0; g < groups; g++, group++) {
        form.group(p, group);
        if (R >= FETCHING_ROWS && fetch)
          for (int64_t line = 0; line < C::BYTES; line += 64) prefetch(p + AHEAD + line);
        Floats found[R];
        products<0>(p, x + g * PARTS * part_words, found);
        if constexpr (FINE) {
          for (int r = 0; r < R; r++) found[r] = mul(found[r], form.s[0]);
          for (int r = 0; r < R; r++) found[r] = fma(form.m[0], splat(sums[g * R + r]), found[r]);
          for (int r = 0; r < R; r++) y[r] = fma(found[r], splat(scales[g * R + r]), y[r]);
        } else {
          for (int r = 0; r < R; r++) t[r] = fma(found[r], form.s[0], t[r]);
          for (int r = 0; r < R; r++) t[r] = fma(form.m[0], splat(sums[g * PARTS * R + r]), t[r]);
        }
        if constexpr (PARTS == 2) {
          products<1>(p, x + (g * PARTS + 1) * part_words, found);
          for (int r = 0; r < R; r++) t[r] = fma(found[r], form.s[1], t[r]);
          for (int r = 0; r < R; r++) t[r] = fma(form.m[1], splat(sums[(2 * g + 1) * R + r]), t[r]);
        }
        p += C::BYTES;
      }
      if constexpr (!FINE)
        for (int r = 0; r < R; r++) y[r] = fma(t[r], splat(scales[r]), y[r]);
      x += span_words(INTEGERS) * R;
    }
    for (int r = 0; r < R; r++) store(out + r * OUTPUTS, y[r]);
  }
};

template <typename F, bool INTEGERS, bool FINE>
void any_rows(const PackedLayer& layer, const uint8_t* p, const int32_t* x, int rows, bool fetch,
              float* out) {
  switch (rows) {
    case 1: return Rows<F, 1, INTEGERS, FINE>::run(layer, p, x, fetch, out);
    case 2: return Rows<F, 2, INTEGERS, FINE>::run(layer, p, x, fetch, out);
    case 4: return Rows<F, 4, INTEGERS, FINE>::run(layer, p, x, fetch, out);
#if defined(__AVX512F__)
    case 8: return Rows<F, 8, INTEGERS, FINE>::run(layer, p, x, fetch, out);
#endif
  }
}

template <typename F>
void any_rounding(const PackedLayer& layer, const uint8_t* p, const int32_t* x, int rows,
                  Rounding rounding, bool fetch, float* out) {
  if (rounding == Rounding::none) return any_rows<F, false, false>(layer, p, x, rows, fetch, out);
  if constexpr (!F::COARSE)
    if (rounding == Rounding::groups) return any_rows<F, true, true>(layer, p, x, rows, fetch, out);
  any_rows<F, true, false>(layer, p, x, rows, fetch, out);
}

void multiply(const PackedLayer& layer, int64_t block, const int32_t* x, int rows, Rounding rounding,
              bool fetch, float* out) {
  const uint8_t* p = layer.weight + block * block_bytes(layer.form, layer.K);
  const auto go = [&]<typename F>() { any_rounding<F>(layer, p, x, rows, rounding, fetch, out); };
  switch (layer.form.kind) {
    case Kind::q4_0: return go.template operator()<PerGroup<FourBits, false, 8>>();
    case Kind::q4_1: return go.template operator()<PerGroup<FourBits, true, 0>>();
    case Kind::q5_0: return go.template operator()<PerGroup<FiveBits, false, 16>>();
    case Kind::q5_1: return go.template operator()<PerGroup<FiveBits, true, 0>>();
    case Kind::q8_0: return go.template operator()<PerGroup<EightBits, false, 128>>();
    case Kind::q4_k: return go.template operator()<Stepped<FourBits>>();
    case Kind::q5_k: return go.template operator()<Stepped<FiveBits>>();
    case Kind::q6_k: return go.template operator()<Halved>();
    case Kind::u4: return go.template operator()<Spaced<FourBits>>();
    case Kind::u8: return go.template operator()<Spaced<EightBits>>();
  }
}

// SPAN values of a row of K, from k on: zeros beyond the row.
template <typename T>
const T* span_of(const T* x, int64_t K, int64_t k, T* room) {
  if (k + SPAN <= K) return x + k;
  std::memset(room, 0, SPAN * sizeof(T));
  std::memcpy(room, x + k, (K - k) * sizeof(T));
  return room;
}

// The largest magnitude among `count` values, a multiple of 16; NaN where one is not finite.
template <typename T>
float largest_of(const T* x, int64_t count) {
  Floats found = zero(), wrong = zero();
  for (int64_t i = 0; i < count; i += 16) {
    const Floats v = values(x + i);
    found = most(found, magnitude(v)), wrong = fma(v, zero(), wrong);
  }
  return any_nan(wrong) ? std::numeric_limits<float>::quiet_NaN() : largest(found);
}

// As torchao rounds a row; its smallest step is float32's epsilon.
template <typename T>
float row_step(const T* x, int64_t K, T* room) {
  float most = 0;
  for (int64_t k = 0; k < K; k += SPAN) {
    const float here = largest_of(span_of(x, K, k, room), SPAN);
    // NaN replaces a number, and no number replaces NaN
    if (!(here <= most) && most == most) most = here;
  }
  return most / 127.5f < 0x1p-23f ? 0x1p-23f : most / 127.5f;
}

template <typename T>
void prepare_row(const T* x, int64_t K, Rounding rounding, int64_t R, int64_t r, int32_t* tile) {
  T room[SPAN];
  const float step = rounding == Rounding::row ? row_step(x, K, room) : 1;
  const bool integers = rounding != Rounding::none;
  const int64_t words = words_of(integers);
  for (int64_t k = 0; k < K; k += SPAN, tile += span_words(integers) * R) {
    const T* from = span_of(x, K, k, room);
    auto* sums = reinterpret_cast<float*>(tile) + words * R;
    const float span = rounding == Rounding::spans ? largest_of(from, SPAN) / 127 : step;
    for (int g = 0; g < SPAN / GROUP; g++) {
      const T* group = from + GROUP * g;
      const float scale = rounding == Rounding::groups ? largest_of(group, GROUP) / 127 : span;
      sums[(24 + g) * R + r] = scale;
      float halves[2];
      for (int h = 0; h < 2; h++) {
        const Floats v = values(group + 16 * h);
        if (integers) {
          int8_t bytes[16];
          halves[h] = static_cast<float>(round_bytes(mul(v, splat(scale == 0 ? 0 : 1 / scale)), bytes));
          for (int j = 0; j < 4; j++)
            std::memcpy(tile + (8 * g + 4 * h + j) * R + r, bytes + 4 * j, 4);
        } else {
          float lanes[16];
          store(lanes, v);
          halves[h] = total(v);
          for (int j = 0; j < 16; j++)
            std::memcpy(tile + (32 * g + 16 * h + j) * R + r, lanes + j, 4);
        }
        sums[(8 + 2 * g + h) * R + r] = halves[h];
      }
      sums[g * R + r] = halves[0] + halves[1];
    }
  }
}

void prepare(const void* x, bool bf16, int64_t K, Rounding rounding, int64_t R, int64_t r,
             int32_t* tile) {
  if (bf16) return prepare_row(static_cast<const uint16_t*>(x), K, rounding, R, r, tile);
  prepare_row(static_cast<const float*>(x), K, rounding, R, r, tile);
}

}  // namespace eepass::EEPASS_ISA
