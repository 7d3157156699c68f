// The CUDA backend's operators on points, see points.h.
#include <tuple>

#include "../arguments.h"
#include "backend.h"

namespace pck {
namespace {

// The threads of a block that moves points, a warp a point: a quarter of this.
constexpr int64_t kManyFeatures = 1024;

PointSet point_set(const Tensor& x, Tensor& moved, Tensor& squares) {
  return {x.const_data_ptr<float>(), x.size(0), moved.mutable_data_ptr<float>(),
          squares.mutable_data_ptr<float>()};
}

// Of points [anchors, references], or [references] alone: the points near the origin, their squared
// norms and the offsets of far anchors.
std::tuple<TensorList, TensorList, Tensor> near_origin(TensorList points, int64_t parts, double far) {
  check_points(points, Cuda::device);
  const Tensor& references = points.back();
  TensorList moved, squares;
  for (const Tensor& x : points) {
    moved.push_back(Cuda::empty_like(x));
    squares.push_back(empty<float>(x, {x.size(0)}));
  }
  NearOrigin stage{};
  stage.references = point_set(references, moved.back(), squares.back());
  if (points.size() == 2) stage.anchors = point_set(points.front(), moved.front(), squares.front());
  Tensor offsets = Cuda::empty_like(squares.front());
  Tensor shift = empty<float>(references, {references.size(1)});
  Tensor groups = empty<int32_t>(references, {1});
  stage.width = references.size(1);
  stage.parts = static_cast<int>(parts);
  stage.far = static_cast<float>(far);
  stage.shift = shift.mutable_data_ptr<float>();
  stage.offsets = offsets.mutable_data_ptr<float>();
  stage.groups = groups.mutable_data_ptr<int32_t>();
  Cuda::run(references, stage.width, references.size(0), Shift{stage});
  Cuda::run(references, stage.points(), kManyFeatures, Move{stage});
  return {moved, squares, offsets};
}

// x with points that are not finite as 0, and NaN for these, 0 for the others.
std::tuple<Tensor, Tensor> quarantine(const Tensor& x) {
  check_matrix("x", x, Cuda::device);
  Tensor finite = Cuda::empty_like(x), poison = empty<float>(x, {x.size(0)});
  const Quarantine stage{x.const_data_ptr<float>(), x.size(0), x.size(1),
                         finite.mutable_data_ptr<float>(), poison.mutable_data_ptr<float>()};
  Cuda::run(x, x.size(0), kManyFeatures, stage);
  return {finite, poison};
}

// pulled <- sum_j v_ij (x_i - y_j), of the product of v and y that it holds; without a product from the
// differences.
void pull_(Tensor pulled, const Tensor& values, const Tensor& x, const Tensor& y, bool has_product,
           double cancelled) {
  check_pull(values, x, y, Cuda::device);
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
                   pulled.mutable_data_ptr<float>()};
  Cuda::run(values, x.size(0), y.size(0), stage);
}

template <class Add>
void visit_operators(Add add) {
  add("cuda_near_origin(Tensor[] points, int parts, float far) -> (Tensor[], Tensor[], Tensor)",
      Operator<&near_origin>::boxed);
  add("cuda_quarantine(Tensor x) -> (Tensor, Tensor)", Operator<&quarantine>::boxed);
  add("cuda_pull_(Tensor(a!) pulled, Tensor values, Tensor x, Tensor y, bool has_product, "
      "float cancelled) -> ()",
      Operator<&pull_>::boxed);
}

PCK_OPERATORS(CUDA, visit_operators)

}  // namespace
}  // namespace pck
