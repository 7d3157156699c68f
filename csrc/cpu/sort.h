// Sorting for the row kernels. Out of line, so that the standard library's templates are compiled once,
// for the baseline instruction set.
#pragma once

#include <cstdint>

namespace pck {

// Sorts keys, and the payload along with them; equal keys by payload.
void sort_keys(float* keys, int32_t* payload, int64_t count);

// order <- the places of x, smallest value first, equal ones in their order; none may be NaN.
void sort_order(const float* x, int64_t count, int32_t* order);
void sort_order(const double* x, int64_t count, int32_t* order);

}  // namespace pck
