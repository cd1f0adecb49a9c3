// Which instruction set the kernels use.
//
// Kernels are compiled once for each (a source file NAME_<set>.cpp with the flags of
// `building.py`), or for this machine's best alone, which takes half the time. The library loads on
// any processor, and what runs is chosen by what the processor and the library have. Such a
// file must not instantiate templates that other files use as well: the linker keeps one of them,
// and it might be the one with instructions that are not there.

#pragma once

namespace eepass {

enum class Isa {
  none,  // no kernels: the operators' reference implementations run
  avx2,  // with FMA and F16C
  avxvnni,  // AVX2 with integer dot products
  avx512,  // F, BW, VL, DQ and VNNI
};

// The instruction set in use: the best that the processor has, unless a test chose another.
Isa isa();

// Whether products of bf16 vectors are one instruction; they are widened to float32 otherwise.
bool has_bf16_products();

}  // namespace eepass
