// A row's working memory: in shared memory where it fits, in global memory otherwise. The same arrays
// serve one stage after another; the comments say which.
#pragma once

#include <cstdint>

#include "block.cuh"

namespace pck::cuda {

// Sizes, known at launch.
struct Layout {
  static constexpr int kCellBytes = 8 * sizeof(float);
  int count;  // the row's references
  int cells;  // room on the grid, a multiple of 4; 0 for stages without one

  PCK_HD int64_t points() const { return (int64_t{count} + 3) / 4 * 4 + 4; }
  PCK_HD int64_t words() const { return (int64_t{count} + kWarp - 1) / kWarp; }
  PCK_HD int64_t bytes() const {
    return (4 * (5 * points() + 2 * words()) + int64_t{kCellBytes} * cells + 15) / 16 * 16;
  }
};

// In bytes(): the cells come first, since they are read 16 bytes at a time.
struct Scratch {
  // [4 cells] each, see grid.cuh.
  int cells;
  unsigned* low;
  int* high;
  // [points] each.
  float* values;   // the row that is ranked softly: the student's dissimilarities
  float* target;   // the teacher's dissimilarities, then its ranks, then slopes of the penalty
  float* place;    // u, the place inside the cell | hard_rank: keys by bucket
  float* product;  // slope times density, then the gradient | hard_rank: bucket starts
  int* cell;       // | dissimilarity: near pairs | hard_rank: buckets
  // [words] each, see Kept.
  unsigned* kept_bits;
  int* kept_before;

  PCK_DEVICE Scratch(const Layout& layout, unsigned char* memory) : cells(layout.cells) {
    const int64_t points = layout.points();
    low = reinterpret_cast<unsigned*>(memory);
    high = reinterpret_cast<int*>(low + 4 * cells);
    values = reinterpret_cast<float*>(high + 4 * cells);
    target = values + points;
    place = target + points;  // hard_rank sorts in place and product, as one array
    product = place + points;
    cell = reinterpret_cast<int*>(product + points);
    kept_bits = reinterpret_cast<unsigned*>(cell + points);
    kept_before = reinterpret_cast<int*>(kept_bits + layout.words());
  }
};

}  // namespace pck::cuda
