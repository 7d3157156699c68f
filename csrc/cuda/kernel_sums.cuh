// Stage `kernel_sums`: weighted sums of kernels at any points, by the pieces of `soft_rank`. Sources
// and queries are one row of points, in which queries weigh nothing and only they are asked. A row goes
// one of three ways: all its pairs, which cost less than a grid where there are few; one grid; or
// sorted, as nearly hard rows do. See csrc/cpu/kernel_sums.h.
//
// Sums have an error relative to their terms, however small they are: the grid's support is the
// relaxation's reach, and each of its cells has a unit of its own for weights.
#pragma once

#include <cmath>

#include "../plan.h"
#include "nearly_hard.cuh"
#include "soft_rank.cuh"

namespace pck::cuda {

// A point's sums, of those kernels that are wanted.
struct Values {
  float density, cdf, integral;
};

// One channel of a row of the stage, whose rows are those of matrices: its points are the sources, then
// the queries. What it says follows from the stage, which takes no registers.
struct Together {
  const KernelSums& stage;
  int64_t i;
  int channel;

  PCK_DEVICE int first_query() const { return static_cast<int>(stage.sources.count); }
  PCK_DEVICE int count() const { return first_query() + static_cast<int>(stage.queries.count); }
  PCK_DEVICE double tau() const { return std::fmax(stage.options.temperature, kSmallestTau); }
  PCK_DEVICE bool is_source(int j) const { return j < first_query(); }
  PCK_DEVICE bool is_masked() const {
    return stage.sources.keep != nullptr || stage.queries.keep != nullptr;
  }
  PCK_DEVICE bool has(int j) const {
    const bool* const keep = is_source(j) ? stage.sources.keep : stage.queries.keep;
    return keep == nullptr || keep[place(j)];
  }
  // Mirrored for the upper tail, whose mirror image is the lower.
  PCK_DEVICE float x(int j) const {
    const float value = (is_source(j) ? stage.sources.x : stage.queries.x)[place(j)];
    return stage.upper ? -value : value;
  }
  // Queries weigh nothing, nor does what is absent.
  PCK_DEVICE float weight(int j) const {
    if (!is_source(j) || !has(j)) return 0.0f;
    return stage.weights == nullptr ? 1.0f : stage.weights[channel * stage.all_sources + place(j)];
  }
  PCK_DEVICE bool with_density() const { return stage.density != nullptr; }
  PCK_DEVICE bool with_cdf() const { return stage.cdf != nullptr; }
  PCK_DEVICE bool with_integral() const { return stage.integral != nullptr; }
  // Stores a query's sums, 0 where they are not asked for.
  PCK_DEVICE void put(int j, const Values& values) const {
    const bool is_asked = has(j);
    const int64_t at = channel * stage.all_queries + place(j);
    if (with_density()) stage.density[at] = is_asked ? values.density : 0.0f;
    if (with_cdf()) stage.cdf[at] = is_asked ? values.cdf : 0.0f;
    if (with_integral()) stage.integral[at] = is_asked ? values.integral : 0.0f;
  }

