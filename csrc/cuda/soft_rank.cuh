// A row's soft ranks and their gradient, whatever the row: the choice between the grid of grid.cuh and
// the parts of nearly_hard.cuh, and what the scale of the temperature adds to the gradient.
#pragma once

#include <cmath>

#include "../plan.h"
#include "grid.cuh"
#include "nearly_hard.cuh"
#include "range.cuh"

namespace pck::cuda {

using Plan = pck::Plan<int>;

// `low` is the smallest value.
PCK_DEVICE Moments moments_of(Block& block, const float* x, int count, double low) {
  const double n = static_cast<double>(count);
  double sum = 0.0;
  block.each(count, [&](int i) { sum += x[i] - low; });
  const double mean = low + block.reduce(sum, Sum{}) / n;
  double squares = 0.0;
  block.each(count, [&](int i) { squares += (x[i] - mean) * (x[i] - mean); });
  return {mean, std::sqrt(block.reduce(squares, Sum{}) / n)};
}

// Points with an empty bin of a band's width between them do not see each other, so a run of empty bins
// may shrink to one. shift[b] <- how many bins before b stay; returns how many
// do, or 0 if there are too many bins to look at.
template <class BinOf>
PCK_DEVICE int close_gaps(Block& block, int count, int bins, const Scratch& scratch, BinOf bin_of) {
  unsigned* const occupied = scratch.low;
  int* const shift = scratch.high;
  block.each(bins, [&](int b) { occupied[b] = 0u; });
  block.sync();
  block.each(count, [&](int j) { atomicOr(&occupied[bin_of(j)], 1u); });
  block.sync();
  const int kept = block.scan<int>(
      bins, [&](int b) { return static_cast<int>(occupied[b] | (b > 0 ? occupied[b - 1] : 0u)); },
      [&](int b, int before) { shift[b] = before; });
  block.sync();
  return kept;
}

// Puts the points on a grid: returns its cells, or 0, the values untouched, if there is no room for it,
// with gaps closed or not, or pairs are cheaper. Places are found in double: a small value beside a
// large one has digits that their difference in fp32 would lose.
template <class R>
PCK_DEVICE int place_points(Block& block, int count, const Range& range, double tau,
                            const Scratch& scratch, bool may_close_gaps = true) {
  const float* const x = scratch.values;
  const double low = range.low;
  const double inverse_step = R::inverse_step / tau;
  const auto coordinate_of = [=](double x) { return (x - low) * inverse_step + kFirstPlace; };
  const double span = coordinate_of(range.high);
  const auto coordinate = [=](int j) { return coordinate_of(x[j]); };
  const double pairs = static_cast<double>(count) * count;
  const double most = std::fmin(static_cast<double>(scratch.cells), pairs / 8.0);
  if (!(inverse_step < kFinestGrid)) return 0;
  // One cell of slack at the end, whatever rounding does.
  int cells = span <= most - 2.0 ? static_cast<int>(span) + 2 : 0;
  const bool gaps = cells == 0;
  if (gaps) {
    if (!may_close_gaps || !(span < 4.0 * kBand<R> * scratch.cells)) return 0;
    const int bins = static_cast<int>(span) / kBand<R> + 1;
    const auto bin_of = [=](int j) { return static_cast<int>(coordinate(j)) / kBand<R>; };
    cells = close_gaps(block, count, bins, scratch, bin_of) * kBand<R>;
    if (cells > most) return 0;
  }
  const int digits = PlaceWords::digits_of(cells);
  const double unit = std::ldexp(1.0, digits);
  unsigned* const places = scratch.places;
  block.each(count, [&](int j) {
    double t = coordinate(j);
    if (gaps) {
      const int bin = static_cast<int>(t) / kBand<R>;
      t += (scratch.high[bin] - bin) * kBand<R>;
    }
    places[j] = static_cast<unsigned>(t * unit);
  });
  block.sync();
  return cells;
}

// On the grid, the values may be lost then (Scratch::places_overwrite). Pair by pair, they are sorted
// as by sort_row.
template <class R>
PCK_DEVICE Plan plan_row(Block& block, int count, const RankOptions& options, const Scratch& scratch) {
  const float* const x = scratch.values;
  const Range range = range_of(block, x, count);
  Plan plan = begin_plan(count, range.finite(), range.low == range.high, options,
                         [&] { return moments_of(block, x, count, range.low); });
  if (plan.way != Way::grid) return plan;
  plan.cells = place_points<R>(block, count, range, plan.tau, scratch);
  if (plan.cells > 0) return plan;
  plan.way = Way::pairs;
  sort_row(block, count, scratch);
  return plan;
}

// take(j, sum_k Phi((x_j - x_k)/tau) - 1/2, sum_k phi((x_j - x_k)/tau)), k = j included, for the points
// in the order of scratch.values. Pair by pair, the density has no use, and is given as 0.
template <class R, class Take>
PCK_DEVICE void rank_sums(Block& block, const Plan& plan, const Taps<R>& taps, const Scratch& scratch,
                          Take take) {
  if (plan.way == Way::grid)
    return grid_rank_sums<R>(block, Grid(plan.cells, scratch), PlaceWords(scratch, plan.cells),
                             plan.count, taps, take);
  const SortedRow<R> row(scratch, plan.count, plan.tau);
  nearly_hard_rank_sums(block, row, taps, scratch, [&](int j, float sum) { take(j, sum, 0.0f); });
}

// scratch.product[j] <- sum_k (slope_j - slope_k) phi((x_j - x_k)/tau), with the slopes in
// scratch.target. On the grid product is slope_j times the density on entry, and restore() is to bring
// back values that are lost. Pair by pair it is as sort_row left it; product and values come back in
// the order from before it. `spare` is global memory for as many numbers.
template <class R, class Restore>
PCK_DEVICE void rank_gradient(Block& block, const Plan& plan, const Taps<R>& taps,
                              const Scratch& scratch, float* spare, Restore restore) {
  float* const slope = scratch.target;
  float* const grad = scratch.product;
  if (plan.way == Way::grid) {
    grid_density<R>(
        block, Grid(plan.cells, scratch), PlaceWords(scratch, plan.cells), plan.count, taps,
        [=](int j) { return slope[j]; }, [=](int j, float density) { grad[j] -= density; });
    if (scratch.places_overwrite()) restore();
    return;
  }
  block.each(plan.count,
             [&](int s) { spare[s] = grad[s]; });  // the places, while the gradient is found
  block.sync();
  nearly_hard_gradient(block, SortedRow<R>(scratch, plan.count, plan.tau), taps, scratch, slope, grad);
  block.each(plan.count, [&](int s) { slope[s] = spare[s]; });
  block.sync();
  const int* const place = reinterpret_cast<const int*>(slope);
  put_back(block, grad, place, plan.count, spare);
  put_back(block, scratch.values, place, plan.count, spare);
}

// The last step of a gradient: its factor, 1/tau, and under scale="std" what comes through tau. Ranks
// are functions of x/tau, so dL/dtau = -sum_k grad_k (x_k - mean)/tau, and dtau/dx_j =
// temperature (x_j - mean)/(count sigma).
struct Pull {
  const float* x;
  const float* grad;
  double mean, unit;  // unit: 1/sigma, or 0 where tau does not depend on the row
  float share, factor, inverse_tau;

  PCK_DEVICE float standard(int j) const { return static_cast<float>((x[j] - mean) * unit); }
  // Scaling comes in two steps: either product may leave fp32's normal numbers.
  PCK_DEVICE float operator()(int j) const {
    return (grad[j] - share * standard(j)) * factor * inverse_tau;
  }
};

PCK_DEVICE Pull pull_of(Block& block, const Plan& plan, const RankOptions& options, const float* x,
                        const float* grad, float factor) {
  const float inverse_tau = plan.inverse_tau();
  if (!options.scale_std) return {x, grad, 0.0, 0.0, 0.0f, factor, inverse_tau};
  Pull pull{x, grad, plan.moments.mean, 1.0 / plan.moments.sigma, 0.0f, factor, inverse_tau};
  double sum = 0.0;
  block.each(plan.count, [&](int j) { sum += grad[j] * pull.standard(j); });
  pull.share = static_cast<float>(block.reduce(sum, Sum{}) / static_cast<double>(plan.count));
  return pull;
}

}  // namespace pck::cuda
