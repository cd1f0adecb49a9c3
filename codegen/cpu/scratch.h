// Memory that a thread of a kernel computes in.

#pragma once

#include <cstdint>

namespace eepass {

// At least `bytes`, aligned to a cache line: the same memory for each call of a thread with the same
// `which`, 0 or 1. Whoever calls again has done with what was there.
char* scratch(int64_t bytes, int which);

}  // namespace eepass
