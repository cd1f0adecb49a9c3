// Attention of a few rows over a static cache.
//
// A row attends to the slots that its mask allows, of all or of a list, SPLIT of them at a time; a
// task is one such part for all heads of a KV group and for all rows, so that keys and values are
// read once. What the parts give (largest score, sum of weights, weighted values) is put together at
// the end, in order: as in flash decoding (Dao et al., 2023). A part is numbers of allowed slots and not of
// slots, so a row gives the same bits wherever its slots are and whoever is with it: draft tokens in
// a tree give the bits they give one by one.

#pragma once

#include <bit>

#include "rows_linear.h"

namespace eepass::EEPASS_ISA {

// A mask below this forbids its slot.
constexpr float FORBIDDEN = -1e30f;
// Slots of a part, a multiple of LANES; query heads that are computed together; rows that are.
constexpr int64_t SPLIT = 128, MOST_HEADS = 6, MOST_TOGETHER = 16;

// The allowed slots of a row and their mask values, filled up with forbidden ones.
struct Allowed {
  int64_t count;
  int32_t* slot;
  float* bias;
  int64_t within(int64_t i) const { return i < count ? i : count - 1; }
};

// Every line of `count` numbers.
template <typename T>
void prefetch_row(const T* row, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) prefetch(row + i);
}

template <typename T>
int64_t find_allowed(const T* mask, int64_t C, const Allowed& to) {
  int64_t count = 0;
  for (int64_t c = 0; c < C; c += LANES) {
    const int64_t n = C - c < LANES ? C - c : LANES;
    const V values = n == LANES ? floats(mask + c) : floats(mask + c, n);
    const uint32_t all = (1u << n) - 1, yes = where_at_least(values, FORBIDDEN) & all;
    if (yes == all) {
      store_counting(to.slot + count, static_cast<int32_t>(c));
      store(to.bias + count, values);
      count += n;
    } else if (yes) {
      alignas(64) float some[LANES];
      store(some, values);
      for (int64_t i = 0; i < n; i++) {
        to.slot[count] = static_cast<int32_t>(c + i), to.bias[count] = some[i];
        count += yes >> i & 1;
      }
    }
  }
  for (int64_t i = 0; i < LANES; i++) to.slot[count + i] = 0, to.bias[count + i] = -__builtin_inff();
  return count;
}

inline float number(float x) { return x; }
inline float number(uint16_t bf16) { return std::bit_cast<float>(static_cast<uint32_t>(bf16) << 16); }

// The same for a list of `K` slots.
template <typename T>
int64_t find_selected(const T* mask, int64_t C, const int32_t* slots, int64_t K,
                      const Allowed& to) {
  int64_t count = 0;
  for (int64_t i = 0; i < K; i++) {
    if (slots[i] < 0 || slots[i] >= C) continue;
    to.slot[count] = slots[i], to.bias[count] = number(mask[slots[i]]);
    count += to.bias[count] >= FORBIDDEN;
  }
  for (int64_t i = 0; i < LANES; i++) to.slot[count + i] = 0, to.bias[count + i] = -__builtin_inff();
  return count;
}

// What a part gives for one row and head: `sum` and the values [E] are relative to e^top.
struct Part {
  float top, sum;
  float* values;
};

// Products of LANES keys, `stride` apart, with one query, a vector of which lies every `apart` bytes.
// Their partial sums stay in registers: reading keys anew for each query is cheaper than memory for
// those. They add in the order of `tile`.
template <typename F>
V in_turn(const typename F::T* keys, int64_t stride, const char* query, int64_t apart,
          int64_t steps, int64_t rest) {
  V dots[LANES];
#pragma GCC unroll 16
  for (int j = 0; j < LANES; j++) dots[j] = zero();
  for (int64_t k = 0; k < steps; k++, keys += F::STEP, query += apart)
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
      dots[j] = F::dot(dots[j], F::load(keys + j * stride), query);
  if (rest)
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
      dots[j] = F::dot(dots[j], F::load(keys + j * stride, rest), query);
  return sums(dots, 1);
}

