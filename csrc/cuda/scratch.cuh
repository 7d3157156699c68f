// A row's working memory: the grid in shared memory, and the arrays of its references there too where
// they fit, in global memory otherwise. The same arrays serve one stage after another; the comments say
// which.
#pragma once

#include <cstdint>

#include "block.cuh"

namespace pck::cuda {

// Sizes, known at launch.
struct Layout {
  int count;      // the row's references
  int cells;      // room on the grid, a multiple of 4; 0 for stages without one
  bool masked;    // whether which of them are there has to be looked up
  bool apart;     // whether places on the grid have an array of their own, or that of the values
  bool weighted;  // whether points have weights of any size: then each cell has a unit of its own

  PCK_HD int64_t points() const { return (int64_t{count} + 3) / 4 * 4 + 4; }
  PCK_HD int64_t words() const { return masked ? (int64_t{count} + kWarp - 1) / kWarp : 0; }
  PCK_HD int64_t bytes_a_cell() const { return 4 * (weighted ? 9 : 8); }
  PCK_HD int64_t cell_bytes() const { return bytes_a_cell() * cells; }
  PCK_HD int64_t point_bytes() const {
    return (4 * ((apart ? 4 : 3) * points() + 2 * words()) + 15) / 16 * 16;
  }
};

struct Scratch {
  // In cell_bytes(), [4 cells] each, see grid.cuh.
  int cells;
  unsigned* low;
  int* high;
  int* exponent;  // [cells], of each cell's unit; where points are weighted
  // In point_bytes(), [points] each.
  float* values;     // the row that is ranked softly | hard_rank: keys by bucket
  float* target;     // the teacher's dissimilarities, then its ranks, then slopes of the penalty
  float* product;    // slope times density, then the gradient | hard_rank: bucket starts
  unsigned* places;  // of the points on the grid, see Place; the values' memory unless they are apart
  // [words] each, see Kept.
  unsigned* kept_bits;
  int* kept_before;

  // Whether placing the points loses the values.
  PCK_DEVICE bool places_overwrite() const {
    return places == reinterpret_cast<const unsigned*>(values);
  }
  PCK_DEVICE Scratch(const Layout& layout, unsigned char* for_cells, unsigned char* for_points)
      : cells(layout.cells) {
    const int64_t points = layout.points();
    low = reinterpret_cast<unsigned*>(for_cells);
    high = reinterpret_cast<int*>(low + 4 * cells);
    exponent = high + 4 * cells;
    values = reinterpret_cast<float*>(for_points);
    target = values + points;
    product = target + points;
    places = reinterpret_cast<unsigned*>(layout.apart ? product + points : values);
    kept_bits = reinterpret_cast<unsigned*>((layout.apart ? product + points : product) + points);
    kept_before = reinterpret_cast<int*>(kept_bits + layout.words());
  }
};

}  // namespace pck::cuda
