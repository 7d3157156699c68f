// The row kernels of one instruction set: the including file sets PCK_ISA (a namespace name),
// PCK_VECTOR_BYTES and the compiler's target, so that the same source is compiled for each.
//
// Nothing here may instantiate a template of the standard library: the linker could keep that copy
// for the whole program, and it would not run on an older processor. Templates of namespace pck are
// inlined always (PCK_HD), for the same reason.

namespace pck {
namespace PCK_ISA {

#include "vector.h"
#include "selection.h"
#include "dissimilarity.h"
#include "hard_rank.h"
#include "soft_rank.h"
#include "coherence_rows.h"

inline void run_row(const DissimilarityRows& stage, int64_t i, Scratch&) {
  dissimilarity(stage.rows.row(i, -1));
}

inline constexpr RowKernels kRows{{run_row}, {run_row}, {run_row},   {run_row},
                                  {run_row}, {run_row}, PCK_ISA_NAME};

}  // namespace PCK_ISA
}  // namespace pck
