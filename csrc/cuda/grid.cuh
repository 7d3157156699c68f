// Stage `soft_rank`: sum_k Phi((x_j - x_k)/tau) and its gradient through a uniform grid. docs/method.md
// tells the maths: spread each point to the grid, convolve with phi, integrate, gather at the points.
//
// The grid's arrays share two regions of 4 cells words each, `low` and `high`, in this order:
//
//     spread     moments, [4][cells] in 64 bits: low words | high words
//     nodes      terms, [4][cells]       in low;   mass, a band of zeros around it  -> high
//     convolve   density at the nodes -> low
//     integrate  level, and its own integral's gain, [cells] each -> low, second half
//     gather     cubics, [cells][4]   -> high
#pragma once

#include <cmath>

#include "block.cuh"
#include "scratch.cuh"

namespace pck::cuda {

// Room in `high` for the mass and its bands: of most grids, and of those with a reach (`Far`).
inline constexpr int kFewestCells = 64, kFewestFarCells = 128;
static_assert(3 * kFewestCells >=
              largest(GridRelaxations{}, [](auto row) { return kTaps<decltype(row)>; }) + kNodes + 7);
static_assert(3 * kFewestFarCells >=
              largest(GridRelaxations{}, [](auto row) { return kTaps<Far<decltype(row)>>; }) + kNodes +
                  7);

__device__ constexpr Stencil kDeviceStencil = make_stencil();

// Where a point lies.
struct Place {
  int cell;
  float u;  // in [-1/2, 1/2]
};

// Places of points in 32 bits each: the cell, then in fixed point how far it is inside.
struct PlaceWords {
  const unsigned* words;
  int digits;

  // Digits for what is inside a cell: what the cells leave, up to a float's.
  PCK_DEVICE static int digits_of(int cells) {
    const int left = __clz(cells);
    return left < 24 ? left : 24;
  }
  PCK_DEVICE PlaceWords(const Scratch& scratch, int cells)
      : words(scratch.places), digits(digits_of(cells)) {}
  PCK_DEVICE Place operator()(int j) const {
    const unsigned bits = words[j], inside = bits & ((1u << digits) - 1u);
    // The middle of what a last digit stands for.
    const float u = (static_cast<float>(inside) + 0.5f) * std::ldexp(1.0f, -digits) - 0.5f;
    return {static_cast<int>(bits >> digits), u};
  }
};

struct Grid {
  int cells;
  int room;  // Scratch::cells
  unsigned* low;
  int* high;
  int* exponent;

