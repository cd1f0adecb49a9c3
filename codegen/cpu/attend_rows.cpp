// CPU kernel of eepass::attend_rows.
//
// A task is one row and query heads of one KV group, so that keys and values are loaded once for
// those heads.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace eepass {
namespace {

// A mask below this forbids its slot.
constexpr float FORBIDDEN = -1e30f;
constexpr float NEVER = -std::numeric_limits<float>::infinity();
// Query heads of a task: two accumulators of two vectors each, per head, fit the registers.
constexpr int MOST_HEADS = 4;

// e^x for x <= 0 without library calls, so that compilers vectorise a loop over it. Relative error
// 2e-7; 0 where e^x would be a subnormal number.
inline float exp_negative(float given) {
  const float x = std::max(given, -87.0f);
  const float n = std::floor(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return given < -87.0f ? 0.0f : p * scale;
}

// The slots a row attends to, in order, and their mask values. All sums are over these slots only,
// so a row gives the same bits wherever its slots are: draft tokens in a tree give the bits they
// give one by one.
struct Allowed {
  int64_t count;
  const int64_t* slot;
  const float* bias;
};

template <typename T>
Allowed allowed_slots(const T* mask, int64_t C, int64_t* slot, float* bias) {
  int64_t count = 0;
  const auto take = [&](int64_t c) {
    const float value = to_float(mask[c]);
    slot[count] = c;
    bias[count] = value;
    count += value >= FORBIDDEN;
  };
#if defined(__AVX512BF16__)
  for (int64_t c = 0; c < C; c += 16) {
    const __m512 values = load_floats(mask + c, C - c);
    const __mmask16 yes = _mm512_cmp_ps_mask(values, _mm512_set1_ps(FORBIDDEN), _CMP_GE_OQ);
    if (yes & first(C - c))
      for (int64_t i = c; i < std::min(c + 16, C); i++) take(i);
  }
#else
  for (int64_t c = 0; c < C; c++) take(c);
#endif
  return {count, slot, bias};
}

// Computes the scores of the allowed slots for one query; returns the largest.
template <typename T>
float scores_of(const T* query, const T* keys, int64_t stride, const Allowed& slots, int64_t D,
                float scale, float* score) {
  float top = NEVER;
  int64_t c = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    if (D % 32 == 0)
      for (; c + 16 <= slots.count; c += 16) {
        __m512 dots[16];
        for (auto& dot : dots) dot = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 32) {
          const auto values = Bf16Lanes::load(query + d);
          for (int i = 0; i < 16; i++)
            dots[i] = Bf16Lanes::fma(
                dots[i], Bf16Lanes::load(keys + slots.slot[c + i] * stride + d), values);
        }
        const __m512 bias = _mm512_loadu_ps(slots.bias + c);
        const __m512 sums = _mm512_fmadd_ps(sum16(dots), _mm512_set1_ps(scale), bias);
        _mm512_storeu_ps(score + c, sums);
        top = std::max(top, _mm512_reduce_max_ps(sums));
      }
#endif
  for (; c < slots.count; c++) {
    const T* key = keys + slots.slot[c] * stride;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t d = 0; d < D; d++) dot += to_float(query[d]) * to_float(key[d]);
    score[c] = dot * scale + slots.bias[c];
    top = std::max(top, score[c]);
  }
  return top;
}

// Replaces scores by e^(score - top); returns 1 / their sum, or 0 where no slot is allowed.
float weigh(float* score, const Allowed& slots, float top) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t c = 0; c < slots.count; c++) {
    score[c] = exp_negative(score[c] - top);
    total += score[c];
  }
  return slots.count ? 1.0f / total : 0.0f;
}

#if defined(__AVX512BF16__)

// Weighted sums of 32 channels of the values for H heads, whose scores are C elements apart.
template <int H>
void blend32(const BFloat16* values, int64_t stride, const Allowed& slots, const float* score,
             int64_t C, const float* inverse, BFloat16* out, int64_t head_stride) {
  // two slots at a time, for two independent chains of additions
  __m512 acc[2][H][2];
  for (auto& slot : acc)
    for (auto& head : slot) head[0] = head[1] = _mm512_setzero_ps();
  const auto add = [&](__m512(*sums)[2], int64_t c) {
    const __m512i pair = _mm512_loadu_si512(values + slots.slot[c] * stride);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    const __m512 odd =
        _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(0xFFFF0000)));
    for (int h = 0; h < H; h++) {
      const __m512 weight = _mm512_set1_ps(score[h * C + c]);
      sums[h][0] = _mm512_fmadd_ps(weight, even, sums[h][0]);
      sums[h][1] = _mm512_fmadd_ps(weight, odd, sums[h][1]);
    }
  };
  int64_t c = 0;
  for (; c + 2 <= slots.count; c += 2) add(acc[0], c), add(acc[1], c + 1);
  if (c < slots.count) add(acc[0], c);
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int h = 0; h < H; h++) {
    const __m512 factor = _mm512_set1_ps(inverse[h]);
    const __m512 even = _mm512_mul_ps(_mm512_add_ps(acc[0][h][0], acc[1][h][0]), factor);
    const __m512 odd = _mm512_mul_ps(_mm512_add_ps(acc[0][h][1], acc[1][h][1]), factor);
    store(out + h * head_stride, _mm512_permutex2var_ps(even, low, odd), 16);
    store(out + h * head_stride + 16, _mm512_permutex2var_ps(even, high, odd), 16);
  }
}

