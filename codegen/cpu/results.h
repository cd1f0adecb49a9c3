// Memory for what kernels return.

#pragma once

#include <ATen/core/Tensor.h>

namespace eepass {

// A tensor of uninitialised values, contiguous or of given strides. A pass makes hundreds of small
// ones, and the C library searches for each aligned block anew: these come from blocks that a thread
// keeps when they are freed, a few megabytes of them.
at::Tensor result(at::IntArrayRef sizes, at::ScalarType dtype);
at::Tensor result(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype);

}  // namespace eepass