// Scores of slots `from` to `to` for H queries, whose packed vectors are at `query`. With `fetch` the
// values, which are read next, are prefetched.
template <typename F, int H>
void score(const AttendCall& a, const typename F::T* keys, const typename F::T* values,
           const Allowed& slots, int64_t from, int64_t to, const char* query, bool fetch,
           float* scores, float* tops) {
  const int64_t steps = a.D / F::STEP, rest = a.D % F::STEP;
  V top[H];
  for (auto& t : top) t = splat(-__builtin_inff());
  for (int64_t i = from; i < to; i += LANES) {
    V dots[LANES * H];
    const bool in_a_row = i + LANES <= to && slots.slot[i + LANES - 1] == slots.slot[i] + LANES - 1;
    for (int64_t j = 0; j < LANES; j++) {
      if (i + j >= to) {
        for (int h = 0; h < H; h++) dots[j * H + h] = zero();
        continue;
      }
      if (!in_a_row)
        tile<F, 1, H, false>(keys + slots.slot[i + j] * a.k1, 0, query, steps, rest, true,
                             dots + j * H, nullptr);
    }
    const V bias = load(slots.bias + i);
    for (int h = 0; h < H; h++) {
      // a few at a time: there are not many places to wait for memory
      if (fetch)
        for (int64_t j = LANES * h / H; j < LANES * (h + 1) / H && i + j < to; j++)
          prefetch_row(values + slots.slot[i + j] * a.v1, a.E);
      const V sum = in_a_row ? in_turn<F>(keys + slots.slot[i] * a.k1, a.k1,
                                          query + h * F::PACKED, H * F::PACKED, steps, rest)
                             : sums(dots + h, H);
      const V s = fma(sum, splat(a.scale), bias);
      store(scores + h * SPLIT + (i - from), s);
      top[h] = largest(top[h], s);
    }
  }
  for (int h = 0; h < H; h++) tops[h] = largest_of(top[h]);
}

