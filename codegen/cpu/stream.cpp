// A reading of memory at the speed of the memory: what any pass that reads its weights can reach.

#include <cstdint>

namespace {

// 64 bytes; the compiler takes as many registers as the processor's vectors make of it.
typedef uint64_t Line __attribute__((vector_size(64), aligned(8), may_alias));
constexpr int64_t WORDS = sizeof(Line) / sizeof(uint64_t);
// Lines a turn, each with a sum of its own, so that no addition waits for the one before.
constexpr int64_t LINES = 4;
constexpr int64_t TURN = LINES * WORDS;
// How far ahead is prefetched: across the end of a page, where hardware prefetchers stop.
constexpr int64_t AHEAD_BYTES = 2048;

uint64_t sum_of_turns(const uint64_t* words, int64_t begin, int64_t end) {
  Line sums[LINES] = {};
  for (int64_t turn = begin; turn < end; turn++) {
    const uint64_t* at = words + turn * TURN;
    for (int64_t i = 0; i < LINES; i++) {
      __builtin_prefetch(reinterpret_cast<const char*>(at + i * WORDS) + AHEAD_BYTES);
      sums[i] += *reinterpret_cast<const Line*>(at + i * WORDS);
    }
  }
  const Line all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint64_t sum = 0;
  for (int64_t i = 0; i < WORDS; i++) sum += all[i];
  return sum;
}

}  // namespace

// The sum of `count` words modulo 2^64, each thread reading one contiguous part of them.
extern "C" uint64_t eepass_stream_sum(const uint64_t* words, int64_t count) {
  const int64_t turns = count / TURN;
  uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum)
  for (int64_t part = 0; part < 256; part++)
    sum += sum_of_turns(words, turns * part / 256, turns * (part + 1) / 256);
  for (int64_t i = turns * TURN; i < count; i++) sum += words[i];
  return sum;
}
