// CPU kernels of eepass::quantized_rows and eepass::quantized_logits.
//
// Codes are dequantised to bf16 in registers and then multiplied as other weights are, so the
// results have the bits of the same layer with dequantised weights. 4-bit codes index a table of
// their group's 16 values, so that dequantising takes less time than reading them.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "tiles.h"

namespace eepass {
namespace {

using Biases = c10::List<std::optional<at::Tensor>>;

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

// Columns that one load of codes covers.
constexpr int64_t WIDTH = 64;

// A quantised weight and its layer's output; scales and mins in their stored dtype.
template <typename O>
struct Layer {
  at::Tensor codes, scales, mins;
  int64_t K, groups, shift, blocks;
  Output<O> output;
};

// Weight rows from `first` on; each has `groups` groups of 1 << shift columns, with a float32 scale
// and min each.
template <int BITS, bool MINS>
struct Quantized {
  using L = Bf16Lanes;
  static constexpr int64_t width = WIDTH;
  static constexpr bool any_width = false;
  struct Row {
    const uint8_t* p;
    const float *scales, *mins;
    int64_t shift;
    const char* at(int64_t k) const { return reinterpret_cast<const char*>(p) + k * BITS / 8; }
    __m512 value(__m512 codes, int64_t k) const {
      const __m512 scale = _mm512_set1_ps(scales[k >> shift]);
      return MINS ? _mm512_fmadd_ps(codes, scale, _mm512_set1_ps(mins[k >> shift]))
                  : _mm512_mul_ps(codes, scale);
    }
    void load(int64_t k, L::V* v) const {
      if constexpr (BITS == 8) {
        for (int half = 0; half < 2; half++) {
          const auto* codes = reinterpret_cast<const __m128i*>(p + k + half * 32);
          __m512 values[2];
          for (int i = 0; i < 2; i++)
            values[i] = value(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(codes + i))),
                              k + half * 32 + i * 16);
          v[half] = _mm512_cvtne2ps_pbh(values[1], values[0]);
        }
      } else {
        const __m512 sixteen = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512 codes = MINS ? sixteen : _mm512_sub_ps(sixteen, _mm512_set1_ps(8));
        // its lower half has the 16 values of the first 32 columns, its upper half of the others
        const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(value(codes, k + 32), value(codes, k));
        const auto* bytes = reinterpret_cast<const __m256i*>(p + k / 2);
        const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes));
        const __m512i low = _mm512_and_si512(words, _mm512_set1_epi16(15));
        const __m512i high =
            _mm512_or_si512(_mm512_srli_epi16(words, 4), _mm512_set1_epi16(16));
        v[0] = (L::V)_mm512_permutexvar_epi16(low, table);
        v[1] = (L::V)_mm512_permutexvar_epi16(high, table);
      }
    }
  };
  const uint8_t* codes;
  const float *scales, *mins;
  int64_t first, K, groups, shift;
  Row row(int64_t n) const {
    const int64_t at = (n - first) * groups;
    return {codes + n * (K * BITS / 8), scales + at, MINS ? mins + at : nullptr, shift};
  }
};

// `count` elements of a tensor from index `from` on, as float32; in `room` if converted.
const float* floats(const at::Tensor& numbers, int64_t from, int64_t count,
                    std::vector<float>& room) {
  if (numbers.scalar_type() == at::kFloat) return numbers.const_data_ptr<float>() + from;
  if (static_cast<int64_t>(room.size()) < count) room.resize(count);
  const bool half = numbers.scalar_type() == at::kHalf;
  const auto* p = static_cast<const uint16_t*>(numbers.const_data_ptr()) + from;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t n = std::min<int64_t>(16, count - i);
    const __m256i bits = _mm256_maskz_loadu_epi16(first(n), p + i);
    const __m512 values =
        half ? _mm512_cvtph_ps(bits)
             : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    _mm512_mask_storeu_ps(room.data() + i, first(n), values);
  }
  return room.data();
}

template <int BITS, bool MINS, typename O>
void weight_block(const BFloat16* x, const Layer<O>& layer, int64_t R, int64_t n) {
  static thread_local std::vector<float> scales, mins;
  const int64_t from = n * layer.groups;
  const int64_t count = std::min(BLOCK, layer.output.N - n) * layer.groups;
  const Quantized<BITS, MINS> weights{
      static_cast<const uint8_t*>(layer.codes.const_data_ptr()),
      floats(layer.scales, from, count, scales),
      MINS ? floats(layer.mins, from, count, mins) : nullptr,
      n, layer.K, layer.groups, layer.shift};
  block(x, weights, layer.output, R, n, layer.K);
}

