// A reading of memory at the speed of the memory: what any pass that reads its weights can reach.

#include <cstdint>

namespace {

constexpr int64_t LINE = 64 / sizeof(uint64_t);
// Cache lines a turn, so that few additions wait for the one before.
constexpr int64_t TURN = 4 * LINE;
// How far ahead is prefetched: across the end of a page, where hardware prefetchers stop.
constexpr int64_t AHEAD_BYTES = 2048;
// Parts of a reading; neighbouring ones are one thread's.
constexpr int64_t PARTS = 256;

template <int BYTES>
struct Vector {
  typedef uint64_t Type __attribute__((vector_size(BYTES), aligned(8), may_alias));
};

// The sum of the turns from begin to end - 1, in vectors of BYTES bytes.
template <int BYTES>
inline __attribute__((always_inline)) uint64_t sum_of_turns(const uint64_t* words, int64_t begin,
                                                            int64_t end) {
  using V = typename Vector<BYTES>::Type;
  constexpr int64_t WORDS = BYTES / sizeof(uint64_t);
  V a{}, b{}, c{}, d{};
  for (int64_t turn = begin; turn < end; turn++) {
    const uint64_t* at = words + turn * TURN;
    for (int64_t i = 0; i < TURN; i += LINE)
      __builtin_prefetch(reinterpret_cast<const char*>(at + i) + AHEAD_BYTES);
    for (int64_t i = 0; i < TURN; i += 4 * WORDS) {
      a += *reinterpret_cast<const V*>(at + i);
      b += *reinterpret_cast<const V*>(at + i + WORDS);
      c += *reinterpret_cast<const V*>(at + i + 2 * WORDS);
      d += *reinterpret_cast<const V*>(at + i + 3 * WORDS);
    }
  }
  const V all = (a + b) + (c + d);
  uint64_t sum = 0;
  for (int64_t i = 0; i < WORDS; i++) sum += all[i];
  return sum;
}

using Sum = uint64_t (*)(const uint64_t*, int64_t, int64_t);

uint64_t sum_plain(const uint64_t* words, int64_t begin, int64_t end) {
  return sum_of_turns<16>(words, begin, end);
}

#if defined(__x86_64__)

#define FOR_TARGET(name) __attribute__((target(name)))

FOR_TARGET("avx2") uint64_t sum_avx2(const uint64_t* words, int64_t begin, int64_t end) {
  return sum_of_turns<32>(words, begin, end);
}

FOR_TARGET("avx512f") uint64_t sum_avx512(const uint64_t* words, int64_t begin, int64_t end) {
  return sum_of_turns<64>(words, begin, end);
}

Sum widest() {
  if (__builtin_cpu_supports("avx512f")) return sum_avx512;
  return __builtin_cpu_supports("avx2") ? sum_avx2 : sum_plain;
}

#else

Sum widest() { return sum_plain; }

#endif

}  // namespace

// The sum of `count` words modulo 2^64, each thread reading a contiguous half, third … of them.
extern "C" uint64_t eepass_stream_sum(const uint64_t* words, int64_t count) {
  const Sum sum_turns = widest();
  const int64_t turns = count / TURN;
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (int64_t part = 0; part < PARTS; part++)
    sum += sum_turns(words, turns * part / PARTS, turns * (part + 1) / PARTS);
  for (int64_t i = turns * TURN; i < count; i++) sum += words[i];
  return sum;
}
