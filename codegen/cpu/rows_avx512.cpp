// Kernels over bf16 and fp32 numbers for avx512; `native.py` gives this file its compiler flags.

#define EEPASS_ISA rows_avx512

#include "rows_attend.h"
#include "rows_linear.h"

const eepass::RowKernels eepass::avx512_rows = {rows_avx512::linears, rows_avx512::attend};
