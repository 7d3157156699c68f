// The CPU's own passes over features, which PyTorch's operators would make a dozen of: what comes
// before the products of a Gram side, and what follows its last row
// (pc_kernels/dissimilarities/row_maker.py).
#pragma once

#include <tuple>

#include "../tensors.h"

namespace pck {

// The points near the origin (empty if they are where they were), their squared norms, the offsets of
// far anchors, the references' twins, and the unit that the points were divided by.
using NearOrigin = std::tuple<TensorList, TensorList, Tensor, Tensor, double>;

// Of points [anchors], or [anchors, references].
NearOrigin near_origin(TensorList points, double far);

// x over a unit 2^k.
Tensor divided(const Tensor& x, float unit);

// V + V^T, in place.
Tensor with_mirror(Tensor values);

// sum_j v_ij (x_i - y_j), by a product. As a difference of two sums it cancels where what pulls at x_i
// is much nearer to it than the origin: near duplicates, and what no shift could bring near. Such rows,
// and few pairs, are summed from differences.
Tensor pull(const Tensor& values, const Tensor& x, const Tensor& y, int64_t few_pairs,
            double cancelled);

}  // namespace pck
