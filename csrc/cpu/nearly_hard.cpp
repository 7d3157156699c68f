#include "nearly_hard.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../formulas.h"
#include "sort.h"

namespace pck {

namespace {

// Points that see more others than this are served by a grid. A pair costs about as much as 5 cells of
// a grid, and a point that sees 40 others shares its grid's cells with them: at most 340/40 a point
// (docs/method.md, "Regimes").
constexpr int64_t kMostNeighbours = 40;

// Gaps are closed to this many units of tau: points so far apart do not see each other.
double widest_gap(const Step& step) {
  return step.support + 1;
}

// scratch.piece <- for each point in order the number of its piece, or -1: its pairs are summed. A
// piece goes from a point that sees many to the last such point that is within the support of the one
// before. Returns about what pieces and pairs cost, in cells of a grid.
double choose_pieces(int64_t count, const Step& step, Scratch& scratch) {
  const double* const y = scratch.wide;
  int32_t* const piece = scratch.piece;
  const double support = step.support;
  int64_t first = 0, past = 0, last_dense = -1;
  int32_t current = -1;
  double neighbours = 0.0, cells = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    while (y[k] - y[first] > support) ++first;
    while (past < count && y[past] - y[k] <= support) ++past;
    const int64_t seen = past - first - 1;
    piece[k] = -1;
    if (seen <= kMostNeighbours) {
      neighbours += static_cast<double>(seen);
      continue;
    }
    if (last_dense >= 0 && y[k] - y[last_dense] <= support) {
      std::fill(piece + last_dense + 1, piece + k, current);
      cells += (y[k] - y[last_dense]) * step.inverse_step;
    } else {
      ++current;
      cells += 2 * support * step.inverse_step;
    }
    piece[k] = current;
    last_dense = k;
  }
  return cells + neighbours;
}

}  // namespace

int64_t place_nearly_hard(const float* x, int64_t count, double tau, const Step& step, double limit,
                          Scratch& scratch) {
  sort_order(x, count, scratch.order);
  double* const y = scratch.wide;
  for (int64_t i = 0; i < count; ++i) y[i] = x[scratch.order[i]];
  // y <- places in units of tau, gaps closed to just over the support.
  const double widest = widest_gap(step);
  double previous = y[0];
  y[0] = 0.0;
  for (int64_t i = 1; i < count; ++i) {
    const double gap = (y[i] - previous) / tau;
    previous = y[i];
    y[i] = y[i - 1] + std::min(gap, widest);
  }
  const double span = y[count - 1] * step.inverse_step;
  // One grid over many gaps is mostly empty: pieces are for rows where they are far cheaper, too.
  const bool crowded = span <= static_cast<double>(count);
  if (!crowded && !(span <= std::min(limit, 2.0 * choose_pieces(count, step, scratch)))) return 0;
  for (int64_t i = 0; i < count; ++i) {
    const double t = y[i] * step.inverse_step + kFirstPlace;
    const auto cell = static_cast<int32_t>(t);
    scratch.cell[scratch.order[i]] = cell;
    scratch.place[scratch.order[i]] = static_cast<float>(t - cell - 0.5);
  }
  return static_cast<int64_t>(span + kFirstPlace) + 1;
}

namespace {

// Calls far(k, i) for every point k in order that is in no piece, with the number i of points further
// below than the support; pair(i, k, y_k - y_i) for its pairs i < k with others of no piece; and
// from_piece(k, i, y_k - y_i) for those with i, above or below, in a piece.
template <class OfBelow, class Pair, class FromPiece>
void for_window(int64_t count, double support, const Scratch& scratch, OfBelow far, Pair pair,
                FromPiece from_piece) {
  const double* const y = scratch.wide;
  const int32_t* const piece = scratch.piece;
  const bool any_piece = std::any_of(piece, piece + count, [](int32_t p) { return p >= 0; });
  int64_t first = 0;
  for (int64_t k = 0; k < count; ++k) {
    while (y[k] - y[first] > support) ++first;
    if (any_piece && piece[k] >= 0) continue;
    far(k, first);
    if (!any_piece) {
      for (int64_t i = first; i < k; ++i) pair(i, k, y[k] - y[i]);
      continue;
    }
    for (int64_t i = first; i < k; ++i) {
      if (piece[i] < 0)
        pair(i, k, y[k] - y[i]);
      else
        from_piece(k, i, y[k] - y[i]);
    }
    for (int64_t i = k + 1; i < count && y[i] - y[k] <= support; ++i)
      if (piece[i] >= 0) from_piece(k, i, y[k] - y[i]);
  }
}

}  // namespace

void sum_below(int64_t count, const float* weight, bool with_ramp, Scratch& scratch) {
  const double* const y = scratch.wide;
  const auto sum = [&](auto weight_of) {
    double below = 0.0, ramp = 0.0;
    for (int64_t k = 0; k < count; ++k) {
      if (with_ramp && k > 0) ramp += below * (y[k] - y[k - 1]);
      scratch.below[k] = below;
      if (with_ramp) scratch.ramp[k] = ramp;
      below += weight_of(k);
    }
  };
  if (weight == nullptr)
    sum([](int64_t) { return 1.0; });
  else
    sum([&](int64_t k) { return static_cast<double>(weight[scratch.order[k]]); });
}

