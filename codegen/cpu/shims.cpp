// The operators as C functions, for code that AOTInductor compiled ahead of time.
//
// Such code hands over handles: a list of tensors is an array and its length, and every tensor
// that is returned has a place of its own, those of a list one after another.

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <cstdarg>
#include <optional>
#include <vector>

namespace {

using torch::aot_inductor::new_tensor_handle;

const at::Tensor& tensor(AtenTensorHandle handle) {
  return *torch::aot_inductor::tensor_handle_to_tensor_pointer(handle);
}

std::optional<at::Tensor> optional(const AtenTensorHandle* handle) {
  return handle ? std::make_optional(tensor(*handle)) : std::nullopt;
}

template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

AOTITorchError linear_rows(AtenTensorHandle x, const AtenTensorHandle* weights, int64_t count,
                           const AtenTensorHandle** biases, va_list outs) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op =
        operator_named<std::vector<at::Tensor>(const at::Tensor&, at::TensorList,
                                               const c10::List<std::optional<at::Tensor>>&)>(
            "eepass::linear_rows");
    std::vector<at::Tensor> given;
    c10::List<std::optional<at::Tensor>> added;
    given.reserve(count);
    added.reserve(count);
    for (int64_t i = 0; i < count; i++) {
      given.push_back(tensor(weights[i]));
      added.push_back(optional(biases[i]));
    }
    for (auto& out : op.call(tensor(x), given, added))
      *va_arg(outs, AtenTensorHandle*) = new_tensor_handle(std::move(out));
  });
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_linear_rows(AtenTensorHandle x, const AtenTensorHandle* weights,
                                          int64_t count, const AtenTensorHandle** biases,
                                          int64_t bias_count, ...) {
  va_list outs;
  va_start(outs, bias_count);
  const AOTITorchError error = linear_rows(x, weights, count, biases, outs);
  va_end(outs);
  return error;
}

AOTITorchError aoti_torch_cpu_logits_rows(AtenTensorHandle x, AtenTensorHandle weight,
                                          const AtenTensorHandle* bias, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op = operator_named<at::Tensor(
        const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&)>(
        "eepass::logits_rows");
    *out = new_tensor_handle(op.call(tensor(x), tensor(weight), optional(bias)));
  });
}

AOTITorchError aoti_torch_cpu_attend_rows(AtenTensorHandle q, AtenTensorHandle k,
                                          AtenTensorHandle v, AtenTensorHandle mask, double scale,
                                          AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op =
        operator_named<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                  const at::Tensor&, double)>("eepass::attend_rows");
    *out = new_tensor_handle(op.call(tensor(q), tensor(k), tensor(v), tensor(mask), scale));
  });
}

}  // extern "C"