 private:
  PCK_DEVICE int64_t place(int j) const {
    return is_source(j) ? i * stage.sources.count + j : i * stage.queries.count + (j - first_query());
  }
};

// scratch.values <- the points. What is absent lies where something else is.
PCK_DEVICE void place_together(Block& block, const Together& row, float* points) {
  int somewhere = 0;
  if (row.is_masked()) {
    int last = -1;
    block.each(row.count(), [&](int j) { last = row.has(j) ? j : last; });
    somewhere = block.reduce(last, Largest{});
  }
  const float present = somewhere < 0 ? 0.0f : row.x(somewhere);
  block.each(row.count(), [&](int j) { points[j] = row.has(j) ? row.x(j) : present; });
  block.sync();
}

// The weights of the points, to be read more than once.
PCK_DEVICE void stage_weights(Block& block, const Together& row, float* weights) {
  block.each(row.count(), [&](int j) { weights[j] = row.weight(j); });
  block.sync();
}

// All pairs, several lanes a query.

constexpr int kPairsALane = 8;

// Density and CDF at z.
template <class R>
PCK_DEVICE Values pair_at(R, float z) {
  return {R::pdf(z), R::cdf(z), 0.0f};
}

PCK_DEVICE Values pair_at(Far<Logistic>, float z) {  // by one exponential
  const float e = std::exp(-std::fabs(z)), rest = 1.0f / (1.0f + e), tail = e * rest;
  return {tail * rest, z < 0.0f ? tail : rest, 0.0f};
}

template <class R>
PCK_DEVICE void pair_sums(Block& block, const Together& row, const float* points,
                          const float* weights) {
  const float inverse_tau = static_cast<float>(1.0 / row.tau());
  const int sources = row.first_query();
  int lanes = 1;
  while (lanes < kWarp && lanes * kPairsALane < sources) lanes *= 2;
  const int side_by_side = block.threads() / lanes;
#pragma unroll 1
  for (int first = sources; first < row.count(); first += side_by_side) {
    const int j = first + block.thread() / lanes;
    const float y = points[j < row.count() ? j : sources];
    double density = 0.0, cdf = 0.0;
#pragma unroll 1
    for (int k = block.thread() % lanes; k < sources;) {
      float densities = 0.0f, cdfs = 0.0f;  // of a few: in fp32 the roundings of all would add up
#pragma unroll 1
      for (int i = 0; i < kPairsALane && k < sources; ++i, k += lanes) {
        const Values pair = pair_at(R{}, (y - points[k]) * inverse_tau);
        densities += weights[k] * pair.density;
        cdfs += weights[k] * pair.cdf;
      }
      density += densities;
      cdf += cdfs;
    }
    density = reduce_warp(density, Sum{}, lanes);
    cdf = reduce_warp(cdf, Sum{}, lanes);
    if (j < row.count() && block.thread() % lanes == 0)
      row.put(j, {static_cast<float>(density), static_cast<float>(cdf), 0.0f});
  }
}

// The grid.

constexpr int kWeighsNothing = -1000;  // the exponent of a cell without weight

template <class Places, class Weight>
PCK_DEVICE CellUnits units_of(Block& block, const Grid& grid, const Places& places, int count,
                              Weight weight) {
  block.each(grid.cells, [&](int c) { grid.exponent[c] = kWeighsNothing; });
  block.sync();
  block.each(count, [&](int j) {
    const float w = weight(j);
    if (w != 0.0f) atomicMax(&grid.exponent[places(j).cell], std::ilogb(w));
  });
  block.sync();
  return {grid.exponent};
}

// The integral of the rank function at the first cell's left edge, which only the masses of the first
// band reach.
template <class R>
PCK_DEVICE double first_integral(Block& block, const Grid& grid) {
  constexpr int nearby = kBand<R> + kNodes;
  const float* const mass = grid.mass() + kBand<R>;
  double start = 0.0;
  block.each(nearby < grid.nodes() ? nearby : grid.nodes(), [&](int n) {
    start += mass[n] * R::integral(static_cast<double>(kLeftNode - n) / R::inverse_step);
  });
  return block.reduce(start, Sum{});
}

// gain[c] <- the constant that makes gain + h (level u + h twice_integral_at(u)) the integral of the
// rank function in cell c.
template <class R>
PCK_DEVICE void integrate_twice(Block& block, const Grid& grid, double start) {
  constexpr float h = 1.0f / R::inverse_step;
  const float* const level = grid.level();
  const float4* const cubics = grid.cubics();
  float* const gain = grid.gain();
  block.scan<double>(
      grid.cells,
      [&](int c) {
        const float4 p = cubics[c];
        return static_cast<double>(h * (level[c] + h * (p.y * (1.0f / 24.0f) + p.w * (1.0f / 320.0f))));
      },
      [&](int c, double before) {
        const float to_middle = h * (0.5f * level[c] - h * twice_integral_at(cubics[c], -0.5f));
        gain[c] = static_cast<float>(start + before + to_middle);
      });
  block.sync();
}

// take(j, sums) at the places of points from `first` on, of all points' weights.
template <class R, class Places, class Weight, class Take>
PCK_DEVICE void grid_sums(Block& block, const Together& row, const Grid& grid, const Places& places,
                          Stretch points, const Taps<R>& taps, Weight weight, Take take) {
  constexpr float h = 1.0f / R::inverse_step;
  const CellUnits units = units_of(block, grid, places, points.past, weight);
  spread(block, grid, places, points.past, units, weight);
  nodes_from_moments<R>(block, grid, units);
  convolve<R>(block, grid, taps);
  const bool with_integral = row.with_integral(), with_levels = with_integral || row.with_cdf();
  if (with_levels) integrate<R>(block, grid, taps);
  const double start = with_integral ? first_integral<R>(block, grid) : 0.0;
  cell_cubics(block, grid);
  if (with_integral) integrate_twice<R>(block, grid, start);
  block.each(points.count(), [&](int i) {
    const int j = points.first + i;
    const auto [cell, u] = places(j);
    const float4 cubic = grid.cubics()[cell];
    Values values{cubic_at(cubic, u), 0.0f, 0.0f};
    if (with_levels) {
      const float level = grid.level()[cell];
      values.cdf = level + h * integral_at(cubic, u);
      if (with_integral)
        values.integral = grid.gain()[cell] + h * (level * u + h * twice_integral_at(cubic, u));
    }
    take(j, values);
  });
  block.sync();
}

// Nearly hard rows, sorted.

// What lies below each point in order, in weight, and in weight times its distance.
struct Below {
  const int* order;
  const float *sum, *ramp;

