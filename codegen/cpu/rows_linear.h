// Products of rows of x with weight rows: linear layers, and the scores of attention.
//
// Reading weights bounds a pass, so they are read once for all rows, and in the order in which they
// lie in memory: processors drop prefetches that do not follow one another. A tile is one weight row
// and up to 8 rows of x (with more rows, two weight rows, whose products hide the wait), over as many
// columns as keep those rows of x in the L1 cache. Partial sums of the weight rows of a block wait in
// memory. Each sum adds in the same order for any number of rows.

#pragma once

#include <omp.h>

#include "rows.h"
#include "rows_vectors.h"
#include "scratch.h"

namespace eepass::EEPASS_ISA {

// Weight rows of a block, whose sums are added up and stored together.
constexpr int64_t BLOCK = 16;
// Rows of x of a tile, and those that share one reading of a block.
constexpr int64_t MOST_ROWS = 8, TOGETHER = 16;
// Bytes of x that stay in the L1 cache beside partial sums and the weights on their way.
constexpr int64_t X_BYTES = 24576;
// How far ahead weights are prefetched.
constexpr int64_t AHEAD_BYTES = 8192;

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// T weight rows, `stride` apart, times R packed rows of x, over `steps` vectors and `rest` columns:
// added to `acc` [T, R], or stored there.
template <typename F, int T, int R, bool FETCH>
void tile(const typename F::T* w, int64_t stride, const char* x, int64_t steps, int64_t rest,
          bool store_only, V* acc, const char* ahead) {
  V sum[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = store_only ? zero() : acc[t * R + r];
  for (int64_t k = 0; k < steps; k++, x += R * F::PACKED) {
    typename F::W weights[T];
    for (int t = 0; t < T; t++) {
      weights[t] = F::load(w + t * stride + k * F::STEP);
      if (FETCH) prefetch(ahead + (t * stride + k * F::STEP) * sizeof *w);
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) sum[t][r] = F::dot(sum[t][r], weights[t], x + r * F::PACKED);
  }
  if (rest)
    for (int t = 0; t < T; t++) {
      const auto weights = F::load(w + t * stride + steps * F::STEP, rest);
      for (int r = 0; r < R; r++) sum[t][r] = F::dot(sum[t][r], weights, x + r * F::PACKED);
    }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) acc[t * R + r] = sum[t][r];
}

template <typename F>
using Tile = void (*)(const typename F::T*, int64_t, const char*, int64_t, int64_t, bool, V*,
                      const char*);

// The tile of T weight rows and `rows` rows of x.
template <typename F, int T, bool FETCH>
Tile<F> tile_of(int64_t rows) {
  switch (rows) {
    case 1: return tile<F, T, 1, FETCH>;
    case 2: return tile<F, T, 2, FETCH>;
    case 3: return tile<F, T, 3, FETCH>;
    case 4: return tile<F, T, 4, FETCH>;
    case 5: return tile<F, T, 5, FETCH>;
    case 6: return tile<F, T, 6, FETCH>;
    case 7: return tile<F, T, 7, FETCH>;
    default: return tile<F, T, 8, FETCH>;
  }
}

// R rows of K columns, `stride` apart, as tiles read them: a vector of each row after another.
template <typename F>
void pack(const typename F::T* x, int64_t stride, int64_t R, int64_t K, char* to) {
  for (int64_t k = 0; k < K; k += F::STEP)
    for (int64_t r = 0; r < R; r++, to += F::PACKED) F::pack(x + r * stride + k, K - k, to);
}

// Rows of x that are multiplied together, packed; with more than MOST_ROWS, in two groups.
template <typename F>
struct Rows {
  int64_t from, count, groups;
  const char* x[2];
  int64_t size[2];
  Tile<F> one[2], pair[2];
};

// Where a tile's weights are, for tiles in the order in which they are computed.
template <typename T>
struct Walk {
  const T* weight;
  int64_t K, columns, chunks, rows;
  const T* at(int64_t tile) const {
    const int64_t per_chunk = BLOCK / rows, block = tile / (per_chunk * chunks);
    const int64_t within = tile % (per_chunk * chunks);
    return weight + (block * BLOCK + within % per_chunk * rows) * K +
           within / per_chunk * columns;
  }
};

template <typename F>
void finish(const Linear& layer, const Rows<F>& rows, const V* acc, int64_t n, bool float_out) {
  for (int64_t from = 0; from < BLOCK && n + from < layer.N; from += LANES) {
    const int64_t count = layer.N - n - from < LANES ? layer.N - n - from : LANES;
    const V bias = layer.bias ? load(layer.bias + n + from, count) : zero();
    const V* group = acc;
    for (int64_t g = 0, row = rows.from; g < rows.groups; group += BLOCK * rows.size[g++])
      for (int64_t r = 0; r < rows.size[g]; r++, row++) {
        const V sum = add(sums(group + from * rows.size[g] + r, rows.size[g]), bias);
        const int64_t at = row * layer.N + n + from;
        if (float_out || sizeof(typename F::T) == sizeof(float))
          store(static_cast<float*>(layer.out) + at, sum, count);
        else
          store(static_cast<uint16_t*>(layer.out) + at, sum, count);
      }
  }
}

// Blocks `from` to `to` of a layer's weight rows times all rows.
template <typename F>
void blocks_of(const LinearCall& call, const Linear& layer, const Rows<F>* rows, int64_t sets,
               int64_t from, int64_t to, V* acc) {
  using T = typename F::T;
  const int64_t K = call.K, steps = K / F::STEP, rest = K % F::STEP;
  for (int64_t block = from; block < to; block++)
    for (const Rows<F>* set = rows; set < rows + sets; set++) {
      int64_t chunk = X_BYTES / (F::PACKED * set->count);
      const int64_t chunks = steps > chunk ? parts(steps, chunk) : 1;
      chunk = parts(steps, chunks);
      const int64_t T_ = set->groups == 2 ? PAIR : 1;
      const Walk<T> walk{static_cast<const T*>(layer.weight), K, chunk * F::STEP, chunks, T_};
      const int64_t tile_bytes = (T_ * chunk * F::STEP + 1) * static_cast<int64_t>(sizeof(T));
      int64_t ahead = block * (BLOCK / T_) * chunks + parts(AHEAD_BYTES, tile_bytes);
      for (int64_t c = 0; c < chunks; c++) {
        const int64_t done = c * chunk, left = steps - done < chunk ? steps - done : chunk;
        for (int64_t t = 0; t < BLOCK; t += T_, ahead++) {
          const int64_t n = block * BLOCK + t;
          if (n >= layer.N) continue;
          const T* weight = static_cast<const T*>(layer.weight) + n * K + done * F::STEP;
          const auto* next = reinterpret_cast<const char*>(walk.at(ahead));
          V* sum = acc;
          for (int64_t g = 0; g < set->groups; sum += BLOCK * set->size[g++]) {
            const bool both = T_ > 1 && n + 1 < layer.N;
            (both ? set->pair[g] : set->one[g])(
                weight, K, set->x[g] + done * set->size[g] * F::PACKED, left,
                c + 1 == chunks ? rest : 0, c == 0, sum + t * set->size[g], next);
          }
        }
      }
      finish(layer, *set, acc, block * BLOCK, call.float_out);
    }
}

// The share of thread `thread` of `threads`: neighbouring blocks, so that it reads on and on.
template <typename F>
void share_of(const LinearCall& call, int64_t total, int64_t thread, int64_t threads) {
  using T = typename F::T;
  const int64_t row_bytes = parts(call.K, F::STEP) * F::PACKED, sets = parts(call.R, TOGETHER);
  const int64_t sums_bytes = BLOCK * TOGETHER * static_cast<int64_t>(sizeof(V));
  char* room =
      scratch(sums_bytes + call.R * row_bytes + sets * static_cast<int64_t>(sizeof(Rows<F>)), 0);
  auto* acc = reinterpret_cast<V*>(room);
  char* packed = room + sums_bytes;
  auto* rows = reinterpret_cast<Rows<F>*>(packed + call.R * row_bytes);
  for (int64_t s = 0, from = 0; s < sets; s++) {
    const int64_t count = call.R - from < TOGETHER ? call.R - from : TOGETHER;
    Rows<F>& set = rows[s];
    set = {from, count, count > MOST_ROWS ? 2 : 1, {}, {}, {}, {}};
    for (int64_t g = 0; g < set.groups; g++) {
      const int64_t size = g ? count - set.size[0] : parts(count, set.groups);
      set.x[g] = packed, set.size[g] = size;
      // one row does best without, and the second group finds the weights in the cache
      set.one[g] = g || size == 1 ? tile_of<F, 1, false>(size) : tile_of<F, 1, true>(size);
      set.pair[g] = g ? tile_of<F, PAIR, false>(size) : tile_of<F, PAIR, true>(size);
      pack<F>(static_cast<const T*>(call.x) + from * call.K, call.K, size, call.K, packed);
      packed += size * row_bytes, from += size;
    }
  }
  int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
  for (int64_t i = 0; i < call.count; i++) {
    const int64_t blocks = parts(call.layers[i].N, BLOCK);
    if (from < blocks && to > 0)
      blocks_of<F>(call, call.layers[i], rows, sets, from > 0 ? from : 0, to < blocks ? to : blocks,
                   acc);
    from -= blocks, to -= blocks;
  }
}

inline void linears(const LinearCall& call) {
  int64_t total = 0;
  for (int64_t i = 0; i < call.count; i++) total += parts(call.layers[i].N, BLOCK);
#pragma omp parallel
  {
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (call.bf16)
      share_of<Bf16>(call, total, thread, threads);
    else
      share_of<Float32>(call, total, thread, threads);
  }
}

}  // namespace eepass::EEPASS_ISA