template <typename O>
void any_block(const BFloat16* x, const Layer<O>& layer, int64_t R, int64_t n) {
  const bool eight = layer.codes.scalar_type() == at::kChar, lows = layer.mins.defined();
  if (eight && lows) return weight_block<8, true>(x, layer, R, n);
  if (eight) return weight_block<8, false>(x, layer, R, n);
  if (lows) return weight_block<4, true>(x, layer, R, n);
  weight_block<4, false>(x, layer, R, n);
}

// Rows rounded to int8, each with its step and the sum of its codes.
struct Rounded {
  std::vector<int8_t> codes;
  std::vector<float> steps;
  std::vector<int32_t> sums;
};

Rounded rounded(const BFloat16* x, int64_t R, int64_t K) {
  Rounded rows{std::vector<int8_t>(R * K), std::vector<float>(R), std::vector<int32_t>(R)};
  for (int64_t r = 0; r < R; r++) {
    float most = 0;
    for (int64_t k = 0; k < K; k++) most = std::max(most, std::abs(to_float(x[r * K + k])));
    // as in torchao, the smallest step is float32's epsilon
    const float step = std::max(most / 127.5f, 0x1p-23f), by = 1.0f / step;
    int32_t sum = 0;
    for (int64_t k = 0; k < K; k++) {
      const float code = std::nearbyint(to_float(x[r * K + k]) * by);
      const auto kept = static_cast<int8_t>(std::min(std::max(code, -128.0f), 127.0f));
      rows.codes[r * K + k] = kept;
      sum += kept;
    }
    rows.steps[r] = step, rows.sums[r] = sum;
  }
  return rows;
}

// Up to 8 rows times one weight row. The instruction multiplies unsigned by signed bytes, so
// weights are taken as w + 128.
template <int R>
inline void integer_sums(const int8_t* x, const int8_t* weight, int64_t K, int32_t* sums) {
  __m512i acc[R];
  for (auto& a : acc) a = _mm512_setzero_si512();
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  for (int64_t k = 0; k < K; k += WIDTH) {
    const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(weight + k), sign);
    _mm_prefetch(reinterpret_cast<const char*>(weight + k) + AHEAD_BYTES, _MM_HINT_T1);
    for (int r = 0; r < R; r++)
      acc[r] = _mm512_dpbusd_epi32(acc[r], w, _mm512_loadu_si512(x + r * K + k));
  }
  for (int r = 0; r < R; r++) sums[r] = _mm512_reduce_add_epi32(acc[r]);
}

inline float as(float, float y) { return y; }
inline BFloat16 as(BFloat16, float y) { return BFloat16(y); }

template <int R, typename O>
void integer_rows(const Rounded& x, const Layer<O>& layer, int64_t row, int64_t n, float scale) {
  int32_t sums[R];
  const auto* weight = layer.codes.template const_data_ptr<int8_t>() + n * layer.K;
  integer_sums<R>(x.codes.data() + row * layer.K, weight, layer.K, sums);
  const float bias = layer.output.bias ? layer.output.bias[n] : 0.0f;
  for (int r = 0; r < R; r++) {
    const float dot = static_cast<float>(sums[r] - 128 * x.sums[row + r]);
    const float y = std::fma(dot * x.steps[row + r], scale, bias);
    layer.output.out[(row + r) * layer.output.N + n] = as(O{}, y);
  }
}

template <typename O>
void integer_block(const Rounded& x, const Layer<O>& layer, int64_t R, int64_t from) {
  static thread_local std::vector<float> room;
  const int64_t count = std::min(BLOCK, layer.output.N - from);
  const float* scales = floats(layer.scales, from, count, room);
  for (int64_t n = from; n < from + count; n++) {
    int64_t row = 0;
    const float scale = scales[n - from];
    for (; row + 8 <= R; row += 8) integer_rows<8>(x, layer, row, n, scale);
    if (R - row >= 4) integer_rows<4>(x, layer, row, n, scale), row += 4;
    if (R - row >= 2) integer_rows<2>(x, layer, row, n, scale), row += 2;
    if (R - row >= 1) integer_rows<1>(x, layer, row, n, scale);
  }
}

