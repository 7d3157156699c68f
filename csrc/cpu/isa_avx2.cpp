// The row kernels for avx2.
#include "../plan.h"
#include "isa.h"
#include "nearly_hard.h"
#include "projection.h"
#include "sort.h"

#if defined(PCK_X86_CLONES)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define PCK_ISA avx2
#define PCK_ISA_NAME "avx2"
#define PCK_KERNELS kAvx2Rows
#define PCK_VECTOR_BYTES 32
#include "row_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
