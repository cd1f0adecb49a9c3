// CPU kernel of eepass::top_logits: the few largest of many.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "results.h"

namespace eepass {
namespace {

// Numbers whose largest is found first: most blocks have none of the k.
constexpr int64_t BLOCK = 64;

inline float largest_of(const float* x, int64_t count) {
  float found = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < count; i++) found = x[i] > found ? x[i] : found;
  return found;
}

// The k largest of x [N], the largest first, of equal ones the first.
void row_of(const float* x, int64_t N, int64_t k, float* values, int64_t* index) {
  int64_t held = 0;
  for (int64_t begin = 0; begin < N; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, N - begin);
    if (held == k && largest_of(x + begin, count) <= values[k - 1]) continue;
    for (int64_t i = begin; i < begin + count; i++) {
      if (held == k && !(x[i] > values[k - 1])) continue;
      int64_t place = held < k ? held++ : k - 1;
      for (; place > 0 && x[i] > values[place - 1]; place--)
        values[place] = values[place - 1], index[place] = index[place - 1];
      values[place] = x[i], index[place] = i;
    }
  }
}

std::vector<at::Tensor> top_logits(const at::Tensor& given, int64_t k) {
  TORCH_CHECK(given.dim() == 2 && given.scalar_type() == at::kFloat && k > 0 && k <= given.size(1),
              "top_logits: ", k, " of float32 logits ", given.sizes());
  const at::Tensor logits = given.contiguous();
  const int64_t R = logits.size(0), N = logits.size(1);
  at::Tensor values = result({R, k}, at::kFloat);
  at::Tensor index = result({R, k}, at::kLong);
  const float* x = logits.const_data_ptr<float>();
  float* to = values.mutable_data_ptr<float>();
  int64_t* at = index.mutable_data_ptr<int64_t>();
#pragma omp parallel for schedule(static) if (R * N >= 4096)
  for (int64_t r = 0; r < R; r++) row_of(x + r * N, N, k, to + r * k, at + r * k);
  return {values, index};
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) { m.impl("top_logits", &eepass::top_logits); }
