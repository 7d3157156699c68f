// The CPU backend's operators: torch tensors in, row kernels over threads, torch tensors out.
#include <ATen/Parallel.h>

#include <tuple>

#include "../arguments.h"
#include "kept_memory.h"
#include "rows.h"

namespace pck {
namespace {

// Runs body(first, last, scratch) over blocks of rows, a scratch for each thread.
template <class Body>
void for_rows(int64_t rows, int64_t count, Body body) {
  if (rows == 0) return;
  // A thread should get at least ~16k points, or waking it costs more than it does.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(count, 1));
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    Scratch scratch(count);
    for (int64_t i = first; i < last; ++i) body(i, scratch);
  });
}

Tensor hard_rank(const Tensor& x) {
  check_matrix("x", x, at::kCPU);
  Tensor rank = empty_rows(x.size(0), x.size(1));
  const int64_t count = x.size(1);
  const float* const source = x.const_data_ptr<float>();
  float* const target = rank.mutable_data_ptr<float>();
  for_rows(x.size(0), count, [&](int64_t i, Scratch& scratch) {
    row_kernels().hard_rank(source + i * count, count, target + i * count, scratch);
  });
  return rank;
}

// Ranks, and with_grad what the backward needs of the forward (else empty).
std::tuple<Tensor, Tensor> soft_rank(const Tensor& x, double temperature, const std::string& relaxation,
                                     bool scale_std, bool with_grad) {
  check_matrix("x", x, at::kCPU);
  const RankOptions options = rank_options(relaxation, temperature, scale_std);
  Tensor rank = empty_rows(x.size(0), x.size(1));
  Tensor density = with_grad ? empty_rows(x.size(0), x.size(1)) : at::empty({0}, x.options());
  const int64_t count = x.size(1);
  const float* const source = x.const_data_ptr<float>();
  float* const target = rank.mutable_data_ptr<float>();
  float* const kept = with_grad ? density.mutable_data_ptr<float>() : nullptr;
  for_rows(x.size(0), count, [&](int64_t i, Scratch& scratch) {
    row_kernels().soft_rank(source + i * count, count, options, target + i * count,
                            kept == nullptr ? nullptr : kept + i * count, scratch);
  });
  return {rank, density};
}

Tensor soft_rank_backward(const Tensor& grad_rank, const Tensor& x, const Tensor& density,
                          double temperature, const std::string& relaxation, bool scale_std) {
  check_matrix("x", x, at::kCPU);
  check_like("grad_rank", grad_rank, x);
  check_like("density", density, x);
  const RankOptions options = rank_options(relaxation, temperature, scale_std);
  Tensor grad = empty_rows(x.size(0), x.size(1));
  const int64_t count = x.size(1);
  const float* const source = x.const_data_ptr<float>();
  const float* const incoming = grad_rank.const_data_ptr<float>();
  const float* const kept = density.const_data_ptr<float>();
  float* const target = grad.mutable_data_ptr<float>();
  for_rows(x.size(0), count, [&](int64_t i, Scratch& scratch) {
    const int64_t row = i * count;
    row_kernels().soft_rank_backward(incoming + row, source + row, kept + row, count, options,
                                     target + row, scratch);
  });
  return grad;
}

Tensor empty_rows_like(const Tensor& like, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(like.scalar_type() == at::kFloat, "like must be float32, got ", like.scalar_type());
  TORCH_CHECK_VALUE(rows >= 0 && columns >= 0, "rows and columns must be >= 0, got ", rows, " and ",
                    columns);
  return empty_rows(rows, columns);
}

void dissimilarity_(Tensor values, const std::string& metric, const OptionalTensor& anchors,
                    const OptionalTensor& references, const OptionalTensor& anchor_sq,
                    const OptionalTensor& reference_sq, const OptionalTensor& offsets) {
  check_matrix("values", values, at::kCPU);
  const Side side =
      checked_side("values", values, metric, anchors, references, anchor_sq, reference_sq, offsets);
  for_rows(values.size(0), values.size(1),
           [&](int64_t i, Scratch&) { row_kernels().dissimilarity(side.row(i, -1)); });
}

