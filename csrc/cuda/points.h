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
  float* moved;         // x less the shift, in the unit
  float* squares;       // [count], their squared norms
  const float* poison;  // [count]: NaN for points that count as 0, whose pairs are NaN; null: none are
  const double* inverse;  // [count]: 1/length of what points of length 1 were, 0 of zeros; null: any
};

// What the blocks of a launch tell the last one, and a launch the next.
struct Progress {
  int arrived;  // blocks, or groups of points
  int zeros;    // whether a point of length 1 was none
};

// What brings points near the origin, in two launches: `Shift`, then `Move`.
struct NearOrigin {
  PointSet references;
  PointSet anchors;  // of no count if they are the references
  int64_t width;
  int parts;       // of bfloat16 whose sum all that is moved has to be; 0: any number of them
  float far;       // anchors are far out if their squares are this many times the references' median
  float* shift;    // [width]
  float* largest;  // of features of any point, one for each block of Shift
  float* unit;     // [1], what moved points were divided by: a power of two
  float* offsets;  // of all anchors: |a| of those that are far out, else 0
  int* twins;      // [references + 1], see Rows
  unsigned long long* table;  // [room], of references by hash, see Move
  int64_t room;               // a power of two, at least twice the references
  Progress* progress;

  PCK_HD int64_t points() const { return references.count + anchors.count; }
};

struct Shift : NearOrigin {
  static constexpr int kSharedBytes = kColumnBytes;
};

struct Move : NearOrigin {
  static constexpr int kSharedBytes = (256 + 2) * sizeof(int);  // a count of each digit, see median
};

// y <- scale x/|x| of points [count, width], inverse [count] <- 1/|x|; 0 where x is.
struct Scaled {
  static constexpr int kSharedBytes = 0;
  const float* x;
  int64_t count;
  int64_t width;
  double scale;
  float* y;
  double* inverse;
};

// to_x <- the gradient in x of the gradient in y; along [count] <- its product with y.
struct ScaledBackward {
  static constexpr int kSharedBytes = 0;
  const float* grad;
  const float* y;
  const double* inverse;
  int64_t count;
  int64_t width;
  double scale;
  float* to_x;
  double* along;
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
  bool has_product;   // without, all is summed from differences
  float cancelled;    // a sum that is so much smaller than its terms has lost as much to rounding
  const float* unit;  // [1], what x and y were divided by, and what is pulled is to be; null: 1
  float* pulled;
};

}  // namespace pck
