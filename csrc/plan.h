// How a row is ranked softly, and the factors that this takes: what the CPU and the CUDA kernels agree
// on. No torch headers.
#pragma once

#include "stages.h"

namespace pck {

// Mean and population standard deviation of a row of finite values.
struct Moments {
  double mean, sigma;
};

// How a row goes through the stage.
enum class Way {
  undefined,  // a value is not finite: everything is NaN
  constant,   // all equal under scale="std", or nothing to compare with: 1/2, no gradient
  grid,
  pairs,      // nearly hard: too wide for a grid at this temperature, summed pair by pair
  few,        // pair by pair: of so few points that a grid costs more, see cpu/few_points.h
  scans,      // of the row in order, see cpu/scans.h
  projection  // see cpu/projection.h
};

inline constexpr double kLargestInverse = 3.4e38;

// Below this a temperature decides nothing: it is far less than any difference of two numbers in fp32.
inline constexpr double kSmallestTau = 1e-300;

template <class Size>  // int on a GPU, where 64 bits take two registers
struct Plan {
  Way way;
  Size count;
  Size cells;  // of the grid
  Moments moments;
  double tau;

  PCK_HD Size nodes() const { return cells + kNodes - 1; }
  // What a sum over the other points is multiplied by to be a rank.
  PCK_HD float rank_unit() const { return static_cast<float>(1.0 / (count - 1.0)); }
  // What the penalty's slopes are multiplied by in the gradient of the weighted mean penalty.
  PCK_HD float loss_factor(float weight) const {
    const double points = static_cast<double>(count);
    return static_cast<float>(weight / (points * (points - 1.0)));
  }
  // At the smallest temperatures 1/tau leaves fp32's range, and gradients are scaled in fp64 (on a GPU
  // by the largest number there is); what is 0 must stay 0.
  PCK_HD bool tau_is_tiny() const { return 1.0 / tau > kLargestInverse; }
  PCK_HD float inverse_tau() const { return static_cast<float>(std::fmin(1.0 / tau, kLargestInverse)); }
};

// A grid with more cells for each point costs more than the sort that the nearly hard ways begin with
// (docs/method.md, "Regimes").
inline constexpr double kMostCellsPerPoint = 8.0;
// The most nodes per unit of x: above it, coordinates on the grid might overflow.
inline constexpr double kFinestGrid = 1e30;

// The plan as far as a row's range and moments decide it: `grid`, of no cells yet, means that the row
// has to be placed. moments() is called where the temperature needs them.
PCK_CALLS_ANY
template <class Size, class MomentsOf>
PCK_HD Plan<Size> begin_plan(Size count, bool finite, bool all_equal, const RankOptions& options,
                             MomentsOf moments) {
  Plan<Size> plan{finite ? Way::constant : Way::undefined, count, 0, {0.0, 0.0}, 0.0};
  if (!finite || count < 2 || (options.scale_std && all_equal)) return plan;
  plan.way = Way::grid;
  if (options.scale_std) plan.moments = moments();
  plan.tau = options.temperature * (options.scale_std ? plan.moments.sigma : 1.0);
  plan.tau = std::fmax(plan.tau, kSmallestTau);
  return plan;
}

}  // namespace pck
