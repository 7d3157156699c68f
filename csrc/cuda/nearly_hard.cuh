// Rows that are nearly hard: their range is so large against the temperature that a grid over all of it
// would be mostly empty. They are sorted. A point that sees few others sums its pairs within the
// support; what is further below counts 1, what is further above 0. Crowded stretches have grids of
// their own, one after the other. See csrc/cpu/nearly_hard.cpp.
#pragma once

#include <cmath>

#include "../plan.h"
#include "grid.cuh"
#include "hard_rank.cuh"

namespace pck::cuda {

// A point is crowded that has so many others within the support on one side. The others sum at most
// twice as many pairs, which costs about as much as their share of a grid would.
inline constexpr int kCrowd = 32;

// scratch.values <- the row, sorted; scratch.product <- the place that each had, as an integer's bits.
// also(a, b) changes places of what goes along.
template <class Also>
PCK_DEVICE void sort_points(Block& block, int count, const Scratch& scratch, Also also) {
  int* const place = reinterpret_cast<int*>(scratch.product);
  block.each(count, [&](int j) { place[j] = j; });
  block.sync();
  sort_keys(block, scratch.values, count, [=](int a, int b) {
    also(a, b);
    exchange_values(place[a], place[b]);
  });
}

// The same, scratch.target along with it.
PCK_DEVICE void sort_row(Block& block, int count, const Scratch& scratch) {
  float* const target = scratch.target;
  sort_points(block, count, scratch, [=](int a, int b) { exchange_values(target[a], target[b]); });
}

// Neighbours in order.
struct Stretch {
  int first, past;

  PCK_DEVICE bool has(int j) const { return first <= j && j < past; }
  PCK_DEVICE int count() const { return past - first; }
};

// A stretch that a grid serves, and what is on the grid: also what the stretch sees.
struct Tile {
  Stretch served, seen;
};

// A sorted row, with differences in units of tau, in double since tau may be any number at all.
template <class R>
struct SortedRow {
  const float* x;
  int count;
  double inverse_tau;

  PCK_DEVICE SortedRow(const Scratch& scratch, int points, double tau)
      : x(scratch.values), count(points), inverse_tau(std::fmin(1.0 / tau, 1e300)) {}
  PCK_DEVICE double gap(int j, int k) const { return (static_cast<double>(x[j]) - x[k]) * inverse_tau; }
  PCK_DEVICE bool is_crowded(int j) const {
    return (j >= kCrowd && gap(j, j - kCrowd) <= R::support) ||
           (j + kCrowd < count && gap(j + kCrowd, j) <= R::support);
  }

  // add(k, (x_j - x_k)/tau) for the others that j sees; returns how many are further below.
  template <class Add>
  PCK_DEVICE int pairs(int j, Add add) const {
    int k = j - 1;
#pragma unroll 1
    for (; k >= 0; --k) {
      const double below = gap(j, k);
      if (below > R::support) break;
      add(k, static_cast<float>(below));
    }
#pragma unroll 1
    for (int above = j + 1; above < count; ++above) {
      const double difference = gap(j, above);
      if (difference < -R::support) break;
      add(above, static_cast<float>(difference));
    }
    return k + 1;
  }

  // Those from `first` on that are no more than `distance` above j.
  PCK_DEVICE Stretch up_to(int first, int j, double distance) const {
    const int past = partition_point(x, count, [=, this](float value) {
      return (static_cast<double>(value) - x[j]) * inverse_tau <= distance;
    });
    return {first, past};
  }
  // The tile from j on, of so many cells.
  PCK_DEVICE Tile tile(int j, double width) const {
    const Stretch served = up_to(j, j, width);
    const int first = partition_point(x, count, [=, this](float value) {
      return (static_cast<double>(x[j]) - value) * inverse_tau > R::support;
    });
    return {served, up_to(first, served.past - 1, R::support)};
  }
};

// Places on the grid of a tile.
struct TilePlaces {
  const float* x;
  double low, inverse_step;

