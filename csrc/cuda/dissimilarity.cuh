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

// Products of equal references become equal, see Rows::twins.
PCK_DEVICE void tie(Block& block, const Row& row) {
  if (!row.has_twins()) return;
  block.each(static_cast<int>(row.count), [&](int j) {
    const int first = row.twins[j];
    if (first != j) row.values[j] = row.values[first];
  });
  block.sync();
}

// body(row, kept, kind) of a Gram row. Of what an everyday row is not, masked or a far anchor's, the
// compiler leaves nothing in the loops of its copy.
template <class Body>
PCK_DEVICE void with_kind(const Row& row, const Kept& kept, Body body) {
  visit(Dissimilarities{}, row.dissimilarity, [&](auto kind) {
    if constexpr (decltype(kind)::is_gram) {
      if (kept.masked || row.is_far()) return body(row, kept, kind);
      Row everyday = row;
      everyday.offset = 0.0f;
      Kept whole = kept;
      whole.masked = false;
      body(everyday, whole, kind);
    }
  });
}

// The dissimilarity of what Row::squared gives.
template <class Kind>
PCK_DEVICE float dissimilarity_of(const Row& row, float squared, Kind kind) {
  return row.is_far() ? kind.of_far(squared, row.anchor_sq, row.offset) : kind.of(squared);
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
  tie(block, row);
  if (block.thread() == 0) *near_count = 0;
  block.sync();
  with_kind(row, kept, [&](const Row& own, const Kept& there, auto kind) {
    block.each_value(own.values, count, [&](int j, float product) {
      if (!there.has(j)) return;
      const float squared = own.squared(j, product);
      if (own.is_near(j, squared))
        near[atomicAdd(near_count, 1)] = j;
      else
        target[there.place(j)] = dissimilarity_of(own, squared, kind);
    });
  });
  block.sync();
  const int pairs = *near_count;
#pragma unroll 1
  for (int i = block.warp(); i < pairs; i += block.warps()) {
    const int j = near[i];
    const float sq =
        squared_distance(row.anchor, row.references + j * row.width, row.width, block.lane());
    const float squared = row.is_far() ? sq - row.anchor_sq : sq;
    visit(Dissimilarities{}, row.dissimilarity, [&](auto kind) {
      if (block.lane() == 0) target[kept.place(j)] = dissimilarity_of(row, squared, kind);
    });
  }
  block.sync();
}

// dL/d(dissimilarity) -> V, of reference j.
template <class Kind>
PCK_DEVICE float dissimilarity_backward(const Row& row, int j, float dissimilarity, float grad,
                                        Kind kind) {
  if (!row.is_far() || !kind.is_beside(dissimilarity, row.offset))
    return kind.backward(grad, dissimilarity, row.offset);
  const float* const reference = row.references + j * row.width;
  double squared = 0.0;
#pragma unroll 1
  for (int64_t k = 0; k < row.width; ++k)
    squared += (row.anchor[k] - reference[k]) * (row.anchor[k] - reference[k]);
  return kind.backward(grad, kind.of(static_cast<float>(squared)), 0.0f);
}

// row.values <- V of grad(place), x [kept.count] being the dissimilarities of what is there.
template <class Grad>
PCK_DEVICE void store_gradient(Block& block, const Row& row, const Kept& kept, const float* x,
                               Grad grad) {
  const auto store = [&](const Row& own, const Kept& there, auto kind) {
    block.store_values(own.values, static_cast<int>(own.count), [&](int j) {
      if (!there.has(j)) return 0.0f;
      const int place = there.place(j);
      return dissimilarity_backward(own, j, x[place], grad(place), kind);
    });
  };
  if (is_gram(row.dissimilarity))
    with_kind(row, kept, store);
  else
    store(row, kept, Given{});
}

}  // namespace pck::cuda
