// CPU kernels of eepass::packed_rows and eepass::packed_logits: few or many rows times packed weights.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "packed.h"

namespace eepass {
namespace {

using Biases = c10::List<std::optional<at::Tensor>>;

// How x is rounded: to int8 with a scale for each SPAN inputs, with one for the whole row as torchao
// does it, or not at all.
enum class Rounding { spans, row, none };

const PackedKernels* best_kernels() {
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl"))
    return packed_kernels_avx512();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("f16c"))
    return nullptr;
  return __builtin_cpu_supports("avxvnni") ? packed_kernels_avxvnni() : packed_kernels_avx2();
}

const PackedKernels*& kernels() {
  static const PackedKernels* chosen = best_kernels();
  return chosen;
}

// One row of x as kernels read it, among the R of its tile.
template <typename T>
void prepare_row(const T* x, int64_t K, Rounding rounding, int64_t R, int64_t r, int32_t* tile) {
  const bool integers = rounding != Rounding::none;
  const int64_t words = words_of(integers);
  float values[SPAN], row_step = 0;
  if (rounding == Rounding::row) {
    float most = 0;
    for (int64_t k = 0; k < K; k++) most = std::max(most, std::abs(to_float(x[k])));
    // torchao's smallest step is float32's epsilon
    row_step = std::max(most / 127.5f, 0x1p-23f);
  }
  for (int64_t k = 0; k < K; k += SPAN, tile += span_words(integers) * R) {
    const int64_t count = std::min(SPAN, K - k);
    for (int64_t i = 0; i < count; i++) values[i] = to_float(x[k + i]);
    std::fill(values + count, values + SPAN, 0.0f);
    auto* sums = reinterpret_cast<float*>(tile) + words * R;
    float scale = 1;
    float sums16[16];
    if (integers) {
      float most = 0;
      for (int64_t i = 0; i < SPAN; i++) most = std::max(most, std::abs(values[i]));
      scale = rounding == Rounding::row ? row_step : most / 127;
      const float by = scale > 0 ? 1 / scale : 0;
      alignas(64) int8_t bytes[SPAN];
      for (int64_t i = 0; i < SPAN; i++) {
        const float code = std::nearbyint(values[i] * by);
        bytes[i] = static_cast<int8_t>(std::min(std::max(code, -128.0f), 127.0f));
      }
      for (int64_t i = 0; i < SPAN / 4; i++) std::memcpy(tile + i * R + r, bytes + 4 * i, 4);
      for (int i = 0; i < 16; i++) {
        int32_t sum = 0;
        for (int j = 0; j < 16; j++) sum += bytes[16 * i + j];
        sums16[i] = static_cast<float>(sum);
      }
    } else {
      for (int64_t i = 0; i < SPAN; i++) std::memcpy(tile + i * R + r, values + i, 4);
      for (int i = 0; i < 16; i++) {
        sums16[i] = 0;
        for (int j = 0; j < 16; j++) sums16[i] += values[16 * i + j];
      }
    }
    for (int i = 0; i < 8; i++) sums[i * R + r] = sums16[2 * i] + sums16[2 * i + 1];
    for (int i = 0; i < 16; i++) sums[(8 + i) * R + r] = sums16[i];
    sums[24 * R + r] = scale;
  }
}

// Rows that are multiplied together, and where they begin in the prepared words.
struct Tile {
  int64_t first, rows, taken, at;
};

std::vector<Tile> tiles_of(int64_t R, int64_t K, bool integers, int most) {
  const int64_t spans = (K + SPAN - 1) / SPAN * span_words(integers);
  std::vector<Tile> tiles;
  for (int64_t row = 0, at = 0; row < R;) {
    int64_t taken = most;
    while (taken / 2 >= R - row) taken /= 2;
    tiles.push_back({row, std::min(taken, R - row), taken, at});
    row += taken, at += taken * spans;
  }
  return tiles;
}

inline void put(float* out, const float* sums, int64_t n) { std::memcpy(out, sums, 4 * n); }
inline void put(BFloat16* out, const float* sums, int64_t n) {
  for (int64_t i = 0; i < n; i++) out[i] = BFloat16(sums[i]);
}

template <typename O>
struct Layer {
  PackedLayer weight;
  const float* bias;
  O* out;
  int64_t blocks;
};

template <typename T, typename O>
std::vector<at::Tensor> multiply_rows(const at::Tensor& given, at::TensorList packed,
                                      at::IntArrayRef forms, at::IntArrayRef outputs,
                                      const Biases& biases, Rounding rounding) {
  const at::Tensor x = given.contiguous();
  const int64_t R = x.size(0), K = x.size(1);
  const bool integers = rounding != Rounding::none;
  std::vector<at::Tensor> outs, kept;
  std::vector<Layer<O>> layers;
  int64_t total = 0;
  for (size_t i = 0; i < packed.size(); i++) {
    const Form form = form_of(forms[i]);
    TORCH_CHECK(packed_inputs(form, packed[i]) == K, "x has ", K, " columns, the weight ",
                packed_inputs(form, packed[i]));
    const int64_t N = outputs[i], blocks = packed[i].size(0);
    TORCH_CHECK((N + OUTPUTS - 1) / OUTPUTS == blocks, N, " outputs do not fit ", blocks, " blocks");
    outs.push_back(at::empty({R, N}, x.options().dtype(c10::CppTypeToScalarType<O>::value)));
    const float* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      TORCH_CHECK(b->numel() == N, "a bias of ", b->numel(), " for ", N, " outputs");
      kept.push_back(b->to(at::kFloat).contiguous());
      bias = kept.back().const_data_ptr<float>();
    }
    layers.push_back({{form, packed[i].const_data_ptr<uint8_t>(), N, K}, bias,
                      outs.back().mutable_data_ptr<O>(), blocks});
    total += blocks;
  }
  const PackedKernels& use = *kernels();
  const std::vector<Tile> tiles = tiles_of(R, K, integers, use.most_rows);
  if (tiles.empty()) return outs;
  static thread_local std::vector<int32_t> words;
  const size_t needed =
      tiles.back().at + tiles.back().taken * ((K + SPAN - 1) / SPAN) * span_words(integers);
  if (words.size() < needed) words.resize(needed);
  int32_t* prepared = words.data();
  const T* rows = x.const_data_ptr<T>();
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < static_cast<int64_t>(tiles.size()) * use.most_rows; row++) {
      const Tile& tile = tiles[row / use.most_rows];
      const int64_t r = row % use.most_rows;
      if (r >= tile.taken) continue;
      // rows of padding repeat the last one
      const int64_t from = tile.first + std::min(r, tile.rows - 1);
      prepare_row(rows + from * K, K, rounding, tile.taken, r, prepared + tile.at);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < total; task++) {
      int64_t block = task, which = 0;
      while (block >= layers[which].blocks) block -= layers[which++].blocks;
      const Layer<O>& layer = layers[which];
      const int64_t n = block * OUTPUTS, count = std::min(OUTPUTS, layer.weight.N - n);
      alignas(64) float sums[8 * OUTPUTS];
      for (const Tile& tile : tiles) {
        use.multiply(layer.weight, block, prepared + tile.at, static_cast<int>(tile.taken), integers,
                     tile.first == 0, sums);
        for (int64_t r = 0; r < tile.rows; r++) {
          float* row = sums + r * OUTPUTS;
          if (layer.bias)
            for (int64_t i = 0; i < count; i++) row[i] += layer.bias[n + i];
          put(layer.out + (tile.first + r) * layer.weight.N + n, row, count);
        }
      }
    }
  }
  return outs;
}

