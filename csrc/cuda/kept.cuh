// Which values of a row are there, found by a block together. See csrc/cpu/selection.h, which does the
// same a row a thread.
#pragma once

#include "../stages.h"
#include "block.cuh"
#include "scratch.cuh"

namespace pck::cuda {

// The values that are there, and the place of each among them.
struct Kept {
  static constexpr int kNobody = 0x7fffffff;
  bool masked;
  const unsigned* bits;  // under a mask a bit each, by words of a warp's width
  const int* before;     // how many are there in the words before
  int self;              // without a mask the one that is not there, or kNobody
  int count;

  PCK_DEVICE bool all() const { return !masked && self == kNobody; }
  PCK_DEVICE bool has(int j) const {
    return masked ? (bits[j / kWarp] >> (j % kWarp)) & 1u : j != self;
  }
  PCK_DEVICE int place(int j) const {
    if (!masked) return j - (j > self ? 1 : 0);
    const unsigned below = (1u << (j % kWarp)) - 1u;
    return before[j / kWarp] + __popc(bits[j / kWarp] & below);
  }
};

// Under a mask in scratch.kept_bits and scratch.kept_before.
PCK_DEVICE Kept find_kept(Block& block, const Present& present, int64_t i, int count,
                          const Scratch& scratch) {
  const bool* const keep = present.keep_of(i, count);
  const int64_t self = present.self_of(i);
  const int words = (count + kWarp - 1) / kWarp;
  unsigned* const bits = scratch.kept_bits;
  int* const before = scratch.kept_before;
  if (keep == nullptr) {
    const int absent = self < 0 ? Kept::kNobody : static_cast<int>(self);
    return {false, bits, before, absent, self < 0 ? count : count - 1};
  }
#pragma unroll 1
  for (int w = block.warp(); w < words; w += block.warps()) {
    const int j = w * kWarp + block.lane();
    const bool kept = j < count && j != self && keep[j];
    const unsigned word = __ballot_sync(kEveryLane, kept);
    if (block.lane() == 0) bits[w] = word;
  }
  block.sync();
  const int kept = block.scan<int>(
      words, [&](int w) { return __popc(bits[w]); }, [&](int w, int sum) { before[w] = sum; });
  block.sync();
  return {true, bits, before, Kept::kNobody, kept};
}

}  // namespace pck::cuda
