// Stage `dissimilarity`: a Gram row becomes squared distances, then the metric's dissimilarities; those
// that count are packed side by side. See csrc/cpu/dissimilarity.h, which does the same a row a thread.
#pragma once

#include <cmath>

#include "../row.h"
#include "block.cuh"
#include "scratch.cuh"

namespace pck::cuda {

// The references of a row that count, and the place of each among them.
struct Kept {
  const unsigned* bits;  // a bit each, by words of a warp's width
  const int* before;     // how many count in the words before
  int count;

  PCK_DEVICE bool has(int j) const { return (bits[j / kWarp] >> (j % kWarp)) & 1u; }
  PCK_DEVICE int place(int j) const {
    const unsigned below = (1u << (j % kWarp)) - 1u;
    return before[j / kWarp] + __popc(bits[j / kWarp] & below);
  }
};

// All references but the anchor itself and those that `keep`, if not null, leaves out.
PCK_DEVICE Kept find_kept(Block& block, const Row& row, const bool* keep, const Scratch& scratch) {
  const int count = static_cast<int>(row.count);
  const int words = (count + kWarp - 1) / kWarp;
  unsigned* const bits = scratch.kept_bits;
  int* const before = scratch.kept_before;
#pragma unroll 1
  for (int w = block.warp(); w < words; w += block.warps()) {
    const int j = w * kWarp + block.lane();
    const bool kept = j < count && j != row.self && (keep == nullptr || keep[j]);
    const unsigned word = __ballot_sync(kEveryLane, kept);
    if (block.lane() == 0) bits[w] = word;
  }
  block.sync();
  const int kept = block.scan<int>(
      words, [&](int w) { return __popc(bits[w]); }, [&](int w, int sum) { before[w] = sum; });
  block.sync();
  return {bits, before, kept};
}

// A warp's lanes together.
PCK_DEVICE float squared_distance(const float* a, const float* b, int64_t width, int lane) {
  double sum = 0.0;
#pragma unroll 2
  for (int64_t k = lane; k < width; k += kWarp) sum += (a[k] - b[k]) * (a[k] - b[k]);
  return static_cast<float>(reduce_warp(sum, Sum{}));
}

// |a - b|^2 of an inner product, and whether it is near. For an anchor so far out that |a|^2 would cost
// the digits in which its references differ, the same but for |a|^2: a rank does not mind what all of a
// row have in common.
struct Squared {
  float value;
  bool near;
};

PCK_DEVICE Squared squared_of(const Row& row, int j, float product) {
  const float scale = row.anchor_sq + row.reference_sq[j];
  if (row.offset > 0.0f) {
    const float excess = row.reference_sq[j] - 2.0f * product;
    return {excess, row.anchor_sq + excess < kNear * scale};
  }
  const float sq = scale - 2.0f * product;
  return {sq, sq < kNear * scale};
}

// From what squared_of gives to the metric; of a far anchor, less what its references have in common:
// its offset, or the offset's square for squared distances.
PCK_DEVICE float metric_of(const Row& row, float squared) {
  if (row.metric == Metric::cosine) return 0.5f * squared;
  if (row.metric != Metric::euclidean) return squared;
  if (!(row.offset > 0.0f)) return std::sqrt(squared);
  const float sq = row.anchor_sq + squared;  // sqrt(x + y) - sqrt(x) = y/(sqrt(x + y) + sqrt(x))
  return squared / (std::sqrt(sq > 0.0f ? sq : 0.0f) + row.offset);
}

// target <- dissimilarities of the references that count (see metric_of). A short distance is summed
// again from the differences, by a warp each: they are listed first, in any order.
PCK_DEVICE void dissimilarity(Block& block, const Row& row, const Kept& kept, int* near_count,
                              const Scratch& scratch, float* target) {
  const int count = static_cast<int>(row.count);
  if (!is_gram(row.metric)) {
    block.each_value(row.values, count, [&](int j, float value) {
      if (kept.has(j)) target[kept.place(j)] = value;
    });
    block.sync();
    return;
  }
  int* const near = scratch.cell;
  if (block.thread() == 0) *near_count = 0;
  block.sync();
  block.each_value(row.values, count, [&](int j, float product) {
    if (!kept.has(j)) return;
    const Squared squared = squared_of(row, j, product);
    if (squared.near)
      near[atomicAdd(near_count, 1)] = j;
    else
      target[kept.place(j)] = metric_of(row, squared.value);
  });
  block.sync();
  const int pairs = *near_count;
#pragma unroll 1
  for (int i = block.warp(); i < pairs; i += block.warps()) {
    const int j = near[i];
    const float sq =
        squared_distance(row.anchor, row.references + j * row.width, row.width, block.lane());
    const float squared = row.offset > 0.0f ? sq - row.anchor_sq : sq;
    if (block.lane() == 0) target[kept.place(j)] = metric_of(row, squared);
  }
  block.sync();
}

// dL/d(dissimilarity) -> V, with dL/d anchor = sum_j V_j (anchor - reference_j).
PCK_DEVICE float dissimilarity_backward(const Row& row, float dissimilarity, float grad) {
  if (row.metric == Metric::sqeuclidean) return 2.0f * grad;
  if (row.metric != Metric::euclidean) return grad;
  const float distance = dissimilarity + row.offset;
  return distance == 0.0f ? 0.0f : grad / distance;  // a distance of 0 has gradient 0
}

}  // namespace pck::cuda
