// The row kernels for baseline.
#include "../plan.h"
#include "isa.h"
#include "nearly_hard.h"
#include "projection.h"
#include "sort.h"

#define PCK_ISA baseline
#define PCK_ISA_NAME "baseline"
#define PCK_KERNELS kBaselineRows
#define PCK_VECTOR_BYTES 16
#include "row_kernels.h"