#endif

// The operands of a call; strides in elements, the last dimension is contiguous.
template <typename T>
struct Attention {
  const T *q, *k, *v;
  T* out;
  int64_t q0, q1, k0, k1, v0, v1, R, C, D, E;
  float scale;
};

// H heads from `head` on, all of KV group `group`, for one row; scratch holds H * C scores and E.
template <typename T, int H>
void attend_heads(const Attention<T>& a, int64_t head, int64_t group, int64_t row,
                  const Allowed& slots, float* scratch) {
  const T *keys = a.k + group * a.k0, *values = a.v + group * a.v0;
  T* out = a.out + (head * a.R + row) * a.E;
  float inverse[H];
  for (int h = 0; h < H; h++) {
    float* score = scratch + h * a.C;
    const T* query = a.q + (head + h) * a.q0 + row * a.q1;
    const float top = scores_of(query, keys, a.k1, slots, a.D, a.scale, score);
    inverse[h] = weigh(score, slots, top);
  }
  int64_t done = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>)
    for (; done + 32 <= a.E; done += 32)
      blend32<H>(values + done, a.v1, slots, scratch, a.C, inverse, out + done, a.R * a.E);
#endif
  if (done == a.E) return;
  float* sum = scratch + H * a.C;
  for (int h = 0; h < H; h++) {
    std::fill(sum, sum + a.E, 0.0f);
    for (int64_t c = 0; c < slots.count; c++) {
      const float weight = scratch[h * a.C + c];
      const T* value = values + slots.slot[c] * a.v1;
#pragma omp simd
      for (int64_t e = done; e < a.E; e++) sum[e] += weight * to_float(value[e]);
    }
    for (int64_t e = done; e < a.E; e++) out[h * a.R * a.E + e] = T(sum[e] * inverse[h]);
  }
}

template <typename T>
void attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& mask,
            float scale, at::Tensor& out) {
  const Attention<T> a{q.const_data_ptr<T>(), k.const_data_ptr<T>(), v.const_data_ptr<T>(),
                       out.mutable_data_ptr<T>(), q.stride(0), q.stride(1), k.stride(0),
                       k.stride(1), v.stride(0), v.stride(1), q.size(1), k.size(1), q.size(2),
                       v.size(2), scale};
  const T* masks = mask.const_data_ptr<T>();
  const int64_t G = k.size(0), group = q.size(0) / G, mask_stride = mask.stride(0);
  // few rows make few tasks, so there each head is a task, for an even distribution
  const int64_t heads = a.R * G >= 16 ? std::min<int64_t>(group, MOST_HEADS) : 1;
  const int64_t parts = (group + heads - 1) / heads, tasks = G * parts * a.R;
#pragma omp parallel
  {
    std::vector<float> bias(a.C), scratch(heads * a.C + a.E);
    std::vector<int64_t> slot(a.C);
    Allowed slots{};
    int64_t scanned = -1;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; task++) {
      // neighbouring tasks have the same row, and then the same keys and values in the cache
      const int64_t row = task / (G * parts), part = task % (G * parts);
      if (row != scanned)
        slots = allowed_slots(masks + row * mask_stride, a.C, slot.data(), bias.data());
      scanned = row;
      const int64_t g = part / parts, head = g * group + part % parts * heads;
      switch (std::min(heads, (g + 1) * group - head)) {
        case 1: attend_heads<T, 1>(a, head, g, row, slots, scratch.data()); break;
        case 2: attend_heads<T, 2>(a, head, g, row, slots, scratch.data()); break;
        case 3: attend_heads<T, 3>(a, head, g, row, slots, scratch.data()); break;
        default: attend_heads<T, 4>(a, head, g, row, slots, scratch.data());
      }
    }
  }
}

at::Tensor attend_rows(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& mask, double scale) {
  TORCH_CHECK(q.stride(2) == 1 && k.stride(2) == 1 && v.stride(2) == 1 && mask.stride(1) == 1,
              "attend_rows: the last dimension must be contiguous");
  TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type() &&
                  q.scalar_type() == mask.scalar_type(),
              "attend_rows: all tensors must have one dtype");
  at::Tensor out = at::empty({q.size(0), q.size(1), v.size(2)}, q.options());
  if (q.scalar_type() == at::kBFloat16)
    attend<BFloat16>(q, k, v, mask, static_cast<float>(scale), out);
  else if (q.scalar_type() == at::kFloat)
    attend<float>(q, k, v, mask, static_cast<float>(scale), out);
  else
    TORCH_CHECK(false, "attend_rows: dtype must be float32 or bfloat16");
  return out;
}

}  // namespace
}  // namespace eepass

TORCH_LIBRARY_IMPL(eepass, CPU, m) { m.impl("attend_rows", &eepass::attend_rows); }
