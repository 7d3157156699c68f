// The range of a row's values.
#pragma once

#include <cmath>

#include "block.cuh"

namespace pck::cuda {

// Smallest and largest of the finite values, and what else there is.
struct Range {
  float low, high;
  unsigned others;  // kInfinite, kNaN
  static constexpr unsigned kInfinite = 1, kNaN = 2;

  PCK_DEVICE bool finite() const { return others == 0; }
};

PCK_DEVICE Range range_of(Block& block, const float* x, int count) {
  Range range{INFINITY, -INFINITY, 0};
  block.each(count, [&](int i) {
    const float v = x[i];
    if (v - v == 0.0f) {
      range.low = std::fmin(range.low, v);
      range.high = std::fmax(range.high, v);
    } else {
      range.others |= v == v ? Range::kInfinite : Range::kNaN;
    }
  });
  return block.reduce(range, [](const Range& a, const Range& b) {
    return Range{std::fmin(a.low, b.low), std::fmax(a.high, b.high), a.others | b.others};
  });
}

}  // namespace pck::cuda
