// Asks for the weights of the next call while this one ends.
//
// A pass calls linear layers in the same order each time, so what followed a call is what will follow
// it. Each thread asks for the beginning of its own share into its L2 cache: otherwise memory waits
// while norms and attention run, and each call starts cold. Asking for memory that has been given
// back since does no harm: a prefetch never faults.

#pragma once

#include <cstdint>

namespace eepass {

constexpr int MOST_THREADS = 16;

// Where the weights of a call begin for each thread, and how many bytes it reads.
struct Shares {
  struct {
    const char* begin;
    int64_t bytes;
  } of[MOST_THREADS];
  int threads = 0;
};

// Note that a call with the weights of `key` reads `shares`; what is known of the call that followed
// it last time, null if nothing.
const Shares* next_shares(const void* key, const Shares& shares);

// Ask for the beginning of what thread `thread` will read.
void prefetch_share(const Shares* next, int thread);

}  // namespace eepass
