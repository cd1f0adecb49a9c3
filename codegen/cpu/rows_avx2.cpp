// Kernels over bf16 and fp32 numbers for avx2; `native.py` gives this file its compiler flags.

#define EEPASS_ISA rows_avx2

#include "rows_attend.h"
#include "rows_linear.h"

const eepass::RowKernels eepass::avx2_rows = {rows_avx2::linears, rows_avx2::attend};
