// CPU kernel of eepass::exit_predictor: an exit point in one call.
//
// A row is one thread's: what is read (translator, K rows of the head, predictor: half a megabyte
// for 135M parameters) takes less time than waking others for each of its steps would. Everything
// is float32 inside, as the operator's definition says.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace eepass {
namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

template <typename T>
float dot(const T* w, const float* x, int64_t n) {
#if defined(__AVX512BF16__)
  __m512 sums[4];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (int part = 0; part < 4; part++)
      sums[part] = _mm512_fmadd_ps(load_floats(w + i + 16 * part, 16),
                                   _mm512_loadu_ps(x + i + 16 * part), sums[part]);
  for (; i < n; i += 16)
    sums[0] = _mm512_fmadd_ps(load_floats(w + i, n - i), load_floats(x + i, n - i), sums[0]);
  return _mm512_reduce_add_ps(
      _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
#else
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += to_float(w[i]) * x[i];
  return sum;
#endif
}

// Rows of float32 or bf16 where they lie; other dtypes are converted first.
struct Rows {
  Tensor kept;
  const float* floats = nullptr;
  const BFloat16* halves = nullptr;
  int64_t stride = 0;

  Rows() = default;
  explicit Rows(const Maybe& given) {
    if (!given.has_value()) return;
    kept = *given;
    const bool known = kept.scalar_type() == at::kFloat || kept.scalar_type() == at::kBFloat16;
    if (!known) kept = kept.to(at::kFloat);
    if (kept.dim() && kept.stride(-1) != 1) kept = kept.contiguous();
    stride = kept.dim() > 1 ? kept.stride(0) : 0;
    if (kept.scalar_type() == at::kFloat)
      floats = kept.const_data_ptr<float>();
    else
      halves = kept.const_data_ptr<BFloat16>();
  }
  explicit operator bool() const { return floats || halves; }
  float operator[](int64_t i) const { return floats ? floats[i] : to_float(halves[i]); }

  // Row `row` times x [n].
  float dot(int64_t row, const float* x, int64_t n) const {
    return floats ? eepass::dot(floats + row * stride, x, n)
                  : eepass::dot(halves + row * stride, x, n);
  }
};

// cap · tanh(logit · scale / cap), or logit · scale.
float formed(float logit, double scale, double cap) {
  logit *= static_cast<float>(scale);
  const float limit = static_cast<float>(cap);
  return limit == 0 ? logit : std::tanh(logit / limit) * limit;
}

struct Norm {
  std::string_view kind;
  Rows weight, bias;
  float eps, offset;

  // x [n] -> its normed form, in place.
  void operator()(float* x, int64_t n) const {
    if (kind == "none") return;
    double mean = 0, squares = 0;
    if (kind == "layer") {
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < n; i++) mean += x[i];
      mean /= n;
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; i++) {
      x[i] -= static_cast<float>(mean);
      squares += static_cast<double>(x[i]) * x[i];
    }
    const float inverse = 1.0f / std::sqrt(static_cast<float>(squares / n) + eps);
    for (int64_t i = 0; i < n; i++) {
      x[i] *= inverse;
      if (weight) x[i] *= weight[i] + offset;
      if (bias) x[i] += bias[i];
    }
  }
};

