// Rows over their norms, times a scale, and back: one pass over the features each way, where PyTorch's
// operators take five (pc_kernels/losses/scaling.py has the formulas).
#include <algorithm>
#include <cmath>
#include <tuple>

#include "../arguments.h"

namespace pck {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // what is worth waking another thread for

// sum_k a_k b_k in double.
double dot(const float* a, const float* b, int64_t count) {
  constexpr int64_t lanes = 8;  // side by side, which vectors are made of
  double partial[lanes] = {};
  const int64_t whole = count / lanes * lanes;
  for (int64_t k = 0; k < whole; k += lanes)
    for (int64_t l = 0; l < lanes; ++l)
      partial[l] += static_cast<double>(a[k + l]) * static_cast<double>(b[k + l]);
  for (int64_t k = whole; k < count; ++k)
    partial[k - whole] += static_cast<double>(a[k]) * static_cast<double>(b[k]);
  double total = 0.0;
  for (const double part : partial) total += part;
  return total;
}

template <class Each>
void for_rows(const Tensor& x, Each each) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, x.size(1)));
  parallel_for(x.size(0), grain, [&](int64_t first, int64_t past) {
    for (int64_t i = first; i < past; ++i) each(i);
  });
}

// [n, 1] for x [n, D].
Tensor column_like(const Tensor& x) {
  return empty<double>(x, {x.size(0), 1});
}

// y = s x/|x|, and 1/|x| [n, 1] in double; 0 where x is.
std::tuple<Tensor, Tensor> scaled(const Tensor& x, double s) {
  check_matrix("x", x, DeviceType::CPU);
  Tensor y = empty<float>(x, x.sizes()), inverse = column_like(x);
  const int64_t width = x.size(1);
  const float* const from = x.const_data_ptr<float>();
  float* const to = y.mutable_data_ptr<float>();
  double* const inverses = inverse.mutable_data_ptr<double>();
  for_rows(x, [&](int64_t i) {
    const float* const row = from + i * width;
    const double norm = std::sqrt(dot(row, row, width));
    inverses[i] = norm == 0.0 ? 0.0 : 1.0 / norm;
    const double factor = s * inverses[i];
    for (int64_t k = 0; k < width; ++k)
      to[i * width + k] = static_cast<float>(static_cast<double>(row[k]) * factor);
  });
  return {y, inverse};
}

// Of the gradient g in y: that in x, s/|x| (g - y (g y)/s^2), and g y [n, 1] in double.
std::tuple<Tensor, Tensor> scaled_backward(const Tensor& grad, const Tensor& y, const Tensor& inverse,
                                           double s) {
  check_matrix("grad", grad, DeviceType::CPU);
  check_like("y", y, grad);
  check_list("inverse", inverse, grad, grad.size(0), ScalarType::Double);
  Tensor to_x = empty<float>(grad, grad.sizes()), along = column_like(grad);
  const int64_t width = grad.size(1);
  const float* const g = grad.const_data_ptr<float>();
  const float* const out = y.const_data_ptr<float>();
  const double* const inverses = inverse.const_data_ptr<double>();
  float* const to = to_x.mutable_data_ptr<float>();
  double* const alongs = along.mutable_data_ptr<double>();
  for_rows(grad, [&](int64_t i) {
    const int64_t first = i * width;
    alongs[i] = dot(g + first, out + first, width);
    const double factor = s * inverses[i], back = alongs[i] * inverses[i] / s;
    for (int64_t k = first; k < first + width; ++k)
      to[k] =
          static_cast<float>(static_cast<double>(g[k]) * factor - static_cast<double>(out[k]) * back);
  });
  return {to_x, along};
}

template <class Add>
void visit_operators(Add add) {
  add("cpu_scaled(Tensor x, float s) -> (Tensor, Tensor)", Operator<&scaled>::boxed);
  add("cpu_scaled_backward(Tensor grad, Tensor y, Tensor inverse, float s) -> (Tensor, Tensor)",
      Operator<&scaled_backward>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