std::vector<at::Tensor> packed_rows(const at::Tensor& x, at::TensorList packed, at::IntArrayRef forms,
                                    at::IntArrayRef outputs, const Biases& biases,
                                    int64_t activations) {
  TORCH_CHECK(x.dim() == 2 && packed.size() == forms.size() && packed.size() == outputs.size() &&
                  packed.size() == biases.size(),
              "one form, one number of outputs and one bias for each weight, x [R, K]");
  TORCH_CHECK(activations >= 0 && activations <= 2, "activations=", activations);
  TORCH_CHECK(kernels() != nullptr, "packed weights need a processor with AVX2, FMA and F16C");
  const auto rounding = static_cast<Rounding>(activations);
  if (x.scalar_type() == at::kFloat)
    return multiply_rows<float, float>(x, packed, forms, outputs, biases, rounding);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  return multiply_rows<BFloat16, BFloat16>(x, packed, forms, outputs, biases, rounding);
}

at::Tensor packed_logits(const at::Tensor& x, const at::Tensor& packed, int64_t form, int64_t outputs,
                         const std::optional<at::Tensor>& bias, int64_t activations) {
  TORCH_CHECK(x.dim() == 2 && kernels() != nullptr && activations >= 0 && activations <= 2,
              "x [R, K], activations 0, 1 or 2, and a processor with AVX2");
  const auto rounding = static_cast<Rounding>(activations);
  const Biases biases({bias});
  if (x.scalar_type() == at::kFloat)
    return multiply_rows<float, float>(x, packed, form, outputs, biases, rounding)[0];
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  return multiply_rows<BFloat16, float>(x, packed, form, outputs, biases, rounding)[0];
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("packed_rows", &eepass::packed_rows);
  m.impl("packed_logits", &eepass::packed_logits);
}

// Choose the kernels of an instruction set by name ("best": the best the processor has, null: as they
// are); returns the name of those in use, null where the name is unknown or there are none.
extern "C" const char* eepass_packed_isa(const char* name) {
  using namespace eepass;
  if (name != nullptr) {
    const PackedKernels* wanted = std::strcmp(name, "best") ? nullptr : best_kernels();
    for (const auto* one : {packed_kernels_avx512(), packed_kernels_avxvnni(), packed_kernels_avx2()})
      if (std::strcmp(name, one->name) == 0) wanted = one;
    if (wanted == nullptr) return nullptr;
    kernels() = wanted;
  }
  return kernels() ? kernels()->name : nullptr;
}
