// The passes over features on a GPU, before the products of a Gram side and after its last row: what
// csrc/cpu/points.cpp does on the CPU. No torch headers.
#pragma once

#include <cstdint>

#include "../table.h"

namespace pck {

// Shared memory of sums by column, see column_sum: a number a thread.
inline constexpr int kColumnBytes = 1024 * sizeof(double);

// Points [count, width], and what becomes of them.
struct PointSet {
  const float* x;
  int64_t count;
  float* moved;    // x less the shift
  float* squares;  // [count], their squared norms
};

// What brings points near the origin, in two launches: `Shift`, then `Move`.
struct NearOrigin {
  PointSet references;
  PointSet anchors;  // of no count if they are the references
  int64_t width;
  int parts;       // of bfloat16 whose sum all that is moved has to be; 0: any number of them
  float far;       // anchors are far out if their squares are this many times the references' median
  float* shift;    // [width]
  float* offsets;  // of all anchors: |a| of those that are far out, else 0
  int* groups;     // of points that are moved

  PCK_HD int64_t points() const { return references.count + anchors.count; }
};

struct Shift : NearOrigin {
  static constexpr int kSharedBytes = kColumnBytes;
};

struct Move : NearOrigin {
  static constexpr int kSharedBytes = (256 + 2) * sizeof(int);  // a count of each digit, see median
};

// finite <- points [count, width], 0 where one is not finite; poison [count] <- NaN there, else 0.
struct Quarantine {
  static constexpr int kSharedBytes = 0;
  const float* x;
  int64_t count;
  int64_t width;
  float* finite;
  float* poison;
};

// pulled_i <- sum_j v_ij (x_i - y_j) of x [n, width] and y [m, width]: of V y, which `pulled` holds;
// from the differences where that cancels.
struct Pull {
  static constexpr int kSharedBytes = kColumnBytes + 256;
  const float* v;  // [n, m]
  bool turned;     // v lies as [m, n]
  const float* x;
  const float* y;
  int64_t n, m, width;
  bool has_product;  // without, all is summed from differences
  float cancelled;   // a sum that is so much smaller than its terms has lost as much to rounding
  float* pulled;
};

}  // namespace pck