void softmax(const float* logits, float* chances, int64_t n) {
  // a NaN is not larger than anything, yet spreads through the sum
  float largest = -std::numeric_limits<float>::infinity(), sum = 0;
  for (int64_t i = 0; i < n; i++) largest = logits[i] > largest ? logits[i] : largest;
  for (int64_t i = 0; i < n; i++) sum += chances[i] = std::exp(logits[i] - largest);
  for (int64_t i = 0; i < n; i++) chances[i] /= sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> exit_predictor(
    const Tensor& hidden, const Maybe& scale, const Maybe& down, const Maybe& up,
    const Maybe& norm_weight, const Maybe& norm_bias, const Tensor& lm_head,
    const Maybe& head_scales, const Maybe& head_bias, const Tensor& draft_ids,
    const Tensor& previous, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const Tensor& threshold, std::string_view norm, double eps, double weight_offset,
    double logit_scale, double logit_cap) {
  TORCH_CHECK_VALUE(norm == "none" || norm == "rms" || norm == "layer", "norm='", norm,
                    "': expected none, rms or layer");
  const int64_t R = hidden.size(0), H = hidden.size(1), K = draft_ids.size(1), W = w1.size(0);
  const int64_t V = lm_head.size(0), rank = down.has_value() ? down->size(0) : 0;
  const Tensor ids = draft_ids.to(at::kLong).contiguous();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < R * K; i++)
    TORCH_CHECK_INDEX(id[i] >= 0 && id[i] < V, "draft token ", id[i], " of ", V);

  // a head of another dtype is large: convert the rows that are asked for
  const bool known = lm_head.scalar_type() == at::kFloat || lm_head.scalar_type() == at::kBFloat16;
  const Rows head(known ? lm_head : lm_head.index_select(0, ids.flatten()));
  const Rows scales(head_scales), bias(head_bias), x_of(hidden), by(scale), a(down), b(up);
  const Rows first(w1), first_bias(b1), second(w2), second_bias(b2), limit(threshold);
  const Rows before(previous);
  const Norm normed{norm, Rows(norm_weight), Rows(norm_bias), static_cast<float>(eps),
                    static_cast<float>(weight_offset)};

  const auto floats = hidden.options().dtype(at::kFloat);
  Tensor probability = at::empty({R}, floats), probabilities = at::empty({R, K}, floats);
  Tensor state = at::empty({R, H}, floats), exits = at::empty({R}, floats.dtype(at::kBool));
  float* chances = probabilities.mutable_data_ptr<float>();
  float* states = state.mutable_data_ptr<float>();
  float* found = probability.mutable_data_ptr<float>();
  bool* leave = exits.mutable_data_ptr<bool>();
#pragma omp parallel for schedule(static) if (R > 1)
  for (int64_t row = 0; row < R; row++) {
    std::vector<float> x(H), gate(rank), features(3 * K);
    float *z = states + row * H, *chance = chances + row * K;
    double squares = 0;
    for (int64_t i = 0; i < H; i++) {
      z[i] = x[i] = x_of[row * x_of.stride + i];
      squares += static_cast<double>(x[i]) * x[i];
    }
    if (rank) {
      const float length = std::sqrt(static_cast<float>(squares));
      const float unit = std::sqrt(static_cast<float>(H)) / (length < 1e-6f ? 1e-6f : length);
      for (int64_t r = 0; r < rank; r++) {
        const float inner = a.dot(r, x.data(), H) * unit;
        gate[r] = length * inner / (1.0f + std::exp(-inner));
      }
      for (int64_t i = 0; i < H; i++) z[i] = by[i] * x[i] + b.dot(i, gate.data(), rank);
    }
    normed(z, H);
    for (int64_t k = 0; k < K; k++) {
      const int64_t token = id[row * K + k];
      float logit = head.dot(known ? token : row * K + k, z, H);
      if (scales) logit *= scales[token];
      if (bias) logit += bias[token];
      features[k] = formed(logit, logit_scale, logit_cap);
    }
    softmax(features.data(), chance, K);
    for (int64_t k = 0; k < K; k++) {
      features[K + k] = chance[k];
      features[2 * K + k] = chance[k] - before[row * before.stride + k];
    }
    float score = second_bias[0];
    for (int64_t w = 0; w < W; w++) {
      const float inner = first.dot(w, features.data(), 3 * K) + first_bias[w];
      // NaN goes through
      score += (inner < 0 ? 0 : inner) * second[w];
    }
    found[row] = 1.0f / (1.0f + std::exp(-score));
    leave[row] = found[row] > limit[0];
  }
  return {probability, probabilities, state.to(hidden.scalar_type()), exits};
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) { m.impl("exit_predictor", &eepass::exit_predictor); }