  PCK_DEVICE Grid(int used, const Scratch& scratch)
      : cells(used),
        room(scratch.cells),
        low(scratch.low),
        high(scratch.high),
        exponent(scratch.exponent) {}
  PCK_DEVICE int nodes() const { return cells + kNodes - 1; }
  PCK_DEVICE float* terms(int a) const { return reinterpret_cast<float*>(low) + a * room; }
  PCK_DEVICE float* mass() const { return reinterpret_cast<float*>(high); }  // a band of zeros first
  PCK_DEVICE float* density() const { return reinterpret_cast<float*>(low); }
  PCK_DEVICE float* level() const { return density() + 2 * room; }
  PCK_DEVICE float* gain() const { return density() + 3 * room; }
  PCK_DEVICE float4* cubics() const { return reinterpret_cast<float4*>(high); }
};

// Adds to a 64-bit sum in two words. Integers add up to the same in any order: that makes spreading by
// atomics deterministic, and exact where thousands of points fall together. Of the high word, an addend
// of 31 bits seldom needs more than its carry, which is mostly 0.
PCK_DEVICE void add_wide(unsigned* low, int* high, int addend) {
  const unsigned bits = static_cast<unsigned>(addend);
  const unsigned before = atomicAdd(low, bits);
  const int carry = (before + bits < before ? 1 : 0) - (addend < 0 ? 1 : 0);
  if (carry != 0) atomicAdd(high, carry);
}

inline constexpr int kUnitShift = 29;  // for weights of 1

// Moments are whole multiples of 2^-shift, such that no |w| exceeds 2^30 of these units.
struct SameUnit {  // in all cells
  int shift;
  PCK_DEVICE int of(int) const { return shift; }
};

struct CellUnits {  // by the largest weight of a cell: errors are relative to it
  const int* exponent;
  PCK_DEVICE int of(int cell) const { return kUnitShift - exponent[cell]; }
};

// Spread: moments[a][cell] = sum of w u^a over the cell's points.
template <class Places, class Units, class Weight>
PCK_DEVICE void spread(Block& block, const Grid& grid, const Places& places, int count, Units units,
                       Weight weight) {
  for (int a = 0; a < kTerms; ++a)
    block.each(grid.cells, [&](int c) {
      grid.low[a * grid.room + c] = 0u;
      grid.high[a * grid.room + c] = 0;
    });
  block.sync();
  block.each(count, [&](int j) {
    const auto [cell, u] = places(j);
    float power = std::scalbn(weight(j), units.of(cell));
#pragma unroll
    for (int a = 0; a < kTerms; ++a, power *= u)
      add_wide(grid.low + a * grid.room + cell, grid.high + a * grid.room + cell,
               static_cast<int>(std::rint(power)));
  });
  block.sync();
}

// Cell moments to weights on the nodes, between bands of zeros: node n collects from the cells
// n - kNodes + 1 ... n.
template <class R, class Units>
PCK_DEVICE void nodes_from_moments(Block& block, const Grid& grid, Units units) {
  for (int a = 0; a < kTerms; ++a)
    block.each(grid.cells, [&](int c) {
      const int i = a * grid.room + c;
      const int64_t sum = static_cast<int64_t>(grid.high[i]) * (int64_t{1} << 32) + grid.low[i];
      grid.terms(a)[c] = std::scalbn(static_cast<float>(sum), -units.of(c));
    });
  block.sync();
  float* const mass = grid.mass();
  constexpr int band = kBand<R>;
  block.each(band, [&](int i) { mass[i] = 0.0f; });
  block.each(grid.nodes(), [&](int n) {
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kNodes; ++k) {
      const int c = n - k;
      if (c < 0 || c >= grid.cells) continue;
#pragma unroll
      for (int a = 0; a < kTerms; ++a) sum += grid.terms(a)[c] * kDeviceStencil.weight[a][k];
    }
    mass[band + n] = sum;
  });
  // Whole tiles of nodes read whole vectors of taps.
  block.each(kTaps<R> - band + 8, [&](int i) { mass[band + grid.nodes() + i] = 0.0f; });
  block.sync();
}

// Convolve: density <- mass * phi at the nodes, four of them a thread, four taps a load.
template <class R>
PCK_DEVICE void convolve(Block& block, const Grid& grid, const Taps<R>& taps) {
  const float4* const mass = reinterpret_cast<const float4*>(grid.mass());
  const float4* const pdf = reinterpret_cast<const float4*>(taps.pdf);
  float4* const density = reinterpret_cast<float4*>(grid.density());
  block.each((grid.nodes() + 3) / 4, [&](int tile) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4 m = mass[tile];
#pragma unroll 2
    for (int d = 0; d < kTaps<R> / 4; ++d) {
      const float4 t = pdf[d], next = mass[tile + d + 1];
      sum.x += m.x * t.x + m.y * t.y + m.z * t.z + m.w * t.w;
      sum.y += m.y * t.x + m.z * t.y + m.w * t.z + next.x * t.w;
      sum.z += m.z * t.x + m.w * t.y + next.x * t.z + next.y * t.w;
      sum.w += m.w * t.x + next.x * t.y + next.y * t.z + next.z * t.w;
      m = next;
    }
    density[tile] = sum;
  });
  block.sync();
}

// Node densities to the cubic of every cell.
PCK_DEVICE void cell_cubics(Block& block, const Grid& grid) {
  const float* const nodes = grid.density();
  float4* const cubics = grid.cubics();
  block.each(grid.cells, [&](int c) {
    float coefficient[kTerms] = {};
#pragma unroll
    for (int n = 0; n < kNodes; ++n)
#pragma unroll
      for (int a = 0; a < kTerms; ++a) coefficient[a] += nodes[c + n] * kDeviceStencil.weight[a][n];
    cubics[c] = make_float4(coefficient[0], coefficient[1], coefficient[2], coefficient[3]);
  });
  block.sync();
}

