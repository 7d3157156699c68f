// The row kernels of an instruction set, and the choice of one. No torch headers: the kernels are
// compiled once for each, and nothing that the rest of the program shares may be among them.
#pragma once

#include "../stages.h"
#include "scratch.h"

namespace pck {

// A stage on row i.
template <class Stage>
struct RowKernel {
  void (*run)(const Stage& stage, int64_t i, Scratch& scratch);
};

// Columns that one call of the kernel of ContrastColumns serves.
inline constexpr int64_t kColumnBlock = 512;

// Points that one call of the kernel of PointSums serves. Their sums by column are added up in the
// order of the blocks, so that results do not depend on the number of threads.
inline constexpr int64_t kPointBlock = 64;

// Of points [rows, width] the largest |x| of every block, and the sums and sums of squares of its
// columns; and the squared norm of every point.
struct PointSums {
  const float* x;
  int64_t rows, width;
  float* largest;  // [blocks]
  float* sums;     // [blocks, width]
  float* powers;   // [blocks, width]
  float* squares;  // [rows]
};

// target_i <- sum_j v_ij (x_i - y_j), from the differences; x and target are [rows, width], y is
// [count, width].
struct PullRows {
  const float* v;
  int64_t row, column;  // its strides
  const float* x;
  const float* y;
  int64_t count, width;
  float* target;
};

// One instruction set's kernels.
struct RowKernels : RowKernel<HardRank>,
                    RowKernel<SoftRank>,
                    RowKernel<SoftRankBackward>,
                    RowKernel<KernelSums>,
                    RowKernel<DissimilarityRows>,
                    RowKernel<HardRankRows>,
                    RowKernel<CoherenceRows>,
                    RowKernel<ContrastColumns>,
                    RowKernel<ContrastRows>,
                    RowKernel<PointSums>,
                    RowKernel<PullRows> {
  const char* name;
};

extern const RowKernels kBaselineRows;
#if defined(__x86_64__) && defined(__GNUC__)
#define PCK_X86_CLONES 1
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
#endif

// The widest kernels this processor runs; PC_KERNELS_CPU_ISA=baseline|avx2|avx512 narrows the choice.
const RowKernels& row_kernels();

}  // namespace pck
