// CPU kernels of eepass::attend_rows and eepass::attend_selected.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>

#include "results.h"
#include "rows.h"

namespace eepass {
namespace {

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask) {
  TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3 && mask.dim() == 2,
              "attend_rows: q, k, v must have 3 dimensions and the mask 2");
  TORCH_CHECK(k.size(0) > 0 && q.size(0) % k.size(0) == 0, "attend_rows: ", q.size(0),
              " query heads for ", k.size(0), " groups");
  TORCH_CHECK(k.size(2) == q.size(2) && v.size(0) == k.size(0) && v.size(1) == k.size(1),
              "attend_rows: q ", q.sizes(), ", k ", k.sizes(), " and v ", v.sizes(),
              " do not go together");
  TORCH_CHECK(mask.size(0) == q.size(1) && mask.size(1) == k.size(1), "attend_rows: a mask of ",
              mask.sizes(), " for ", q.size(1), " rows and ", k.size(1), " slots");
  TORCH_CHECK(k.size(1) < std::numeric_limits<int32_t>::max(), "attend_rows: too many slots");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  q.scalar_type() == mask.scalar_type(),
              "attend_rows: all tensors must have one dtype");
  TORCH_CHECK(q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kFloat,
              "attend_rows: dtype must be float32 or bfloat16");
}

// A dimension of size 1 may have any stride.
at::Tensor lanes_together(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// `slots` [R, K], or undefined: all.
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& mask, double scale, const at::Tensor& slots) {
  check(q, k, v, mask);
  const at::Tensor q_ = lanes_together(q), k_ = lanes_together(k), v_ = lanes_together(v);
  const at::Tensor mask_ = lanes_together(mask);
  at::Tensor out = result({q.size(0), q.size(1), v.size(2)}, q.scalar_type());
  if (out.numel() == 0) return out;
  AttendCall call{q_.const_data_ptr(), k_.const_data_ptr(), v_.const_data_ptr(),
                  mask_.const_data_ptr(), out.mutable_data_ptr(),
                  q_.stride(0), q_.stride(1), k_.stride(0), k_.stride(1), v_.stride(0),
                  v_.stride(1), mask_.stride(0), q.size(0), k.size(0), q.size(1), k.size(1),
                  q.size(2), v.size(2), static_cast<float>(scale),
                  q.scalar_type() == at::kBFloat16};
  const at::Tensor slots_ = slots.defined() ? lanes_together(slots) : slots;
  if (slots.defined()) {
    call.slots = slots_.const_data_ptr<int32_t>();
    call.s0 = slots_.stride(0), call.K = slots.size(1);
  }
  row_kernels()->attend(call);
  return out;
}

at::Tensor attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& mask, double scale) {
  return attend(q, k, v, mask, scale, {});
}

at::Tensor attend_selected(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                           const at::Tensor& mask, const at::Tensor& slots, double scale) {
  TORCH_CHECK(slots.dim() == 2 && slots.scalar_type() == at::kInt && slots.size(0) == q.size(1),
              "attend_selected: slots must be int32 [", q.size(1), ", K], and are ",
              slots.scalar_type(), " ", slots.sizes());
  return attend(q, k, v, mask, scale, slots);
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) {
  // the reference implementation runs where there are no kernels
  if (!eepass::row_kernels()) return;
  m.impl("attend_rows", &eepass::attend_rows);
  m.impl("attend_selected", &eepass::attend_selected);
}
