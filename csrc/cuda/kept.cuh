// Which values of a row are there, found by a block together. See csrc/cpu/selection.h, which does the
// same a row a thread.
#pragma once

#include "../stages.h"
#include "block.cuh"
#include "scratch.cuh"

namespace pck::cuda {

// The values that are there, and the place of each among them.
struct Kept {
  const unsigned* bits;  // a bit each, by words of a warp's width
  const int* before;     // how many are there in the words before
  int count;

  PCK_DEVICE bool has(int j) const { return (bits[j / kWarp] >> (j % kWarp)) & 1u; }
  PCK_DEVICE int place(int j) const {
    const unsigned below = (1u << (j % kWarp)) - 1u;
    return before[j / kWarp] + __popc(bits[j / kWarp] & below);
  }
};

// In scratch.kept_bits and scratch.kept_before.
PCK_DEVICE Kept find_kept(Block& block, const Present& present, int64_t i, int count,
                          const Scratch& scratch) {
  const bool* const keep = present.keep_of(i, count);
  const int64_t self = present.self_of(i);
  const int words = (count + kWarp - 1) / kWarp;
  unsigned* const bits = scratch.kept_bits;
  int* const before = scratch.kept_before;
#pragma unroll 1
  for (int w = block.warp(); w < words; w += block.warps()) {
    const int j = w * kWarp + block.lane();
    const bool kept = j < count && j != self && (keep == nullptr || keep[j]);
    const unsigned word = __ballot_sync(kEveryLane, kept);
    if (block.lane() == 0) bits[w] = word;
  }
  block.sync();
  const int kept = block.scan<int>(
      words, [&](int w) { return __popc(bits[w]); }, [&](int w, int sum) { before[w] = sum; });
  block.sync();
  return {bits, before, kept};
}

// The same for rows without an anchor, which mostly have no mask either: nothing is looked up then.
struct KeptOrAll {
  Kept kept;
  bool all;

  PCK_DEVICE int count() const { return kept.count; }
  PCK_DEVICE bool has(int j) const { return all || kept.has(j); }
  PCK_DEVICE int place(int j) const { return all ? j : kept.place(j); }
};

PCK_DEVICE KeptOrAll find_kept_or_all(Block& block, const Points& points, int64_t i,
                                      const Scratch& scratch) {
  const int count = static_cast<int>(points.count);
  const bool all = points.present.keep == nullptr;
  return {{scratch.kept_bits, scratch.kept_before,
           all ? count : find_kept(block, points.present, i, count, scratch).count},
          all};
}

}  // namespace pck::cuda
