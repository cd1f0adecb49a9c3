// Kernels over bf16 and fp32 numbers for avx512bf16; `native.py` gives this file its compiler flags.

#define EEPASS_ISA rows_avx512bf16

#include "rows_attend.h"
#include "rows_linear.h"

const eepass::RowKernels eepass::avx512bf16_rows = {rows_avx512bf16::linears, rows_avx512bf16::attend};
