// The nearly hard regime of `soft_rank` and `kernel_sums`: rows whose range is so large against the
// temperature that a grid over all of it would cost more than a sort.
#pragma once

#include "../formulas.h"
#include "scratch.h"

namespace pck {

// A relaxation, out of the templates.
struct Step {
  int relaxation;  // a code of GridRelaxations
  double support;
  int inverse_step;
};

template <class R>
inline constexpr Step kStep{R::code, static_cast<double>(R::support), R::inverse_step};

enum class Kernel { density, cdf, integral };

// Sorts the row, closes the gaps wider than the support (points so far apart do not see each other,
// however far it is) and places the points on one grid of at most `limit` cells: returns the cells. 0:
// that is too many, or pieces are far cheaper; Scratch::wide, ::order and ::piece are left ready for
// the sums below.
int64_t place_nearly_hard(const float* x, int64_t count, double tau, const Step& step, double limit,
                          Scratch& scratch);

// Scratch::below <- for each point in order the weights of the points before it, and ::ramp, if wanted,
// these weights times their distances to it. `weight` is by point, here and below; null: 1.
void sum_below(int64_t count, const float* weight, bool with_ramp, Scratch& scratch);

// The sums of a kernel, after sum_below, and those of rank_gradient before they are divided by tau, of
// the points that see few others, pair by pair, to Scratch::sum in order. `slope` is by point. Of a
// kernel, those at the points from `first_query` on.
void pairs_sums(Kernel kernel, const Step& step, int64_t count, const float* weight,
                int64_t first_query, Scratch& scratch);
void pairs_rank_gradient(const Step& step, int64_t count, const float* slope, Scratch& scratch);

// Adds to the integrals at the points from `first_query` on what closed gaps have taken of them: from
// each point below on, they grow by the gap.
void add_closed_gaps(const float* x, int64_t count, double tau, const Step& step, const float* weight,
                     int64_t first_query, float* integral, Scratch& scratch);

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
Piece next_piece(const Step& step, int64_t count, int64_t from, Scratch& scratch);

}  // namespace pck