  template <class R>
  PCK_DEVICE TilePlaces(const SortedRow<R>& row, const Tile& tile)
      : x(row.x + tile.seen.first), low(*x), inverse_step(R::inverse_step * row.inverse_tau) {}
  PCK_DEVICE double coordinate(int j) const { return (x[j] - low) * inverse_step + kFirstPlace; }
  PCK_DEVICE Place operator()(int j) const {
    const double t = coordinate(j);
    const int cell = static_cast<int>(t);
    return {cell, static_cast<float>(t - (cell + 0.5))};
  }
  PCK_DEVICE Grid grid(const Tile& tile, const Scratch& scratch) const {
    return {static_cast<int>(coordinate(tile.seen.count() - 1)) + 2, scratch};
  }
};

template <class R>
PCK_DEVICE int next_crowded(Block& block, const SortedRow<R>& row, int from) {
  for (; from < row.count; from += block.threads()) {
    const int j = from + block.thread();
    const int crowded = j < row.count && row.is_crowded(j) ? row.count - j : 0;
    const int found = block.reduce(crowded, Largest{});
    if (found > 0) return row.count - found;
  }
  return row.count;
}

// alone(j) for the points that no grid serves, tiled(tile) for what grids of up to `room` cells do.
template <class R, class Alone, class Tiled>
PCK_DEVICE void for_parts(Block& block, const SortedRow<R>& row, int room, Alone alone, Tiled tiled) {
  // Beside what it sees on either side.
  const double width = static_cast<double>(room - 2) / R::inverse_step - 2.0 * R::support;
  for (int from = 0; from < row.count;) {
    const int crowded = width > R::support ? next_crowded(block, row, from) : row.count;
    block.each(crowded - from, [&](int i) { alone(from + i); });
    if (crowded == row.count) break;
    const Tile tile = row.tile(crowded, width);
    tiled(tile);
    from = tile.served.past;
  }
  block.sync();
}

// take(j, sum_k Phi((x_j - x_k)/tau) - 1/2), k = j included, for the sorted row.
template <class R, class Take>
PCK_DEVICE void nearly_hard_rank_sums(Block& block, const SortedRow<R>& row, const Taps<R>& taps,
                                      const Scratch& scratch, Take take) {
  const auto alone = [&](int j) {
    double sum = 0.0;  // in fp32 the roundings of the terms would add up
    const int below = row.pairs(j, [&](int, float gap) { sum += R::cdf(gap); });
    take(j, static_cast<float>(sum + below));
  };
  for_parts(block, row, scratch.cells, alone, [&](const Tile& tile) {
    const TilePlaces places(row, tile);
    const int first = tile.seen.first;
    grid_rank_sums<R>(block, places.grid(tile, scratch), places, tile.seen.count(), taps,
                      [&](int j, float sum, float) {
                        if (tile.served.has(first + j))
                          take(first + j, sum + static_cast<float>(first));
                      });
  });
}

// grad[j] <- sum_k (slope_j - slope_k) phi((x_j - x_k)/tau) for the sorted row.
template <class R>
PCK_DEVICE void nearly_hard_gradient(Block& block, const SortedRow<R>& row, const Taps<R>& taps,
                                     const Scratch& scratch, const float* slope, float* grad) {
  const auto alone = [&](int j) {
    double sum = 0.0;
    row.pairs(j, [&](int k, float gap) { sum += (slope[j] - slope[k]) * R::pdf(gap); });
    grad[j] = static_cast<float>(sum);
  };
  for_parts(block, row, scratch.cells, alone, [&](const Tile& tile) {
    const TilePlaces places(row, tile);
    const int first = tile.seen.first;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {  // the density, then the slopes
      const bool slopes = pass == 1;
      grid_density<R>(
          block, places.grid(tile, scratch), places, tile.seen.count(), taps,
          [=](int j) { return slopes ? slope[first + j] : 1.0f; },
          [&](int j, float density) {
            const int own = first + j;
            if (tile.served.has(own)) grad[own] = slopes ? grad[own] - density : slope[own] * density;
          });
    }
  });
}

// x <- x in the order from before the sort, through `spare` in global memory.
PCK_DEVICE void put_back(Block& block, float* x, const int* place, int count, float* spare) {
  block.each(count, [&](int s) { spare[place[s]] = x[s]; });
  block.sync();
  block.each(count, [&](int j) { x[j] = spare[j]; });
  block.sync();
}

}  // namespace pck::cuda
