// The kernels over packed weights for avxvnni; `native.py` gives this file its compiler flags.

#define EEPASS_ISA avxvnni

#include "packed_kernels.h"

const eepass::PackedKernels* eepass::packed_kernels_avxvnni() {
  static const PackedKernels kernels{eepass::avxvnni::MOST_ROWS, eepass::avxvnni::multiply,
                                     eepass::avxvnni::prepare};
  return &kernels;
}
