// The nearly hard regime of `soft_rank`: rows whose range is so large against the temperature that a
// grid over all of it would cost more than a sort. `relaxation` is a code of Relaxations.
#pragma once

#include "scratch.h"

namespace pck {

// Sorts the row, closes the gaps wider than the support (points so far apart do not see each other,
// however far it is) and places the points on one grid of at most `limit` cells: returns the cells. 0:
// that is too many, or pieces are far cheaper; Scratch::wide, ::order and ::piece are left ready for
// the sums below.
int64_t place_nearly_hard(const float* x, int64_t count, double tau, int relaxation, double limit,
                          Scratch& scratch);

// The sums of soft_rank.h's rank_sums, and those of rank_gradient before they are divided by tau, of
// the points that see few others, pair by pair, to Scratch::sum in order. `slope` is by point.
void pairs_rank_sums(int relaxation, int64_t count, Scratch& scratch);
void pairs_rank_gradient(int relaxation, int64_t count, const float* slope, Scratch& scratch);

// Neighbours in order of which most see many others: a grid of their own serves them. On it are also
// the points that they see.
struct Piece {
  int64_t first = 0, past = 0;                  // in order
  int64_t first_on_grid = 0, past_on_grid = 0;  // what they see included
  int64_t cells = 0;

  int64_t points() const { return past_on_grid - first_on_grid; }
};

// The first piece from `from` on, placed on its grid, at Scratch::cell and ::place from 0; where there
// is none, first = count.
Piece next_piece(int relaxation, int64_t count, int64_t from, Scratch& scratch);

}  // namespace pck
