// Rows that are nearly hard: their range is so large against the temperature that a grid over all of it
// would be mostly empty. They are sorted, and every point sums the pairs within the support around it;
// what is further below counts 1, what is further above 0. See csrc/cpu/nearly_hard.cpp.
#pragma once

#include <cmath>

#include "../plan.h"
#include "hard_rank.cuh"

namespace pck::cuda {

// scratch.values <- the row, sorted, scratch.target along with it; scratch.product <- the place that
// each had, as an integer's bits.
PCK_DEVICE void sort_row(Block& block, int count, const Scratch& scratch) {
  float* const target = scratch.target;
  int* const place = reinterpret_cast<int*>(scratch.product);
  block.each(count, [&](int j) { place[j] = j; });
  block.sync();
  sort_keys(block, scratch.values, count, [=](int a, int b) {
    exchange_values(target[a], target[b]);
    exchange_values(place[a], place[b]);
  });
}

// A sorted row's differences in units of tau, in double since tau may be any number at all.
template <class R>
struct Window {
  const float* x;
  int count;
  double inverse_tau;

  PCK_DEVICE Window(const float* sorted, int points, double tau)
      : x(sorted), count(points), inverse_tau(std::fmin(1.0 / tau, 1e300)) {}

  // add(k, (x_j - x_k)/tau) for the others that j sees; returns how many are further below.
  template <class Add>
  PCK_DEVICE int others(int j, Add add) const {
    constexpr float support = R::support;
    const double own = x[j];
    int k = j - 1;
#pragma unroll 1
    for (; k >= 0; --k) {
      const float gap = static_cast<float>((own - x[k]) * inverse_tau);
      if (gap > support) break;
      add(k, gap);
    }
#pragma unroll 1
    for (int above = j + 1; above < count; ++above) {
      const float gap = static_cast<float>((own - x[above]) * inverse_tau);
      if (gap < -support) break;
      add(above, gap);
    }
    return k + 1;
  }
};

// take(j, sum of Phi((x_j - x_k)/tau) over k, its own 1/2 left out) for the sorted row.
template <class R, class Take>
PCK_DEVICE void window_rank_sums(Block& block, const float* x, int count, double tau, Take take) {
  const Window<R> window(x, count, tau);
  block.each(count, [&](int j) {
    double sum = 0.0;  // in fp32 the roundings of the terms would add up
    const int below = window.others(j, [&](int, float gap) { sum += R::cdf(gap); });
    take(j, static_cast<float>(sum + below));
  });
  block.sync();
}

// grad[j] <- sum_k (slope_j - slope_k) phi((x_j - x_k)/tau) for the sorted row.
template <class R>
PCK_DEVICE void window_rank_gradient(Block& block, const float* x, int count, double tau,
                                     const float* slope, float* grad) {
  const Window<R> window(x, count, tau);
  block.each(count, [&](int j) {
    double sum = 0.0;
    window.others(j, [&](int k, float gap) { sum += (slope[j] - slope[k]) * R::pdf(gap); });
    grad[j] = static_cast<float>(sum);
  });
  block.sync();
}

// x <- x in the order from before the sort, through `spare` in global memory.
PCK_DEVICE void put_back(Block& block, float* x, const int* place, int count, float* spare) {
  block.each(count, [&](int s) { spare[place[s]] = x[s]; });
  block.sync();
  block.each(count, [&](int j) { x[j] = spare[j]; });
  block.sync();
}

}  // namespace pck::cuda
