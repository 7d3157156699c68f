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

struct Shape {
  double support;
  int inverse_step;
};

Shape shape_of(int relaxation) {
  return visit(Relaxations{}, relaxation,
               [](auto row) { return Shape{static_cast<double>(row.support), row.inverse_step}; });
}

// scratch.piece <- for each point in order the number of its piece, or -1: its pairs are summed. A
// piece goes from a point that sees many to the last such point that is within the support of the one
// before. Returns about what pieces and pairs cost, in cells of a grid.
double choose_pieces(int64_t count, Shape shape, Scratch& scratch) {
  const double* const y = scratch.wide;
  int32_t* const piece = scratch.piece;
  const double support = shape.support;
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
      cells += (y[k] - y[last_dense]) * shape.inverse_step;
    } else {
      ++current;
      cells += 2 * support * shape.inverse_step;
    }
    piece[k] = current;
    last_dense = k;
  }
  return cells + neighbours;
}

}  // namespace

int64_t place_nearly_hard(const float* x, int64_t count, double tau, int relaxation, double limit,
                          Scratch& scratch) {
  const Shape shape = shape_of(relaxation);
  sort_order(x, count, scratch.order);
  double* const y = scratch.wide;
  for (int64_t i = 0; i < count; ++i) y[i] = x[scratch.order[i]];
  // y <- places in units of tau, gaps closed to just over the support.
  const double widest = shape.support + 1;
  double previous = y[0];
  y[0] = 0.0;
  for (int64_t i = 1; i < count; ++i) {
    const double gap = (y[i] - previous) / tau;
    previous = y[i];
    y[i] = y[i - 1] + std::min(gap, widest);
  }
  const double span = y[count - 1] * shape.inverse_step;
  // One grid over many gaps is mostly empty: pieces are for rows where they are far cheaper, too.
  const bool crowded = span <= static_cast<double>(count);
  if (!crowded && !(span <= std::min(limit, 2.0 * choose_pieces(count, shape, scratch)))) return 0;
  for (int64_t i = 0; i < count; ++i) {
    const double t = y[i] * shape.inverse_step;
    const auto cell = static_cast<int32_t>(t);
    scratch.cell[scratch.order[i]] = cell;
    scratch.place[scratch.order[i]] = static_cast<float>(t - cell - 0.5);
  }
  return static_cast<int64_t>(span) + 1;
}

namespace {

// Calls far(k, i) for every point k in order that is in no piece, with the number i of points further
// below than the support; pair(i, k, y_k - y_i) for its pairs i < k with others of no piece; and
// from_piece(k, i, y_k - y_i) for those with i, above or below, in a piece.
template <class R, class Far, class Pair, class FromPiece>
void for_window(int64_t count, const Scratch& scratch, Far far, Pair pair, FromPiece from_piece) {
  const double* const y = scratch.wide;
  const int32_t* const piece = scratch.piece;
  const bool any_piece = std::any_of(piece, piece + count, [](int32_t p) { return p >= 0; });
  int64_t first = 0;
  for (int64_t k = 0; k < count; ++k) {
    while (y[k] - y[first] > R::support) ++first;
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
    for (int64_t i = k + 1; i < count && y[i] - y[k] <= R::support; ++i)
      if (piece[i] >= 0) from_piece(k, i, y[k] - y[i]);
  }
}

}  // namespace

// Sums in double, one pair after another: in fp32 their roundings would add up.
void pairs_rank_sums(int relaxation, int64_t count, Scratch& scratch) {
  double* const sum = scratch.sum;
  std::fill_n(sum, count, 0.5);  // Phi(0), the point itself
  visit(Relaxations{}, relaxation, [&](auto row) {
    for_window<decltype(row)>(
        count, scratch, [=](int64_t k, int64_t below) { sum[k] += static_cast<double>(below); },
        [=](int64_t i, int64_t k, double gap) {
          const double step = row.cdf(gap);
          sum[k] += step;
          sum[i] += 1.0 - step;
        },
        [=](int64_t k, int64_t, double gap) { sum[k] += row.cdf(gap); });
  });
}

void pairs_rank_gradient(int relaxation, int64_t count, const float* slope, Scratch& scratch) {
  double* const sum = scratch.sum;
  const int32_t* const order = scratch.order;
  std::fill_n(sum, count, 0.0);
  const auto rise = [=](int64_t i, int64_t k) {
    return static_cast<double>(slope[order[k]]) - slope[order[i]];
  };
  visit(Relaxations{}, relaxation, [&](auto row) {
    for_window<decltype(row)>(
        count, scratch, [](int64_t, int64_t) {},
        [=](int64_t i, int64_t k, double gap) {
          const double push = rise(i, k) * row.pdf(gap);
          sum[k] += push;
          sum[i] -= push;
        },
        [=](int64_t k, int64_t i, double gap) { sum[k] += rise(i, k) * row.pdf(gap); });
  });
}

Piece next_piece(int relaxation, int64_t count, int64_t from, Scratch& scratch) {
  const auto [support, inverse_step] = shape_of(relaxation);
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
    const double t = (y[found.first_on_grid + i] - low) * inverse_step;
    scratch.cell[i] = static_cast<int32_t>(t);
    scratch.place[i] = static_cast<float>(t - scratch.cell[i] - 0.5);
  }
  found.cells = scratch.cell[found.points() - 1] + 1;
  return found;
}

}  // namespace pck
