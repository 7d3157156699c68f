// The nearly hard regime of `soft_rank`: rows whose range is so large against the temperature that a
// grid over all of it would cost more than a sort. `relaxation` is a code of Relaxations.
#pragma once

#include "scratch.h"

namespace pck {

// Sorts the row, closes the gaps wider than the support (points so far apart do not see each other,
// however far it is) and places the points on a grid of at most `limit` cells: returns the cells.
// 0: even so too many; Scratch::wide and Scratch::order are left ready for the sums over pairs.
int64_t place_nearly_hard(const float* x, int64_t count, double tau, int relaxation, double limit,
                          Scratch& scratch);

// The sums of soft_rank.h's rank_sums, and those of rank_gradient before they are divided by tau, over
// the pairs within the support, after place_nearly_hard.
void pairs_rank_sums(int relaxation, int64_t count, float* rank, Scratch& scratch);
void pairs_rank_gradient(int relaxation, int64_t count, const float* slope, float* grad,
                         Scratch& scratch);

}  // namespace pck
