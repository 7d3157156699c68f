// The row kernels for avx512.
#include "../plan.h"
#include "isa.h"
#include "nearly_hard.h"
#include "projection.h"
#include "sort.h"

#if defined(PCK_X86_CLONES)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

#define PCK_ISA avx512
#define PCK_ISA_NAME "avx512"
#define PCK_KERNELS kAvx512Rows
#define PCK_VECTOR_BYTES 64
#include "row_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