bool fits(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
          const std::optional<at::Tensor>& mins, bool dynamic) {
  const int64_t K = x.size(1), groups = scales.size(1), size = K / groups;
  const int64_t least = codes.scalar_type() == at::kChar ? 16 : 32;
  const auto kind = scales.scalar_type();
  const bool known = kind == at::kHalf || kind == at::kBFloat16 || kind == at::kFloat;
  const bool whole = groups == 1 || (size >= least && (size & (size - 1)) == 0);
  const bool same = !mins.has_value() || (mins->is_contiguous() && mins->sizes() == scales.sizes() &&
                                          (mins->scalar_type() == at::kHalf ||
                                           mins->scalar_type() == at::kBFloat16 ||
                                           mins->scalar_type() == at::kFloat));
  // sums of products of two bytes stay within 32 bits
  const bool narrow = !dynamic || (groups == 1 && K <= 32768);
  return x.scalar_type() == at::kBFloat16 && K % WIDTH == 0 && known && whole && same && narrow &&
         codes.is_contiguous() && scales.is_contiguous();
}

template <typename O>
std::vector<at::Tensor> products(const at::Tensor& given, at::TensorList codes,
                                 at::TensorList scales, const Biases& mins, const Biases& biases,
                                 bool dynamic) {
  const at::Tensor x = given.contiguous();
  const int64_t R = x.size(0), K = x.size(1);
  std::vector<at::Tensor> outs, kept;
  std::vector<Layer<O>> layers;
  int64_t total = 0;
  for (size_t i = 0; i < codes.size(); i++) {
    const int64_t N = codes[i].size(0), blocks = (N + BLOCK - 1) / BLOCK;
    const int64_t groups = scales[i].size(1);
    outs.push_back(at::empty({R, N}, x.options().dtype(c10::CppTypeToScalarType<O>::value)));
    const float* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      kept.push_back(b->to(at::kFloat).contiguous());
      bias = kept.back().const_data_ptr<float>();
    }
    const std::optional<at::Tensor> low = mins.get(i);
    const int64_t shift = groups == 1 ? 62 : __builtin_ctzll(K / groups);
    layers.push_back({codes[i], scales[i], low.value_or(at::Tensor()), K, groups, shift, blocks,
                      {bias, outs.back().mutable_data_ptr<O>(), N}});
    total += blocks;
  }
  const auto* rows = x.const_data_ptr<BFloat16>();
  const Rounded integers = dynamic ? rounded(rows, R, K) : Rounded();
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < total; task++) {
    int64_t index = task, which = 0;
    while (index >= layers[which].blocks) index -= layers[which++].blocks;
    if (dynamic)
      integer_block(integers, layers[which], R, index * BLOCK);
    else
      any_block(rows, layers[which], R, index * BLOCK);
  }
  return outs;
}

#endif

// Where the kernels do not apply: the dequantised weight, and the kernel for that.
at::Tensor by_values(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                     const std::optional<at::Tensor>& mins, const std::optional<at::Tensor>& bias,
                     bool dynamic) {
  if (dynamic)
    return operator_named<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                     const std::optional<at::Tensor>&)>("eepass::dynamic_logits")
        .call(x, codes, scales, bias);
  const at::Tensor weight =
      operator_named<at::Tensor(const at::Tensor&, const at::Tensor&,
                                const std::optional<at::Tensor>&, at::ScalarType)>(
          "eepass::dequantize")
          .call(codes, scales, mins, x.scalar_type());
  return operator_named<at::Tensor(const at::Tensor&, const at::Tensor&,
                                   const std::optional<at::Tensor>&)>("eepass::logits_rows")
      .call(x, weight, bias);
}

std::vector<at::Tensor> quantized_rows(const at::Tensor& x, at::TensorList codes,
                                       at::TensorList scales, const Biases& mins,
                                       const Biases& biases, bool dynamic) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  bool all = true;
  for (size_t i = 0; i < codes.size(); i++)
    all &= fits(x, codes[i], scales[i], std::optional<at::Tensor>(mins.get(i)), dynamic);
  if (all) return products<BFloat16>(x, codes, scales, mins, biases, dynamic);
#endif
  std::vector<at::Tensor> outs;
  for (size_t i = 0; i < codes.size(); i++)
    outs.push_back(by_values(x, codes[i], scales[i], std::optional<at::Tensor>(mins.get(i)),
                             std::optional<at::Tensor>(biases.get(i)), dynamic)
                       .to(x.scalar_type()));
  return outs;
}

at::Tensor quantized_logits(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales,
                            const std::optional<at::Tensor>& mins,
                            const std::optional<at::Tensor>& bias, bool dynamic) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  if (fits(x, codes, scales, mins, dynamic))
    return products<float>(x, codes, scales, Biases({mins}), Biases({bias}), dynamic)[0];
#endif
  return by_values(x, codes, scales, mins, bias, dynamic);
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("quantized_rows", &eepass::quantized_rows);
  m.impl("quantized_logits", &eepass::quantized_logits);
}
