// The operators as C functions, for code that AOTInductor compiled ahead of time.
//
// Such code passes handles. A list of tensors is an array and its length; every returned tensor has
// an output argument, and those of a returned list follow one another.

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

std::vector<at::Tensor> tensors(const AtenTensorHandle* handles, int64_t count) {
  std::vector<at::Tensor> given;
  given.reserve(count);
  for (int64_t i = 0; i < count; i++) given.push_back(tensor(handles[i]));
  return given;
}

c10::List<std::optional<at::Tensor>> optionals(const AtenTensorHandle** handles, int64_t count) {
  c10::List<std::optional<at::Tensor>> given;
  given.reserve(count);
  for (int64_t i = 0; i < count; i++) given.push_back(optional(handles[i]));
  return given;
}

AOTITorchError linear_rows(AtenTensorHandle x, const AtenTensorHandle* weights, int64_t count,
                           const AtenTensorHandle** biases, va_list outs) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op =
        operator_named<std::vector<at::Tensor>(const at::Tensor&, at::TensorList,
                                               const c10::List<std::optional<at::Tensor>>&)>(
            "eepass::linear_rows");
    for (auto& out : op.call(tensor(x), tensors(weights, count), optionals(biases, count)))
      *va_arg(outs, AtenTensorHandle*) = new_tensor_handle(std::move(out));
  });
}

AOTITorchError packed_rows(AtenTensorHandle x, const AtenTensorHandle* packed, int64_t count,
                           const int64_t* forms, const int64_t* outputs,
                           const AtenTensorHandle** biases, int64_t activations, va_list outs) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op = operator_named<std::vector<at::Tensor>(
        const at::Tensor&, at::TensorList, at::IntArrayRef, at::IntArrayRef,
        const c10::List<std::optional<at::Tensor>>&, int64_t)>("eepass::packed_rows");
    const size_t size = count;
    for (auto& out : op.call(tensor(x), tensors(packed, count), {forms, size}, {outputs, size},
                             optionals(biases, count), activations))
      *va_arg(outs, AtenTensorHandle*) = new_tensor_handle(std::move(out));
  });
}

AOTITorchError top_logits(AtenTensorHandle logits, int64_t k, va_list outs) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op =
        operator_named<std::vector<at::Tensor>(const at::Tensor&, int64_t)>("eepass::top_logits");
    for (auto& out : op.call(tensor(logits), k))
      *va_arg(outs, AtenTensorHandle*) = new_tensor_handle(std::move(out));
  });
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_cpu_top_logits(AtenTensorHandle logits, int64_t k, ...) {
  va_list outs;
  va_start(outs, k);
  const AOTITorchError error = top_logits(logits, k, outs);
  va_end(outs);
  return error;
}

AOTITorchError aoti_torch_cpu_linear_rows(AtenTensorHandle x, const AtenTensorHandle* weights,
                                          int64_t count, const AtenTensorHandle** biases,
                                          int64_t bias_count, ...) {
  va_list outs;
  va_start(outs, bias_count);
  const AOTITorchError error = linear_rows(x, weights, count, biases, outs);
  va_end(outs);
  return error;
}

AOTITorchError aoti_torch_cpu_packed_rows(AtenTensorHandle x, const AtenTensorHandle* packed,
                                          int64_t count, const int64_t* forms, int64_t form_count,
                                          const int64_t* outputs, int64_t output_count,
                                          const AtenTensorHandle** biases, int64_t bias_count,
                                          int64_t activations, ...) {
  va_list outs;
  va_start(outs, activations);
  const AOTITorchError error =
      packed_rows(x, packed, count, forms, outputs, biases, activations, outs);
  va_end(outs);
  return error;
}

AOTITorchError aoti_torch_cpu_packed_logits(AtenTensorHandle x, AtenTensorHandle packed,
                                            int64_t form, int64_t outputs,
                                            const AtenTensorHandle* bias, int64_t activations,
                                            AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op =
        operator_named<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, int64_t,
                                  const std::optional<at::Tensor>&, int64_t)>(
            "eepass::packed_logits");
    *out = new_tensor_handle(
        op.call(tensor(x), tensor(packed), form, outputs, optional(bias), activations));
  });
}

AOTITorchError aoti_torch_cpu_unpack(AtenTensorHandle packed, int64_t form, int64_t outputs,
                                     const AtenTensorHandle* ids, AtenTensorHandle* out) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    static const auto op = operator_named<at::Tensor(const at::Tensor&, int64_t, int64_t,
                                                     const std::optional<at::Tensor>&)>(
        "eepass::unpack");
    *out = new_tensor_handle(op.call(tensor(packed), form, outputs, optional(ids)));
  });
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
