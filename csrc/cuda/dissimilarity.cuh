// Stage `dissimilarity`: a Gram row becomes squared distances, then dissimilarities; those that are
// there are packed side by side. See csrc/cpu/dissimilarity.h, which does the same a row a thread.
#pragma once

#include <cmath>

#include "../stages.h"
#include "block.cuh"
#include "kept.cuh"
#include "scratch.cuh"

namespace pck::cuda {

// A warp's lanes together.
PCK_DEVICE float squared_distance(const float* a, const float* b, int64_t width, int lane) {
  double sum = 0.0;
#pragma unroll 2
  for (int64_t k = lane; k < width; k += kWarp) sum += (a[k] - b[k]) * (a[k] - b[k]);
  return static_cast<float>(reduce_warp(sum, Sum{}));
}

// The dissimilarity of what Row::squared gives.
PCK_DEVICE float dissimilarity_of(const Row& row, float squared) {
  return visit(Dissimilarities{}, row.dissimilarity, [&](auto kind) {
    return row.is_far() ? kind.of_far(squared, row.anchor_sq, row.offset) : kind.of(squared);
  });
}

// target <- dissimilarities of the references that are there. A short distance is summed again from the
// differences, by a warp each: they are listed first, in any order, in `near` [count].
PCK_DEVICE void dissimilarity(Block& block, const Row& row, const Kept& kept, int* near_count,
                              int* near, float* target) {
  const int count = static_cast<int>(row.count);
  if (!is_gram(row.dissimilarity)) {
    block.each_value(row.values, count, [&](int j, float value) {
      if (kept.has(j)) target[kept.place(j)] = value;
    });
    block.sync();
    return;
  }
  if (block.thread() == 0) *near_count = 0;
  block.sync();
  block.each_value(row.values, count, [&](int j, float product) {
    if (!kept.has(j)) return;
    const float squared = row.squared(j, product);
    if (row.is_near(j, squared))
      near[atomicAdd(near_count, 1)] = j;
    else
      target[kept.place(j)] = dissimilarity_of(row, squared);
  });
  block.sync();
  const int pairs = *near_count;
#pragma unroll 1
  for (int i = block.warp(); i < pairs; i += block.warps()) {
    const int j = near[i];
    const float sq =
        squared_distance(row.anchor, row.references + j * row.width, row.width, block.lane());
    const float squared = row.is_far() ? sq - row.anchor_sq : sq;
    if (block.lane() == 0) target[kept.place(j)] = dissimilarity_of(row, squared);
  }
  block.sync();
}

// dL/d(dissimilarity) -> V, of reference j.
PCK_DEVICE float dissimilarity_backward(const Row& row, int j, float dissimilarity, float grad) {
  return visit(Dissimilarities{}, row.dissimilarity, [&](auto kind) {
    if (!row.is_far() || !kind.is_beside(dissimilarity, row.offset))
      return kind.backward(grad, dissimilarity, row.offset);
    const float* const reference = row.references + j * row.width;
    double squared = 0.0;
#pragma unroll 1
    for (int64_t k = 0; k < row.width; ++k)
      squared += (row.anchor[k] - reference[k]) * (row.anchor[k] - reference[k]);
    return kind.backward(grad, kind.of(static_cast<float>(squared)), 0.0f);
  });
}

}  // namespace pck::cuda
