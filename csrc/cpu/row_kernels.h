// The row kernels of one instruction set: the including file sets PCK_ISA (a namespace name),
// PCK_VECTOR_BYTES and the compiler's target, so that the same source is compiled for each.
//
// Nothing here may instantiate a template of the standard library: the linker could keep that copy
// for the whole program, and it would not run on an older processor.

namespace pck {
namespace PCK_ISA {

#include "vector.h"
#include "dissimilarity.h"
#include "hard_rank.h"
#include "soft_rank.h"
#include "coherence_rows.h"

inline void soft_rank_entry(const float* x, int64_t count, const RankOptions& options, float* rank,
                            float* density, Scratch& scratch) {
  if (options.relaxation == Relaxation::logistic)
    soft_rank<Relaxation::logistic>(x, count, options, rank, density, scratch);
  else
    soft_rank<Relaxation::normal>(x, count, options, rank, density, scratch);
}

inline void soft_rank_backward_entry(const float* grad_rank, const float* x, const float* density,
                                     int64_t count, const RankOptions& options, float* grad_x,
                                     Scratch& scratch) {
  if (options.relaxation == Relaxation::logistic)
    soft_rank_backward<Relaxation::logistic>(grad_rank, x, density, count, options, grad_x, scratch);
  else
    soft_rank_backward<Relaxation::normal>(grad_rank, x, density, count, options, grad_x, scratch);
}

template <Relaxation R>
inline float coherence_row_of(const Row& student, const Row& teacher, const bool* keep,
                              const RankOptions& options, float weight, bool with_grad,
                              Scratch& scratch) {
  switch (options.penalty) {
    case Penalty::squared:
      return coherence_row<R, Penalty::squared>(student, teacher, keep, options, weight, with_grad,
                                                scratch);
    case Penalty::absolute:
      return coherence_row<R, Penalty::absolute>(student, teacher, keep, options, weight, with_grad,
                                                 scratch);
    default:
      return coherence_row<R, Penalty::huber>(student, teacher, keep, options, weight, with_grad,
                                              scratch);
  }
}

inline float coherence_row_entry(const Row& student, const Row& teacher, const bool* keep,
                                 const RankOptions& options, float weight, bool with_grad,
                                 Scratch& scratch) {
  if (options.relaxation == Relaxation::logistic)
    return coherence_row_of<Relaxation::logistic>(student, teacher, keep, options, weight, with_grad,
                                                  scratch);
  return coherence_row_of<Relaxation::normal>(student, teacher, keep, options, weight, with_grad,
                                              scratch);
}

inline constexpr RowKernels kRows{
    PCK_ISA_NAME,  hard_rank,     soft_rank_entry,    soft_rank_backward_entry,
    dissimilarity, hard_rank_row, coherence_row_entry};

}  // namespace PCK_ISA
}  // namespace pck