namespace {

// Sums in double, one pair after another: in fp32 their roundings would add up. `asked`: whether a
// point's sum is wanted.
template <class R, class Weight, class Asked>
void sum_pairs(Kernel kernel, double support, int64_t count, Weight weight, Asked asked,
               Scratch& scratch) {
  const double *const y = scratch.wide, *const below = scratch.below, *const ramp = scratch.ramp;
  double* const sum = scratch.sum;
  const auto sums_of = [&](auto value, auto over, auto of_below) {
    for (int64_t k = 0; k < count; ++k) sum[k] = weight(k) * value(0.0);  // of the point itself
    for_window(
        count, support, scratch, [&](int64_t k, int64_t first) { sum[k] += of_below(k, first); },
        [&](int64_t i, int64_t k, double gap) {
          const bool to_upper = asked(k) && weight(i) != 0.0, to_lower = asked(i) && weight(k) != 0.0;
          if (!to_upper && !to_lower) return;
          const double upper = value(gap);
          if (to_upper) sum[k] += weight(i) * upper;
          if (to_lower) sum[i] += weight(k) * over(gap, upper);
        },
        [&](int64_t k, int64_t i, double gap) {
          if (asked(k) && weight(i) != 0.0) sum[k] += weight(i) * value(gap);
        });
  };
  switch (kernel) {  // `over` is the kernel at -gap
    case Kernel::density:
      return sums_of([](double gap) { return R::pdf(gap); }, [](double, double upper) { return upper; },
                     [](int64_t, int64_t) { return 0.0; });
    case Kernel::cdf:
      return sums_of([](double gap) { return R::cdf(gap); },
                     [](double, double upper) { return 1.0 - upper; },
                     [=](int64_t, int64_t first) { return below[first]; });
    case Kernel::integral:
      return sums_of(
          [](double gap) { return R::integral(gap); },
          [](double gap, double) { return R::integral(-gap); },
          [=](int64_t k, int64_t first) { return ramp[first] + below[first] * (y[k] - y[first]); });
  }
}

}  // namespace

void pairs_sums(Kernel kernel, const Step& step, int64_t count, const float* weight,
                int64_t first_query, Scratch& scratch) {
  const int32_t* const order = scratch.order;
  visit(GridRelaxations{}, step.relaxation, [&](auto row) {
    using R = decltype(row);
    if (weight == nullptr && first_query == 0)
      return sum_pairs<R>(
          kernel, step.support, count, [](int64_t) { return 1.0; }, [](int64_t) { return true; },
          scratch);
    sum_pairs<R>(
        kernel, step.support, count, [=](int64_t k) { return static_cast<double>(weight[order[k]]); },
        [=](int64_t k) { return order[k] >= first_query; }, scratch);
  });
}

void add_closed_gaps(const float* x, int64_t count, double tau, const Step& step, const float* weight,
                     int64_t first_query, float* integral, Scratch& scratch) {
  const double widest = widest_gap(step);
  double below = 0.0, lost = 0.0, previous = x[scratch.order[0]];
  for (int64_t k = 0; k < count; ++k) {
    const int32_t point = scratch.order[k];
    const double gap = x[point] - previous;
    previous = x[point];
    if (gap / tau > widest) lost += below * (gap - widest * tau);
    if (point >= first_query) {
      float& here = integral[point - first_query];
      here = static_cast<float>(here + lost / tau);
    }
    below += weight[point];
  }
}

void pairs_rank_gradient(const Step& step, int64_t count, const float* slope, Scratch& scratch) {
  double* const sum = scratch.sum;
  const int32_t* const order = scratch.order;
  std::fill_n(sum, count, 0.0);
  const auto rise = [=](int64_t i, int64_t k) {
    return static_cast<double>(slope[order[k]]) - slope[order[i]];
  };
  visit(GridRelaxations{}, step.relaxation, [&](auto row) {
    for_window(
        count, step.support, scratch, [](int64_t, int64_t) {},
        [=](int64_t i, int64_t k, double gap) {
          const double push = rise(i, k) * row.pdf(gap);
          sum[k] += push;
          sum[i] -= push;
        },
        [=](int64_t k, int64_t i, double gap) { sum[k] += rise(i, k) * row.pdf(gap); });
  });
}

Piece next_piece(const Step& step, int64_t count, int64_t from, Scratch& scratch) {
  const double support = step.support;
  const double* const y = scratch.wide;
  const int32_t* const piece = scratch.piece;
  Piece found;
  found.first = std::find_if(piece + from, piece + count, [](int32_t p) { return p >= 0; }) - piece;
  if (found.first == count) return found;
  found.past = found.first;
  while (found.past < count && piece[found.past] == piece[found.first]) ++found.past;
  found.first_on_grid = found.first;
  while (found.first_on_grid > 0 && y[found.first] - y[found.first_on_grid - 1] <= support)
    --found.first_on_grid;
  found.past_on_grid = found.past;
  while (found.past_on_grid < count && y[found.past_on_grid] - y[found.past - 1] <= support)
    ++found.past_on_grid;
  const double low = y[found.first_on_grid];
  for (int64_t i = 0; i < found.points(); ++i) {
    const double t = (y[found.first_on_grid + i] - low) * step.inverse_step + kFirstPlace;
    scratch.cell[i] = static_cast<int32_t>(t);
    scratch.place[i] = static_cast<float>(t - scratch.cell[i] - 0.5);
  }
  found.cells = scratch.cell[found.points() - 1] + 1;
  return found;
}

}  // namespace pck