// Weighted sums of LOADS loads of the values' channels, from channel e on, for H heads. As many
// channels of `next`, the keys, are prefetched for the next part, unless it is null.
template <typename F, int H, int LOADS>
void blend(const AttendCall& a, const typename F::T* values, const typename F::T* next,
           const Allowed& slots, int64_t from, int64_t to, const float* weights, int64_t e,
           Part* parts) {
  constexpr int EACH = F::STEP / LANES;
  const int64_t left = a.E - e;
  V acc[H][LOADS * EACH];
#pragma GCC unroll 8
  for (int h = 0; h < H; h++)
#pragma GCC unroll 8
    for (int c = 0; c < LOADS * EACH; c++) acc[h][c] = zero();
  for (int64_t i = from; i < to; i++) {
    const auto* value = values + slots.slot[i] * a.v1 + e;
    if (next) prefetch_row(next + slots.slot[slots.within(i + SPLIT)] * a.k1 + e, LOADS * F::STEP);
    V v[LOADS * EACH];
    for (int c = 0; c < LOADS; c++) {
      if (left >= LOADS * F::STEP) load_vectors(value + c * F::STEP, v + c * EACH);
      else load_vectors(value + c * F::STEP, left - c * F::STEP, v + c * EACH);
    }
#pragma GCC unroll 8
    for (int h = 0; h < H; h++) {
      const V weight = splat(weights[h * SPLIT + (i - from)]);
#pragma GCC unroll 8
      for (int c = 0; c < LOADS * EACH; c++) acc[h][c] = fma(weight, v[c], acc[h][c]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < H; h++)
#pragma GCC unroll 8
    for (int c = 0; c < LOADS; c++)
      store_vectors<typename F::T>(parts[h].values + e + c * F::STEP, acc[h] + c * EACH);
}

// Slots `from` to `to` for H heads from `head` on, of KV group `group`, and one row.
template <typename F, int H>
void attend_part(const AttendCall& a, int64_t row, int64_t group, int64_t head,
                 const Allowed& slots, int64_t from, int64_t to, bool fetch, char* room,
                 Part* parts) {
  using T = typename F::T;
  const T* keys = static_cast<const T*>(a.k) + group * a.k0;
  const T* values = static_cast<const T*>(a.v) + group * a.v0;
  alignas(64) float scores[H * SPLIT];
  float tops[H];
  pack<F>(static_cast<const T*>(a.q) + head * a.q0 + row * a.q1, a.q0, H, a.D, room);
  score<F, H>(a, keys, values, slots, from, to, room, fetch, scores, tops);
  const T* next = fetch && from + SPLIT < slots.count ? keys : nullptr;
  for (int h = 0; h < H; h++) {
    V sum = zero();
    for (int64_t i = 0; i < to - from; i += LANES) {
      const V weight = exp_negative(add(load(scores + h * SPLIT + i), splat(-tops[h])));
      store(scores + h * SPLIT + i, weight);
      sum = add(sum, weight);
    }
    parts[h].top = tops[h], parts[h].sum = sum_of(sum);
  }
  // accumulators of all heads fill three quarters of the registers
  constexpr int LOADS = (LANES == 16 ? 4 : 2) * LANES / F::STEP;
  int64_t e = 0;
  for (; e + LOADS * F::STEP <= a.E; e += LOADS * F::STEP)
    blend<F, H, LOADS>(a, values, e < a.D ? next : nullptr, slots, from, to, scores, e, parts);
  for (; e < a.E; e += F::STEP)
    blend<F, H, 1>(a, values, e < a.D ? next : nullptr, slots, from, to, scores, e, parts);
}

// Puts the parts of one row and head together.
template <typename T>
void merge(const Part* parts, int64_t count, int64_t E, T* out) {
  float top = -__builtin_inff(), total = 0;
  for (int64_t i = 0; i < count; i++) top = parts[i].top > top ? parts[i].top : top;
  const auto weight = [&](int64_t i) { return exp_negative(splat(parts[i].top - top)); };
  for (int64_t i = 0; i < count; i++) {
    float w[LANES];
    store(w, weight(i));
    total += parts[i].sum * w[0];
  }
  const V inverse = splat(count ? 1.0f / total : 0.0f);
  for (int64_t e = 0; e < E; e += LANES) {
    V sum = zero();
    for (int64_t i = 0; i < count; i++) sum = fma(weight(i), load(parts[i].values + e), sum);
    store(out + e, mul(sum, inverse), E - e);
  }
}

// Rows `first` to `first` + `rows`.
template <typename F>
void attend_together(const AttendCall& a, int64_t first, int64_t rows) {
  using T = typename F::T;
  const int64_t room_for = a.most() + 2 * LANES, width = parts(a.E, F::STEP) * F::STEP;
  const int64_t heads = a.Q / a.G, batches = parts(heads, MOST_HEADS);
  const int64_t most = parts(a.most(), SPLIT), all = rows * a.Q * most;
  const auto bytes = [](int64_t n, int64_t size) { return parts(n * size, 64) * 64; };
  const int64_t slots_bytes = bytes(rows * room_for, 4), parts_bytes = bytes(all, sizeof(Part));
  char* shared = scratch(bytes(rows, sizeof(Allowed)) + 2 * slots_bytes + parts_bytes +
                             bytes(all * width, 4), 1);
  auto* allowed = reinterpret_cast<Allowed*>(shared);
  auto* slot = reinterpret_cast<int32_t*>(shared + bytes(rows, sizeof(Allowed)));
  auto* bias = reinterpret_cast<float*>(reinterpret_cast<char*>(slot) + slots_bytes);
  auto* found = reinterpret_cast<Part*>(reinterpret_cast<char*>(bias) + slots_bytes);
  auto* values = reinterpret_cast<float*>(reinterpret_cast<char*>(found) + parts_bytes);
  const auto part_of = [&](int64_t row, int64_t head, int64_t split) {
    return (row * a.Q + head) * most + split;
  };
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
      Allowed& here = allowed[r];
      here = {0, slot + r * room_for, bias + r * room_for};
      const T* mask = static_cast<const T*>(a.mask) + (first + r) * a.m0;
      here.count = a.slots ? find_selected(mask, a.C, a.slots + (first + r) * a.s0, a.K, here)
                           : find_allowed(mask, a.C, here);
    }
    int64_t longest = 0;
    for (int64_t r = 0; r < rows; r++)
      longest = allowed[r].count > longest ? allowed[r].count : longest;
    const int64_t splits = parts(longest, SPLIT);
    // few parts are divided by rows and heads as well, for an even distribution
    const int64_t wanted = splits ? parts(4 * omp_get_num_threads(), a.G * splits) : 1;
    const int64_t shares = wanted < rows * batches ? wanted : rows * batches;
    char* room = scratch(MOST_HEADS * parts(a.D, F::STEP) * F::PACKED, 0);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.G * splits * shares; task++) {
      const int64_t share = task % shares, split = task / shares % splits;
      const int64_t group = task / shares / splits, from = split * SPLIT;
      const int64_t first_here = rows * batches * share / shares;
      for (int64_t i = first_here; i < rows * batches * (share + 1) / shares; i++) {
        const int64_t r = i / batches, batch = i % batches;
        if (from >= allowed[r].count) continue;
        const int64_t to = from + SPLIT < allowed[r].count ? from + SPLIT : allowed[r].count;
        const int64_t begin = heads * batch / batches, end = heads * (batch + 1) / batches;
        const int64_t head = group * heads + begin;
        Part parts_here[MOST_HEADS];
        for (int64_t h = 0; h < end - begin; h++)
          parts_here[h].values = values + part_of(r, head + h, split) * width;
        const auto run = end - begin == 1   ? attend_part<F, 1>
                         : end - begin == 2 ? attend_part<F, 2>
                         : end - begin == 3 ? attend_part<F, 3>
                         : end - begin == 4 ? attend_part<F, 4>
                         : end - begin == 5 ? attend_part<F, 5>
                                            : attend_part<F, 6>;
        // later rows find the part in the cache
        run(a, first + r, group, head, allowed[r], from, to, i == first_here, room, parts_here);
        for (int64_t h = 0; h < end - begin; h++)
          found[part_of(r, head + h, split)] = parts_here[h];
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows * a.Q; i++) {
      const int64_t r = i / a.Q, head = i % a.Q;
      merge(found + part_of(r, head, 0), parts(allowed[r].count, SPLIT), a.E,
            static_cast<T*>(a.out) + (head * a.R + first + r) * a.E);
    }
  }
}

inline void attend(const AttendCall& a) {
  for (int64_t first = 0; first < a.R; first += MOST_TOGETHER) {
    const int64_t rows = a.R - first < MOST_TOGETHER ? a.R - first : MOST_TOGETHER;
    if (a.bf16)
      attend_together<Bf16>(a, first, rows);
    else
      attend_together<Float32>(a, first, rows);
  }
}

}  // namespace eepass::EEPASS_ISA
