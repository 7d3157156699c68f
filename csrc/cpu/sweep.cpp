// The sweep of few pairs, from features to gradients in one operator: what pc_kernels/sweep.py does
// with the operators of this backend, of which each call costs more than so few numbers do.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "../operators.h"
#include "backend.h"
#include "points.h"

namespace pck {
namespace {

// The student's or the teacher's half, all anchors in one chunk
// (pc_kernels/dissimilarities/gram_side.py).
struct Side {
  TensorList points;  // near the origin: [anchors], or [anchors, references]
  TensorList gram;    // what makes squared distances of the values
  Tensor values;      // inner products
  double unit;        // that the points were divided by
};

Tensor transposed(const Tensor& x) {
  const int64_t sizes[] = {x.size(1), x.size(0)}, strides[] = {x.stride(1), x.stride(0)};
  AtenTensorHandle made = nullptr;
  constexpr int64_t further = 0;  // than x in its storage
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, further, &made));
  return Tensor(made);
}

Side side_of(const TensorList& given, double far) {
  auto [points, squares, offsets, twins, unit] = near_origin(given, far);
  if (points.empty()) points = given;
  const Tensor &anchors = points.front(), &references = points.back();
  Tensor values = empty_rows(anchors, {anchors.size(0), references.size(0)});
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_mm_out(values.get(), anchors.get(), transposed(references).get()));
  const Tensor known = empty<float>(anchors, {0});  // the unit, here and not on a device alone
  return {points,
          {anchors, references, squares.front(), squares.back(), offsets, twins, known},
          values,
          unit};
}

// Losses [anchors] of features [anchors], or [anchors, references]; with_grad, the gradients of
// sum_i weights_i L_i in the student's.
std::tuple<Tensor, TensorList> sweep(const TensorList& student, const TensorList& teacher,
                                     const Tensor& weights, int64_t self_start,
                                     const std::string& dissimilarity,
                                     const std::string& teacher_dissimilarity, double temperature,
                                     const std::string& relaxation, bool scale_std,
                                     const std::string& penalty, double far, int64_t few_pairs,
                                     double cancelled, bool with_grad) {
  const Side of_student = side_of(student, far), of_teacher = side_of(teacher, far);
  const auto& [points, gram, values, unit] = of_student;
  if (!scale_std)  // the temperature is in units of the rows
    temperature /=
        std::pow(unit, visit(Dissimilarities{},
                             code_of("dissimilarity", dissimilarity, Dissimilarities{}), PowerOf{}));
  Tensor losses = Operators<Cpu>::coherence_rows(
      values, dissimilarity, gram, of_teacher.values, teacher_dissimilarity, of_teacher.gram, weights,
      std::nullopt, self_start, temperature, relaxation, scale_std, penalty, with_grad);
  TensorList gradients;
  if (!with_grad) return {losses, gradients};
  const Tensor &anchors = points.front(), &references = points.back();
  if (points.size() == 1) {
    gradients = {pull(with_mirror(values), anchors, anchors, few_pairs, cancelled)};
  } else {
    gradients = {pull(values, anchors, references, few_pairs, cancelled),
                 pull(transposed(values), references, anchors, few_pairs, cancelled)};
  }
  if (unit != 1.0)
    for (Tensor& gradient : gradients) gradient = divided(gradient, unit);
  return {losses, gradients};
}

template <class Add>
void visit_operators(Add add) {
  add("cpu_sweep(Tensor[] student, Tensor[] teacher, Tensor weights, int self_start, "
      "str dissimilarity, str teacher_dissimilarity, float temperature, str relaxation, "
      "bool scale_std, str penalty, float far, int few_pairs, float cancelled, bool with_grad) "
      "-> (Tensor, Tensor[])",
      Operator<&sweep>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
