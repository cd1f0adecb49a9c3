// CPU kernels of eepass::linear_rows and eepass::logits_rows.
//
// Reading every weight once a pass bounds decoding, so each weight is loaded once for all rows. The
// sum of a row does not depend on how many rows there are: a token gives the same bits alone and
// together with others.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <vector>

#include "tiles.h"

namespace eepass {
namespace {

#if defined(__AVX512BF16__)

// Weights that are not quantised: [N, K] in the dtype of the rows.
template <typename Lanes>
struct Plain {
  using L = Lanes;
  static constexpr int64_t width = L::width;
  static constexpr bool any_width = true;
  struct Row {
    const typename L::T* p;
    const char* at(int64_t k) const { return reinterpret_cast<const char*>(p + k); }
    void load(int64_t k, typename L::V* v) const { v[0] = L::load(p + k); }
    typename L::V load_rest(int64_t k, int64_t n) const { return L::load(p + k, n); }
  };
  const typename L::T* weight;
  int64_t K;
  Row row(int64_t n) const { return {weight + n * K}; }
};

// One linear layer, divided into blocks of weight rows.
template <typename L, typename O>
struct Linear {
  Plain<L> weights;
  Output<O> output;
  int64_t blocks;
};

template <typename L, typename O>
std::vector<at::Tensor> linears_of(const at::Tensor& x, at::TensorList weights,
                                   const c10::List<std::optional<at::Tensor>>& biases) {
  using T = typename L::T;
  const int64_t R = x.size(0), K = x.size(1);
  std::vector<at::Tensor> outs, kept;
  std::vector<Linear<L, O>> linears;
  int64_t total = 0;
  for (size_t i = 0; i < weights.size(); i++) {
    const int64_t N = weights[i].size(0), blocks = (N + BLOCK - 1) / BLOCK;
    outs.push_back(at::empty({R, N}, x.options().dtype(c10::CppTypeToScalarType<O>::value)));
    const float* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      kept.push_back(b->to(at::kFloat).contiguous());
      bias = kept.back().const_data_ptr<float>();
    }
    linears.push_back(
        {{weights[i].const_data_ptr<T>(), K}, {bias, outs.back().mutable_data_ptr<O>(), N}, blocks});
    total += blocks;
  }
  const T* rows = x.const_data_ptr<T>();
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < total; task++) {
    int64_t index = task, which = 0;
    while (index >= linears[which].blocks) index -= linears[which++].blocks;
    block(rows, linears[which].weights, linears[which].output, R, index * BLOCK, K);
  }
  return outs;
}

bool fits(const at::Tensor& x, at::TensorList weights) {
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
  // in float32 from the start: a product in bf16 would be rounded already
  const at::Tensor logits = at::linear(x.to(at::kFloat), weight.to(at::kFloat));
  return bias ? logits.add(bias->to(at::kFloat)) : logits;
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  m.impl("linear_rows", &eepass::linear_rows);
  m.impl("logits_rows", &eepass::logits_rows);
}
