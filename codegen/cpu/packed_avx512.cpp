// The kernels over packed weights for avx512; `native.py` gives this file its compiler flags.

#define EEPASS_ISA avx512

#include "packed_kernels.h"

const eepass::PackedKernels* eepass::packed_kernels_avx512() {
  static const PackedKernels kernels{eepass::avx512::MOST_ROWS, eepass::avx512::multiply,
                                     eepass::avx512::prepare};
  return &kernels;
}