void hard_rank_rows_(Tensor teacher, const std::string& metric, const OptionalTensor& anchors,
                     const OptionalTensor& references, const OptionalTensor& anchor_sq,
                     const OptionalTensor& reference_sq, const OptionalTensor& offsets,
                     const OptionalTensor& keep, int64_t self_start) {
  check_matrix("teacher", teacher, at::kCPU);
  const bool* const kept = checked_keep(keep, teacher, self_start);
  const Side side =
      checked_side("teacher", teacher, metric, anchors, references, anchor_sq, reference_sq, offsets);
  const int64_t count = teacher.size(1);
  for_rows(teacher.size(0), count, [&](int64_t i, Scratch& scratch) {
    row_kernels().hard_rank_row(side.row(i, self_start < 0 ? -1 : self_start + i),
                                kept == nullptr ? nullptr : kept + i * count, scratch);
  });
}

Tensor coherence_rows(Tensor student, const std::string& student_metric,
                      const OptionalTensor& student_anchors, const OptionalTensor& student_references,
                      const OptionalTensor& student_anchor_sq,
                      const OptionalTensor& student_reference_sq, const OptionalTensor& student_offsets,
                      Tensor teacher, const std::string& teacher_metric,
                      const OptionalTensor& teacher_anchors, const OptionalTensor& teacher_references,
                      const OptionalTensor& teacher_anchor_sq,
                      const OptionalTensor& teacher_reference_sq, const OptionalTensor& teacher_offsets,
                      const Tensor& weights, const OptionalTensor& keep, int64_t self_start,
                      double temperature, const std::string& relaxation, bool scale_std,
                      const std::string& penalty, bool with_grad) {
  check_matrix("student", student, at::kCPU);
  check_matrix("teacher", teacher, at::kCPU);
  check_coherence(student, teacher, weights);
  const bool* const kept = checked_keep(keep, student, self_start);
  const RankOptions options = rank_options(relaxation, temperature, scale_std, penalty);
  const Side student_side =
      checked_side("student", student, student_metric, student_anchors, student_references,
                   student_anchor_sq, student_reference_sq, student_offsets);
  const Side teacher_side =
      checked_side("teacher", teacher, teacher_metric, teacher_anchors, teacher_references,
                   teacher_anchor_sq, teacher_reference_sq, teacher_offsets);
  Tensor loss = at::empty({student.size(0)}, student.options());
  float* const losses = loss.mutable_data_ptr<float>();
  const float* const weight = weights.const_data_ptr<float>();
  const int64_t count = student.size(1);
  for_rows(student.size(0), count, [&](int64_t i, Scratch& scratch) {
    const int64_t self = self_start < 0 ? -1 : self_start + i;
    losses[i] = row_kernels().coherence_row(student_side.row(i, self), teacher_side.row(i, self),
                                            kept == nullptr ? nullptr : kept + i * count, options,
                                            weight[i], with_grad, scratch);
  });
  return loss;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pc_kernels, library) {
  define_operators(library, "cpu");
  library.def("cpu_empty_rows(Tensor like, int rows, int columns) -> Tensor");
}

TORCH_LIBRARY_IMPL(pc_kernels, CPU, library) {
  library.impl("cpu_empty_rows", &empty_rows_like);
  library.impl("cpu_hard_rank", &hard_rank);
  library.impl("cpu_soft_rank", &soft_rank);
  library.impl("cpu_soft_rank_backward", &soft_rank_backward);
  library.impl("cpu_dissimilarity_", &dissimilarity_);
  library.impl("cpu_hard_rank_rows_", &hard_rank_rows_);
  library.impl("cpu_coherence_rows", &coherence_rows);
}

}  // namespace pck
