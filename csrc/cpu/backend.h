// How the CPU backend runs a stage: row kernels over threads.
#pragma once

#include <algorithm>
#include <type_traits>

#include "../tensors.h"
#include "isa.h"
#include "kept_memory.h"

namespace pck {

struct Cpu {
  static constexpr const char* name = "cpu";
  static constexpr DeviceType device = DeviceType::CPU;
  using Relaxations = pck::Relaxations;
  using Steps = SmoothSteps;

  static Tensor empty_rows(const Tensor& like, Sizes sizes) { return pck::empty_rows(like, sizes); }

  template <class Stage>
  static void run(const Tensor& x, const Stage& stage) {
    run_rows(x, {x.size(0), x.size(1), x.size(1)}, stage);
  }

  template <class Stage>
  static void run_rows(const Tensor&, const RowSizes& sizes, const Stage& stage) {
    if (sizes.rows == 0) return;
    // What a kernel is called for: a row of so many points, or a block of columns.
    int64_t calls = sizes.rows, points = sizes.count;
    if constexpr (std::is_same_v<Stage, ContrastColumns>) {
      calls = (stage.columns + kColumnBlock - 1) / kColumnBlock;
      points = kColumnBlock * sizes.rows;
    }
    // A thread should get at least 2,000 points, some 60 us of work: waking it takes 5 to 10.
    const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(points, 1));
    const RowKernel<Stage>& kernel = row_kernels();
    parallel_for(calls, grain, [&](int64_t first, int64_t last) {
      Scratch scratch(sizes.most);
      for (int64_t i = first; i < last; ++i) kernel.run(stage, i, scratch);
    });
  }
};

}  // namespace pck