// What F gains over a part of a cell, of the densities at the stencil's nodes.
template <class R>
PCK_DEVICE float gain_of(const float* nodes, const float (&integral)[kNodes]) {
  constexpr float h = 1.0f / R::inverse_step;
  float gain = 0.0f;
#pragma unroll
  for (int n = 0; n < kNodes; ++n) gain += nodes[n] * (h * integral[n]);
  return gain;
}

// Integrate: F = Phi * mass is the integral of the density. level[c] <- the constant that makes
// level + h (a u + b u^2/2 + c u^3/3 + d u^4/4) the rank function in cell c. F starts from its value at
// the first cell's left edge, which only the masses of the first band reach.
template <class R>
PCK_DEVICE void integrate(Block& block, const Grid& grid, const Taps<R>& taps) {
  constexpr int nearby = kBand<R> + kNodes;
  const float* const mass = grid.mass() + kBand<R>;
  const float* const nodes = grid.density();
  float* const level = grid.level();
  double start = 0.0;
  block.each(nearby < grid.nodes() ? nearby : grid.nodes(),
             [&](int n) { start += mass[n] * taps.cdf[n]; });
  start = block.reduce(start, Sum{});
  block.scan<double>(
      grid.cells,
      [&](int c) { return static_cast<double>(gain_of<R>(nodes + c, kDeviceStencil.integral)); },
      [&](int c, double before) {
        level[c] = static_cast<float>(start + before + gain_of<R>(nodes + c, kDeviceStencil.half));
      });
  block.sync();
}

// A cell's cubic and its integrals from the middle, times 1/h and 1/h^2.
PCK_DEVICE float cubic_at(const float4& p, float u) {
  return ((p.w * u + p.z) * u + p.y) * u + p.x;
}

PCK_DEVICE float integral_at(const float4& p, float u) {
  return (((p.w * 0.25f * u + p.z * (1.0f / 3.0f)) * u + p.y * 0.5f) * u + p.x) * u;
}

PCK_DEVICE float twice_integral_at(const float4& p, float u) {
  return (((p.w * 0.05f * u + p.z * (1.0f / 12.0f)) * u + p.y * (1.0f / 6.0f)) * u + p.x * 0.5f) * u *
         u;
}

// Gather: take(j, sum_k Phi((x_j - x_k)/tau) - 1/2, sum_k phi((x_j - x_k)/tau)), k = j included.
template <class R, class Places, class Take>
PCK_DEVICE void grid_rank_sums(Block& block, const Grid& grid, const Places& places, int count,
                               const Taps<R>& taps, Take take) {
  constexpr float h = 1.0f / R::inverse_step;
  spread(block, grid, places, count, SameUnit{kUnitShift}, [](int) { return 1.0f; });
  nodes_from_moments<R>(block, grid, SameUnit{kUnitShift});
  convolve<R>(block, grid, taps);
  integrate<R>(block, grid, taps);
  cell_cubics(block, grid);
  block.each(count, [&](int j) {
    const auto [cell, u] = places(j);
    const float4 cubic = grid.cubics()[cell];
    take(j, grid.level()[cell] + h * integral_at(cubic, u) - 0.5f, cubic_at(cubic, u));
  });
  block.sync();
}

// The unit for weights of so many points.
template <class Weight>
PCK_DEVICE SameUnit unit_of(Block& block, int count, Weight weight) {
  float largest = 0.0f;
  block.each(count, [&](int j) { largest = std::fmax(largest, std::fabs(weight(j))); });
  largest = block.reduce(largest, Largest{});
  return {largest > 0.0f ? kUnitShift - std::ilogb(largest) : 0};
}

// Gather: take(j, sum_k weight_k phi((x_j - x_k)/tau)).
template <class R, class Places, class Weight, class Take>
PCK_DEVICE void grid_density(Block& block, const Grid& grid, const Places& places, int count,
                             const Taps<R>& taps, Weight weight, Take take) {
  const SameUnit unit = unit_of(block, count, weight);
  spread(block, grid, places, count, unit, weight);
  nodes_from_moments<R>(block, grid, unit);
  convolve<R>(block, grid, taps);
  cell_cubics(block, grid);
  block.each(count, [&](int j) {
    const auto [cell, u] = places(j);
    take(j, cubic_at(grid.cubics()[cell], u));
  });
  block.sync();
}

}  // namespace pck::cuda
