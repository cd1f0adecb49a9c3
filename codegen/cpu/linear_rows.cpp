// CPU kernels of eepass::linear_rows and eepass::logits_rows.

#include <ATen/core/Tensor.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <vector>

#include "isa.h"
#include "results.h"
#include "rows.h"

namespace eepass {
namespace {

using Biases = c10::List<std::optional<at::Tensor>>;

void check_shapes(const at::Tensor& x, at::TensorList weights, const Biases& biases) {
  TORCH_CHECK(x.dim() == 2, "linear_rows: x has ", x.dim(), " dimensions, 2 are needed");
  TORCH_CHECK(weights.size() == biases.size(), "linear_rows: ", weights.size(), " weights and ",
              biases.size(), " biases");
  for (size_t i = 0; i < weights.size(); i++) {
    const auto& weight = weights[i];
    TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "linear_rows: a weight of shape ",
                weight.sizes(), " for rows of shape ", x.sizes());
    if (const std::optional<at::Tensor> bias = biases.get(i); bias.has_value())
      TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0),
                  "linear_rows: a bias of shape ", bias->sizes(), " for a weight of shape ",
                  weight.sizes());
  }
}

bool fits(const at::Tensor& x, at::TensorList weights) {
  for (const auto& weight : weights)
    if (weight.scalar_type() != x.scalar_type() || !weight.is_contiguous() || !weight.is_cpu())
      return false;
  return x.is_cpu() && x.size(1) > 0 &&
         (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat);
}

std::vector<at::Tensor> products(const at::Tensor& given, at::TensorList weights,
                                 const Biases& biases, bool float_out) {
  const at::Tensor x = given.contiguous();
  const auto dtype = float_out ? at::kFloat : x.scalar_type();
  std::vector<at::Tensor> outs, kept;
  std::vector<Linear> layers;
  for (size_t i = 0; i < weights.size(); i++) {
    const int64_t N = weights[i].size(0);
    outs.push_back(result({x.size(0), N}, dtype));
    const float* bias = nullptr;
    if (const std::optional<at::Tensor> b = biases.get(i); b.has_value()) {
      kept.push_back(b->to(at::kFloat).contiguous());
      bias = kept.back().const_data_ptr<float>();
    }
    layers.push_back({weights[i].const_data_ptr(), bias, outs.back().mutable_data_ptr(), N});
  }
  if (x.size(0))
    row_kernels()->linears({x.const_data_ptr(), x.size(0), x.size(1), layers.data(),
                            static_cast<int64_t>(layers.size()),
                            x.scalar_type() == at::kBFloat16, float_out});
  return outs;
}

std::vector<at::Tensor> linear_rows(const at::Tensor& x, at::TensorList weights,
                                    const Biases& biases) {
  check_shapes(x, weights, biases);
  if (fits(x, weights)) return products(x, weights, biases, false);
  std::vector<at::Tensor> outs;
  for (size_t i = 0; i < weights.size(); i++)
    outs.push_back(at::linear(x, weights[i], std::optional<at::Tensor>(biases.get(i))));
  return outs;
}

at::Tensor logits_rows(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
  const Biases biases({bias});
  check_shapes(x, weight, biases);
  if (fits(x, weight)) return products(x, weight, biases, true)[0];
  // in float32 from the start: a product in bf16 would be rounded already
  const at::Tensor logits = at::linear(x.to(at::kFloat), weight.to(at::kFloat));
  return bias ? logits.add(bias->to(at::kFloat)) : logits;
}

}  // namespace

const RowKernels* row_kernels() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return has_bf16_products() ? &avx512bf16_rows : &avx512_rows;
  if (isa() != Isa::none) return &avx2_rows;
#endif
  return nullptr;
}

}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  // the reference implementations run where there are no kernels
  if (!eepass::row_kernels()) return;
  m.impl("linear_rows", &eepass::linear_rows);
  m.impl("logits_rows", &eepass::logits_rows);
}
