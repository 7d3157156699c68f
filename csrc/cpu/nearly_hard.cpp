#include "nearly_hard.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "../formulas.h"
#include "sort.h"

namespace pck {

int64_t place_nearly_hard(const float* x, int64_t count, double tau, int relaxation, double limit,
                          Scratch& scratch) {
  const auto [support, inverse_step] = visit(Relaxations{}, relaxation, [](auto row) {
    return std::pair<int, int>{row.support, row.inverse_step};
  });
  sort_order(x, count, scratch.order);
  double* const y = scratch.wide;
  for (int64_t i = 0; i < count; ++i) y[i] = x[scratch.order[i]];
  // y <- places in units of tau, gaps closed to just over the support.
  const double widest = support + 1;
  double previous = y[0];
  y[0] = 0.0;
  for (int64_t i = 1; i < count; ++i) {
    const double gap = (y[i] - previous) / tau;
    previous = y[i];
    y[i] = y[i - 1] + std::min(gap, widest);
  }
  const double span = y[count - 1] * inverse_step;
  if (!(span <= limit)) return 0;
  for (int64_t i = 0; i < count; ++i) {
    const double t = y[i] * inverse_step;
    const auto cell = static_cast<int32_t>(t);
    scratch.cell[scratch.order[i]] = cell;
    scratch.place[scratch.order[i]] = static_cast<float>(t - cell - 0.5);
  }
  return static_cast<int64_t>(span) + 1;
}

namespace {

// Calls pair(i, k, y_k - y_i) for the sorted pairs i < k within the support, and far(k, i) once for
// every k with the number i of points further below.
template <class R, class Far, class Pair>
void for_window(int64_t count, const Scratch& scratch, Far far, Pair pair) {
  const double* const y = scratch.wide;
  int64_t first = 0;
  for (int64_t k = 0; k < count; ++k) {
    while (y[k] - y[first] > R::support) ++first;
    far(k, first);
    for (int64_t i = first; i < k; ++i) pair(i, k, y[k] - y[i]);
  }
}

}  // namespace

// Sums in double, one pair after another: in fp32 their roundings would add up.
void pairs_rank_sums(int relaxation, int64_t count, float* rank, Scratch& scratch) {
  double* const sum = scratch.sum;
  std::fill_n(sum, count, 0.5);  // Phi(0), the point itself
  visit(Relaxations{}, relaxation, [&](auto row) {
    for_window<decltype(row)>(
        count, scratch, [=](int64_t k, int64_t below) { sum[k] += static_cast<double>(below); },
        [=](int64_t i, int64_t k, double gap) {
          const double step = row.cdf(gap);
          sum[k] += step;
          sum[i] += 1.0 - step;
        });
  });
  for (int64_t k = 0; k < count; ++k) rank[scratch.order[k]] = static_cast<float>(sum[k]);
}

void pairs_rank_gradient(int relaxation, int64_t count, const float* slope, float* grad,
                         Scratch& scratch) {
  double* const sum = scratch.sum;
  const int32_t* const order = scratch.order;
  std::fill_n(sum, count, 0.0);
  visit(Relaxations{}, relaxation, [&](auto row) {
    for_window<decltype(row)>(
        count, scratch, [](int64_t, int64_t) {},
        [=](int64_t i, int64_t k, double gap) {
          const double push = (static_cast<double>(slope[order[k]]) - slope[order[i]]) * row.pdf(gap);
          sum[k] += push;
          sum[i] -= push;
        });
  });
  for (int64_t k = 0; k < count; ++k) grad[order[k]] = static_cast<float>(sum[k]);
}

}  // namespace pck
