// What brings points near the origin, and their pull on each other, in every compiled backend: the
// decisions on single numbers. See pc_kernels/dissimilarities/row_maker.py. No torch headers.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "table.h"

namespace pck {

// How far a feature is shifted: its mean, to a multiple of a power of two about as large as its spread.
PCK_HD float rounded_shift(double mean, double deviation) {
  int exponent = 0;
  const bool power_of_two = std::frexp(deviation, &exponent) == 0.5;
  const double quantum = std::ldexp(1.0, exponent + (power_of_two ? 0 : 1));
  const double rounded = deviation > 0.0 ? std::nearbyint(mean / quantum) * quantum : mean;
  const float shift = static_cast<float>(rounded);
  return std::isfinite(shift) ? shift : 0.0f;
}

// A unit 2^k in which the squares of features up to this large neither over- nor underflow, mostly 1:
// they then have half the range left.
PCK_HD float unit_of(float largest) {
  if (!(largest > 0.0f) || !std::isfinite(largest)) return 1.0f;
  int exponent = 0;
  std::frexp(largest, &exponent);
  exponent = exponent < FLT_MAX_EXP ? exponent : FLT_MAX_EXP - 1;  // the unit is a number, too
  const bool safe = -126 / 4 < exponent && exponent < 126 / 4;
  return safe ? 1.0f : std::ldexp(1.0f, exponent);
}

}  // namespace pck
