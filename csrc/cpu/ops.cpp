// The CPU backend's operators: row kernels over threads.
#include <ATen/Parallel.h>

#include "../operators.h"
#include "isa.h"
#include "kept_memory.h"

namespace pck {
namespace {

struct Cpu {
  static constexpr const char* name = "cpu";
  static constexpr c10::DeviceType device = at::kCPU;

  static Tensor empty_like(const Tensor& x) { return empty_rows(x.size(0), x.size(1)); }

  template <class Stage>
  static void run(const Tensor& x, const Stage& stage) {
    const int64_t rows = x.size(0), count = x.size(1);
    if (rows == 0) return;
    // What a kernel is called for: a row of so many points, or a block of columns.
    int64_t calls = rows, points = count;
    if constexpr (std::is_same_v<Stage, ContrastColumns>) {
      calls = (stage.columns + kColumnBlock - 1) / kColumnBlock;
      points = kColumnBlock * rows;
    }
    // A thread should get at least 2,000 points, some 60 us of work: waking it takes 5 to 10.
    const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(points, 1));
    const RowKernel<Stage>& kernel = row_kernels();
    at::parallel_for(0, calls, grain, [&](int64_t first, int64_t last) {
      Scratch scratch(count);
      for (int64_t i = first; i < last; ++i) kernel.run(stage, i, scratch);
    });
  }
};

Tensor empty_rows_like(const Tensor& like, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(like.scalar_type() == at::kFloat, "like must be float32, got ", like.scalar_type());
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, "rows and columns must be >= 0, got ", rows, " and ",
                    columns);
  return empty_rows(rows, columns);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pc_kernels, library) {
  Operators<Cpu>::define(library);
  library.def("cpu_empty_rows(Tensor like, int rows, int columns) -> Tensor",
              torch::dispatch(at::kCPU, &empty_rows_like));
}

}  // namespace pck
