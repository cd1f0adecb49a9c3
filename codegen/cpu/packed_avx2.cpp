// The kernels over packed weights for avx2; `native.py` gives this file its compiler flags.

#define EEPASS_ISA avx2

#include "packed_kernels.h"

const eepass::PackedKernels* eepass::packed_kernels_avx2() {
  static const PackedKernels kernels{eepass::avx2::MOST_ROWS, eepass::avx2::multiply,
                                     eepass::avx2::prepare};
  return &kernels;
}
