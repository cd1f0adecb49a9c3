// CPU kernels of eepass::packed_rows and eepass::packed_logits: few or many rows times packed weights.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "isa.h"
#include "packed.h"
#include "results.h"
#include "scratch.h"

namespace eepass {
namespace {

using c10::BFloat16;
using Biases = c10::List<std::optional<at::Tensor>>;

// The kernels of the instruction set in use; null where there are none.
const PackedKernels* kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::avx512: return packed_kernels_avx512();
    case Isa::avxvnni: return packed_kernels_avxvnni();
    case Isa::avx2: return packed_kernels_avx2();
    case Isa::none: break;
  }
#endif
  return nullptr;
}

// Rows that are multiplied together, and where they begin in the prepared words.
struct Tile {
  int64_t first, rows, taken, at;
};

// All but the last have `most` rows.
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

// What an operator's number stands for: int8 as the weight's form wants it, by the row, unrounded.
Rounding rounding_of(int64_t activations, Form form) {
  if (activations == 0) return coarse(form) ? Rounding::spans : Rounding::groups;
  return activations == 1 ? Rounding::row : Rounding::none;
}

template <typename O>
struct Layer {
  PackedLayer weight;
  // which of the ways x is rounded
  int64_t way;
  const at::Tensor* bias;
  O* out;
  int64_t blocks;
};

// Adds `count` elements of a bias from n on.
inline void add_bias(const at::Tensor& bias, int64_t n, int64_t count, float* sums) {
  if (bias.scalar_type() == at::kFloat) {
    const float* p = bias.const_data_ptr<float>() + n;
    for (int64_t i = 0; i < count; i++) sums[i] += p[i];
  } else {
    const BFloat16* p = bias.const_data_ptr<BFloat16>() + n;
    for (int64_t i = 0; i < count; i++) sums[i] += static_cast<float>(p[i]);
  }
}

template <typename T, typename O>
std::vector<at::Tensor> multiply_rows(const at::Tensor& given, at::TensorList packed,
                                      at::IntArrayRef forms, at::IntArrayRef outputs,
                                      const Biases& biases, int64_t activations) {
  const at::Tensor x = given.contiguous();
  const int64_t R = x.size(0), K = x.size(1);
  const bool integers = activations != 2;
  std::vector<at::Tensor> outs, kept;
  kept.reserve(packed.size());
  std::vector<Layer<O>> layers;
  std::vector<Rounding> ways;
  int64_t total = 0;
  for (size_t i = 0; i < packed.size(); i++) {
    const Form form = form_of(forms[i]);
    TORCH_CHECK(packed_inputs(form, packed[i]) == K, "x has ", K, " columns, the weight ",
                packed_inputs(form, packed[i]));
    const int64_t N = outputs[i], blocks = packed[i].size(0);
    TORCH_CHECK((N + OUTPUTS - 1) / OUTPUTS == blocks, N, " outputs do not fit ", blocks, " blocks");
    outs.push_back(result({R, N}, c10::CppTypeToScalarType<O>::value));
    const at::Tensor* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      TORCH_CHECK(b->numel() == N, "a bias of ", b->numel(), " for ", N, " outputs");
      const bool read = b->scalar_type() == at::kFloat || b->scalar_type() == at::kBFloat16;
      kept.push_back((read ? *b : b->to(at::kFloat)).contiguous());
      bias = &kept.back();
    }
    const Rounding rounding = rounding_of(activations, form);
    const int64_t way = std::find(ways.begin(), ways.end(), rounding) - ways.begin();
    if (way == static_cast<int64_t>(ways.size())) ways.push_back(rounding);
    layers.push_back({{form, packed[i].const_data_ptr<uint8_t>(), N, K}, way, bias,
                      outs.back().mutable_data_ptr<O>(), blocks});
    total += blocks;
  }
  const PackedKernels& use = *kernels();
  const std::vector<Tile> tiles = tiles_of(R, K, integers, use.most_rows);
  if (tiles.empty()) return outs;
  const int64_t spans = (K + SPAN - 1) / SPAN, taken = tiles.back().first + tiles.back().taken;
  const int64_t needed = taken * spans * span_words(integers);
  const int64_t bytes = needed * static_cast<int64_t>(ways.size() * sizeof(int32_t));
  const auto room = [&] { return reinterpret_cast<int32_t*>(scratch(bytes, 0)); };
  const T* rows = x.const_data_ptr<T>();
  const auto prepare = [&](const Tile& tile, int32_t* to) {
    for (int64_t r = 0; r < tile.taken; r++) {
      // rows of padding repeat the last one
      const int64_t from = tile.first + std::min(r, tile.rows - 1);
      for (size_t way = 0; way < ways.size(); way++)
        use.prepare(rows + from * K, sizeof(T) == 2, K, ways[way], tile.taken, r,
                    to + way * needed + tile.at);
    }
  };
  // A few rows are prepared by each thread for itself: waiting for the others, and for what they
  // wrote to arrive from another core's cache, takes longer.
  const bool shared = tiles.size() > 1;
  int32_t* const common = shared ? room() : nullptr;
