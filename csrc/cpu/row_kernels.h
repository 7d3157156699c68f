// The row kernels of one instruction set: the including file sets PCK_ISA (a namespace name),
// PCK_ISA_NAME, PCK_KERNELS (what it defines, see isa.h), PCK_VECTOR_BYTES and the compiler's target,
// so that the same source is compiled for each.
//
// Nothing here may instantiate a template of the standard library: the linker could keep that copy
// for the whole program, and it would not run on an older processor. What is used of namespace pck is
// either always inlined (PCK_HD) or compiled elsewhere, for the same reason.

namespace pck {
namespace PCK_ISA {

#include "vector.h"
#include "parts.h"
#include "selection.h"
#include "dissimilarity.h"
#include "hard_rank.h"
#include "grid.h"
#include "scans.h"
#include "few_points.h"
#include "soft_rank.h"
#include "few_sums.h"
#include "kernel_sums.h"
#include "coherence_rows.h"
#include "contrast_rows.h"
#include "points_rows.h"

}  // namespace PCK_ISA

using PCK_ISA::run_row;
const RowKernels PCK_KERNELS{{run_row}, {run_row}, {run_row}, {run_row}, {run_row}, {run_row},
                             {run_row}, {run_row}, {run_row}, {run_row}, {run_row}, PCK_ISA_NAME};

}  // namespace pck
