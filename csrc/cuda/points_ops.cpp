// The CUDA backend's operators on points, see points.h.
#include <tuple>

#include "../arguments.h"
#include "backend.h"

namespace pck {
namespace {

// The threads of a block that moves points, a warp a point: a quarter of this.
constexpr int64_t kManyFeatures = 1024;

// Points whose `poison` and `inverse` are among lists that may be empty.
PointSet point_set(const Tensor& x, Tensor& moved, Tensor& squares, const Tensor* poison,
                   const Tensor* inverse) {
  const int64_t count = x.size(0);
  if (poison != nullptr) check_list("poison", *poison, x, count);
  if (inverse != nullptr) check_list("inverse", *inverse, x, count, ScalarType::Double);
  return {x.const_data_ptr<float>(),
          count,
          moved.mutable_data_ptr<float>(),
          squares.mutable_data_ptr<float>(),
          poison == nullptr ? nullptr : poison->const_data_ptr<float>(),
          inverse == nullptr ? nullptr : inverse->const_data_ptr<double>()};
}

// Of points [anchors, references], or [references] alone: the points near the origin, their squared
// norms, the offsets of far anchors, the references' twins and the unit. `poison` and `inverse` are
// lists of numbers of the points, or empty.
std::tuple<TensorList, TensorList, Tensor, Tensor, Tensor> near_origin(TensorList points,
                                                                       TensorList poison,
                                                                       TensorList inverse,
                                                                       int64_t parts, double far) {
  check_points(points, Cuda::device);
  for (const TensorList& numbers : {poison, inverse})
    PCK_CHECK(numbers.empty() || numbers.size() == points.size(),
              "poison and inverse must be as many as ", "points, or none, got ", poison.size(), " and ",
              inverse.size());
  const Tensor& references = points.back();
  const int64_t count = references.size(0), width = references.size(1);
  PCK_CHECK(count < (int64_t{1} << 29), "too many references: ", count);
  TensorList moved, squares;
  std::vector<PointSet> sets;
  for (size_t i = 0; i < points.size(); ++i) {
    moved.push_back(empty<float>(points[i], points[i].sizes()));
    squares.push_back(empty<float>(points[i], {points[i].size(0)}));
    sets.push_back(point_set(points[i], moved[i], squares[i], poison.empty() ? nullptr : &poison[i],
                             inverse.empty() ? nullptr : &inverse[i]));
  }
  NearOrigin stage{};
  stage.references = sets.back();
  if (sets.size() == 2) stage.anchors = sets.front();
  stage.width = width;
  stage.parts = static_cast<int>(parts);
  stage.far = static_cast<float>(far);
  stage.room = 2;
  while (stage.room < 2 * count) stage.room *= 2;
  Tensor offsets = empty<float>(squares.front(), squares.front().sizes());
  Tensor twins = empty<int32_t>(references, {count + 1}), unit = empty<float>(references, {1});
  Tensor shift = empty<float>(references, {width}), largest = empty<float>(references, {width / 8 + 1});
  Tensor table = empty<int64_t>(references, {stage.room}), progress = empty<int32_t>(references, {2});
  stage.shift = shift.mutable_data_ptr<float>();
  stage.largest = largest.mutable_data_ptr<float>();
  stage.unit = unit.mutable_data_ptr<float>();
  stage.offsets = offsets.mutable_data_ptr<float>();
  stage.twins = twins.mutable_data_ptr<int32_t>();
  stage.table = reinterpret_cast<unsigned long long*>(table.mutable_data_ptr<int64_t>());
  stage.progress = reinterpret_cast<Progress*>(progress.mutable_data_ptr<int32_t>());
  Cuda::run(references, width, count, Shift{stage});
  Cuda::run(references, stage.points(), kManyFeatures, Move{stage});
  return {moved, squares, offsets, twins, unit};
}

// y = scale x/|x|, and 1/|x| [n, 1] in double; 0 where x is.
std::tuple<Tensor, Tensor> scaled(const Tensor& x, double scale) {
  check_matrix("x", x, Cuda::device);
  Tensor y = empty<float>(x, x.sizes()), inverse = empty<double>(x, {x.size(0), 1});
  const Scaled stage{
      x.const_data_ptr<float>(),         x.size(0), x.size(1), scale, y.mutable_data_ptr<float>(),
      inverse.mutable_data_ptr<double>()};
  Cuda::run(x, x.size(0), kManyFeatures, stage);
  return {y, inverse};
}

// Of the gradient in y: that in x, and its product with y [n, 1] in double.
std::tuple<Tensor, Tensor> scaled_backward(const Tensor& grad, const Tensor& y, const Tensor& inverse,
                                           double scale) {
  check_matrix("grad", grad, Cuda::device);
  check_like("y", y, grad);
  check_list("inverse", inverse, grad, grad.size(0), ScalarType::Double);
  Tensor to_x = empty<float>(grad, grad.sizes()), along = empty<double>(grad, {grad.size(0), 1});
  const ScaledBackward stage{grad.const_data_ptr<float>(),
                             y.const_data_ptr<float>(),
                             inverse.const_data_ptr<double>(),
                             grad.size(0),
                             grad.size(1),
                             scale,
                             to_x.mutable_data_ptr<float>(),
                             along.mutable_data_ptr<double>()};
  Cuda::run(grad, grad.size(0), kManyFeatures, stage);
  return {to_x, along};
}

// x with points that are not finite as 0, and NaN for these, 0 for the others.
std::tuple<Tensor, Tensor> quarantine(const Tensor& x) {
  check_matrix("x", x, Cuda::device);
  Tensor finite = empty<float>(x, x.sizes()), poison = empty<float>(x, {x.size(0)});
  const Quarantine stage{x.const_data_ptr<float>(), x.size(0), x.size(1),
                         finite.mutable_data_ptr<float>(), poison.mutable_data_ptr<float>()};
  Cuda::run(x, x.size(0), kManyFeatures, stage);
  return {finite, poison};
}

// pulled <- sum_j v_ij (x_i - y_j) over the unit, of the product of v and y that it holds; without a
// product from the differences.
void pull_(Tensor pulled, const Tensor& values, const Tensor& x, const Tensor& y, const Tensor& unit,
           bool has_product, double cancelled) {
  check_pull(values, x, y, Cuda::device);
  check_list("unit", unit, x, 1);
  check_like("pulled", pulled, x);
  const bool turned = !values.is_contiguous();
  const Pull stage{values.const_data_ptr<float>(),
                   turned,
                   x.const_data_ptr<float>(),
                   y.const_data_ptr<float>(),
                   x.size(0),
                   y.size(0),
                   x.size(1),
                   has_product,
                   static_cast<float>(cancelled),
                   unit.const_data_ptr<float>(),
                   pulled.mutable_data_ptr<float>()};
  Cuda::run(values, x.size(0), y.size(0), stage);
}

template <class Add>
void visit_operators(Add add) {
  add("cuda_near_origin(Tensor[] points, Tensor[] poison, Tensor[] inverse, int parts, float far) -> "
      "(Tensor[], Tensor[], Tensor, Tensor, Tensor)",
      Operator<&near_origin>::boxed);
  add("cuda_scaled(Tensor x, float scale) -> (Tensor, Tensor)", Operator<&scaled>::boxed);
  add("cuda_scaled_backward(Tensor grad, Tensor y, Tensor inverse, float scale) -> (Tensor, Tensor)",
      Operator<&scaled_backward>::boxed);
  add("cuda_quarantine(Tensor x) -> (Tensor, Tensor)", Operator<&quarantine>::boxed);
  add("cuda_pull_(Tensor(a!) pulled, Tensor values, Tensor x, Tensor y, Tensor unit, "
      "bool has_product, float cancelled) -> ()",
      Operator<&pull_>::boxed);
}

PCK_OPERATORS(CUDA, visit_operators)

}  // namespace
}  // namespace pck