  // Adds to a point's sums those of what is further below than it sees, the first `far` points; `gap`
  // is its distance from the next one.
  PCK_DEVICE void add(Values& values, int far, double gap) const {
    values.cdf += sum[far];
    values.integral += static_cast<float>(ramp[far] + sum[far] * gap);
  }
};

// `sum` takes the room of Scratch::target, `ramp` that of the places.
template <class R>
PCK_DEVICE Below sum_below(Block& block, const Together& row, const SortedRow<R>& sorted,
                           const Scratch& scratch) {
  const int* const order = reinterpret_cast<const int*>(scratch.product);
  float *const sum = scratch.target, *const ramp = reinterpret_cast<float*>(scratch.places);
  block.scan<double>(
      row.count(), [&](int k) { return static_cast<double>(row.weight(order[k])); },
      [&](int k, double before) { sum[k] = static_cast<float>(before); });
  block.sync();
  const auto rise = [&](int k) { return k == 0 ? 0.0 : sum[k] * sorted.gap(k, k - 1); };
  if (row.with_integral())
    block.scan<double>(row.count(), rise,
                       [&](int k, double before) { ramp[k] = static_cast<float>(before + rise(k)); });
  else
    block.each(row.count(), [&](int k) { ramp[k] = 0.0f; });
  block.sync();
  return {order, sum, ramp};
}

// The sums of point j in order, over the pairs that it sees.
template <class R>
PCK_DEVICE Values lone_sums(const Together& row, const SortedRow<R>& sorted, int j,
                            const Below& below) {
  int far = 0;
  const auto sum_of = [&](auto kernel) {  // one at a time: together they take too many registers
    double sum = 0.0;
    far = sorted.pairs(j, [&](int k, float gap) {
      const float w = row.weight(below.order[k]);
      if (w != 0.0f) sum += w * kernel(gap);
    });
    return static_cast<float>(sum);
  };
  Values values{};
  if (row.with_density()) values.density = sum_of([](float gap) { return R::pdf(gap); });
  if (row.with_cdf()) values.cdf = sum_of([](float gap) { return R::cdf(gap); });
  if (row.with_integral()) values.integral = sum_of([](double gap) { return R::integral(gap); });
  below.add(values, far, sorted.gap(j, far));
  return values;
}

template <class R>
PCK_DEVICE void sorted_sums(Block& block, const Together& row, const SortedRow<R>& sorted,
                            const Taps<R>& taps, const Scratch& scratch) {
  const Below below = sum_below(block, row, sorted, scratch);
  const auto alone = [&](int j) {
    if (!row.is_source(below.order[j])) row.put(below.order[j], lone_sums(row, sorted, j, below));
  };
  for_parts(block, sorted, scratch.cells, alone, [&](const Tile& tile) {
    const TilePlaces places(sorted, tile);
    const int first = tile.seen.first;
    const auto take = [&](int j, Values values) {
      const int point = below.order[first + j];
      if (row.is_source(point) || !tile.served.has(first + j)) return;
      below.add(values, first, sorted.gap(first + j, first));
      row.put(point, values);
    };
    grid_sums<R>(
        block, row, places.grid(tile, scratch), places, Stretch{0, tile.seen.count()}, taps,
        [&](int j) { return row.weight(below.order[first + j]); }, take);
  });
}

// A pair costs about as much as an eighth of a point on a grid, or a 16th of a cell (docs/gpu.md).
constexpr double kPairsPerPoint = 8.0, kPairsPerCell = 16.0;

// Whether all pairs cost less than a grid. Their differences and 1/tau must be in fp32, and their
// integrals would lose digits there.
template <class R>
PCK_DEVICE bool few_pairs(const Together& row, const Range& range, int room) {
  const double low = range.low, span = range.high - low, tau = row.tau();
  const double pairs = static_cast<double>(row.first_query()) * (row.count() - row.first_query());
  const double cells = std::fmin(span / tau * R::inverse_step, static_cast<double>(room));
  return !row.with_integral() && pairs <= kPairsPerPoint * row.count() + kPairsPerCell * cells &&
         span <= 3.4e38 && 1.0 / tau < kLargestInverse;
}

}  // namespace pck::cuda
