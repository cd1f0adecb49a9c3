#include "isa.h"

#include <omp.h>

#include <atomic>
#include <cstring>

#include "packed.h"
#include "rows.h"

namespace eepass {
namespace {

#if defined(__x86_64__)

bool processor_has(Isa wanted) {
  __builtin_cpu_init();
  switch (wanted) {
    case Isa::none: return true;
    case Isa::avxvnni:
      if (!__builtin_cpu_supports("avxvnni")) return false;
      [[fallthrough]];
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni") && processor_has(Isa::avx2);
  }
  return false;
}

bool has_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}

bool library_has(Isa wanted, bool bf16) {
  switch (wanted) {
    case Isa::none: return true;
    case Isa::avx2: return packed_kernels_avx2 && &avx2_rows;
    case Isa::avxvnni: return packed_kernels_avxvnni && &avx2_rows;
    case Isa::avx512:
      return packed_kernels_avx512 && (bf16 && has_bf16() ? &avx512bf16_rows : &avx512_rows);
  }
  return false;
}

bool has(Isa wanted, bool bf16) { return processor_has(wanted) && library_has(wanted, bf16); }

#else

bool has(Isa wanted, bool) { return wanted == Isa::none; }
bool has_bf16() { return false; }

#endif

struct Choice {
  const char* name;
  Isa isa;
  bool bf16;
};

// from the best on; `avx512-widened` is how a processor with AVX-512 but without its bf16 products
// computes, and differs from `avx512` only where those exist
constexpr Choice CHOICES[] = {
    {"avx512", Isa::avx512, true},
    {"avx512-widened", Isa::avx512, false},
    {"avxvnni", Isa::avxvnni, false},
    {"avx2", Isa::avx2, false},
    {"", Isa::none, false},
};

const Choice* best() {
  for (const Choice& choice : CHOICES)
    if (has(choice.isa, choice.bf16)) return &choice;
  return nullptr;
}

std::atomic<const Choice*>& chosen() {
  static std::atomic<const Choice*> choice{best()};
  return choice;
}

}  // namespace

Isa isa() { return chosen().load(std::memory_order_relaxed)->isa; }

bool has_bf16_products() {
  static const bool here = has_bf16();
  return here && chosen().load(std::memory_order_relaxed)->bf16;
}

}  // namespace eepass

// The name of the instruction set in use, after choosing the one called `name` ("best": the best
// there is) unless it is null; null where the processor or this library has not what was asked for.
extern "C" const char* eepass_kernel_isa(const char* name) {
  using namespace eepass;
  if (name) {
    const Choice* found = std::strcmp(name, "best") == 0 ? best() : nullptr;
    for (const Choice& choice : CHOICES)
      if (!found && *choice.name && std::strcmp(name, choice.name) == 0) found = &choice;
    if (!found || !has(found->isa, found->bf16)) return nullptr;
    chosen().store(found);
  }
  return chosen().load()->name;
}

// Ends the threads that wait for the caller's next parallel region. OpenMP lets threads wait in vain
// only as long as there are processors for all of them: if another thread is to decode, these would
// have its own sleep at every barrier.
extern "C" void eepass_release_threads() { omp_pause_resource_all(omp_pause_soft); }