#pragma omp parallel
  {
    int32_t* const prepared = shared ? common : room();
    if (shared) {
      // tiles share no cache line
#pragma omp for schedule(static)
      for (size_t i = 0; i < tiles.size(); i++) prepare(tiles[i], prepared);
    } else {
      prepare(tiles[0], prepared);
    }
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < total; task++) {
      int64_t block = task, which = 0;
      while (block >= layers[which].blocks) block -= layers[which++].blocks;
      const Layer<O>& layer = layers[which];
      const int32_t* given_x = prepared + layer.way * needed;
      const int64_t n = block * OUTPUTS, count = std::min(OUTPUTS, layer.weight.N - n);
      alignas(64) float sums[8 * OUTPUTS];
      for (const Tile& tile : tiles) {
        use.multiply(layer.weight, block, given_x + tile.at, static_cast<int>(tile.taken),
                     ways[layer.way], tile.first == 0, sums);
        for (int64_t r = 0; r < tile.rows; r++) {
          float* row = sums + r * OUTPUTS;
          if (layer.bias) add_bias(*layer.bias, n, count, row);
          put(layer.out + (tile.first + r) * layer.weight.N + n, row, count);
        }
      }
    }
  }
  return outs;
}

// Where there are no kernels: the weight's values, and rows that are not rounded; float32 [R, N].
at::Tensor by_values(const at::Tensor& x, const at::Tensor& packed, int64_t form, int64_t outputs,
                     const std::optional<at::Tensor>& bias) {
  static const auto unpack =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("eepass::unpack", "")
          .typed<at::Tensor(const at::Tensor&, int64_t, int64_t, const std::optional<at::Tensor>&)>();
  const at::Tensor weight = unpack.call(packed, form, outputs, std::nullopt);
  const at::Tensor logits = at::linear(x.to(at::kFloat), weight);
  return bias ? logits.add(bias->to(at::kFloat)) : logits;
}

std::vector<at::Tensor> packed_rows(const at::Tensor& x, at::TensorList packed, at::IntArrayRef forms,
                                    at::IntArrayRef outputs, const Biases& biases,
                                    int64_t activations) {
  TORCH_CHECK(x.dim() == 2 && packed.size() == forms.size() && packed.size() == outputs.size() &&
                  packed.size() == biases.size(),
              "one form, one number of outputs and one bias for each weight, x [R, K]");
  TORCH_CHECK(activations >= 0 && activations <= 2, "activations=", activations);
  if (kernels() == nullptr) {
    std::vector<at::Tensor> outs;
    for (size_t i = 0; i < packed.size(); i++)
      outs.push_back(by_values(x, packed[i], forms[i], outputs[i], biases.get(i)).to(x.scalar_type()));
    return outs;
  }
  if (x.scalar_type() == at::kFloat)
    return multiply_rows<float, float>(x, packed, forms, outputs, biases, activations);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  return multiply_rows<BFloat16, BFloat16>(x, packed, forms, outputs, biases, activations);
}

at::Tensor packed_logits(const at::Tensor& x, const at::Tensor& packed, int64_t form, int64_t outputs,
                         const std::optional<at::Tensor>& bias, int64_t activations) {
  TORCH_CHECK(x.dim() == 2 && activations >= 0 && activations <= 2, "x [R, K], activations 0 to 2");
  if (kernels() == nullptr) return by_values(x, packed, form, outputs, bias);
  const Biases biases({bias});
  if (x.scalar_type() == at::kFloat)
    return multiply_rows<float, float>(x, packed, form, outputs, biases, activations)[0];
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "x is float32 or bfloat16");
  return multiply_rows<BFloat16, float>(x, packed, form, outputs, biases, activations)[0];
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("packed_rows", &eepass::packed_rows);
  m.impl("packed_logits", &eepass::packed_logits);
}
