// The CUDA backend's operators: torch tensors in, one launch on the current stream, torch tensors out.
// Nothing here waits for the device, so that a CUDA graph can capture it; memory is PyTorch's own.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <tuple>

#include "../arguments.h"
#include "rows.h"

namespace pck {
namespace {

// Plans a launch over the rows of x, provides its workspace and runs body(launch, workspace, stream) on
// x's device. The workspace goes back to PyTorch's allocator, which hands it out again in stream order.
template <class Body>
void on_rows_of(const Tensor& x, const RankOptions* options, Body body) {
  const c10::cuda::CUDAGuard guard(x.device());
  cuda::Launch launch;
  C10_CUDA_CHECK(cuda::plan_launch(x.size(0), x.size(1), options, &launch));
  const Tensor workspace = at::empty({launch.workspace_bytes}, x.options().dtype(at::kByte));
  C10_CUDA_CHECK(body(launch, workspace.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
}

Tensor hard_rank(const Tensor& x) {
  check_matrix("x", x, at::kCUDA);
  Tensor rank = at::empty_like(x);
  on_rows_of(x, nullptr, [&](const auto& launch, void* workspace, cudaStream_t stream) {
    return cuda::hard_rank(launch, workspace, stream, x.const_data_ptr<float>(),
                           rank.mutable_data_ptr<float>());
  });
  return rank;
}

// Ranks, and with_grad what the backward needs of the forward (else empty).
std::tuple<Tensor, Tensor> soft_rank(const Tensor& x, double temperature, const std::string& relaxation,
                                     bool scale_std, bool with_grad) {
  check_matrix("x", x, at::kCUDA);
  const RankOptions options = rank_options(relaxation, temperature, scale_std);
  Tensor rank = at::empty_like(x);
  Tensor density = with_grad ? at::empty_like(x) : at::empty({0}, x.options());
  on_rows_of(x, &options, [&](const auto& launch, void* workspace, cudaStream_t stream) {
    return cuda::soft_rank(launch, workspace, stream, x.const_data_ptr<float>(), options,
                           rank.mutable_data_ptr<float>(),
                           with_grad ? density.mutable_data_ptr<float>() : nullptr);
  });
  return {rank, density};
}

Tensor soft_rank_backward(const Tensor& grad_rank, const Tensor& x, const Tensor& density,
                          double temperature, const std::string& relaxation, bool scale_std) {
  check_matrix("x", x, at::kCUDA);
  check_like("grad_rank", grad_rank, x);
  check_like("density", density, x);
  const RankOptions options = rank_options(relaxation, temperature, scale_std);
  Tensor grad = at::empty_like(x);
  on_rows_of(x, &options, [&](const auto& launch, void* workspace, cudaStream_t stream) {
    return cuda::soft_rank_backward(launch, workspace, stream, grad_rank.const_data_ptr<float>(),
                                    x.const_data_ptr<float>(), density.const_data_ptr<float>(), options,
                                    grad.mutable_data_ptr<float>());
  });
  return grad;
}

void dissimilarity_(Tensor values, const std::string& metric, const OptionalTensor& anchors,
                    const OptionalTensor& references, const OptionalTensor& anchor_sq,
                    const OptionalTensor& reference_sq, const OptionalTensor& offsets) {
  check_matrix("values", values, at::kCUDA);
  const Side side =
      checked_side("values", values, metric, anchors, references, anchor_sq, reference_sq, offsets);
  on_rows_of(values, nullptr, [&](const auto& launch, void* workspace, cudaStream_t stream) {
    return cuda::dissimilarity(launch, workspace, stream, side);
  });
}

void hard_rank_rows_(Tensor teacher, const std::string& metric, const OptionalTensor& anchors,
                     const OptionalTensor& references, const OptionalTensor& anchor_sq,
                     const OptionalTensor& reference_sq, const OptionalTensor& offsets,
                     const OptionalTensor& keep, int64_t self_start) {
  check_matrix("teacher", teacher, at::kCUDA);
  const bool* const kept = checked_keep(keep, teacher, self_start);
  const Side side =
      checked_side("teacher", teacher, metric, anchors, references, anchor_sq, reference_sq, offsets);
  on_rows_of(teacher, nullptr, [&](const auto& launch, void* workspace, cudaStream_t stream) {
    return cuda::hard_rank_rows(launch, workspace, stream, side, kept, self_start);
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
  check_matrix("student", student, at::kCUDA);
  check_matrix("teacher", teacher, at::kCUDA);
  check_coherence(student, teacher, weights);
  const bool* const kept = checked_keep(keep, student, self_start);
  const RankOptions options = rank_options(relaxation, temperature, scale_std, penalty);
  const cuda::Anchors anchors{
      checked_side("student", student, student_metric, student_anchors, student_references,
                   student_anchor_sq, student_reference_sq, student_offsets),
      checked_side("teacher", teacher, teacher_metric, teacher_anchors, teacher_references,
                   teacher_anchor_sq, teacher_reference_sq, teacher_offsets),
      kept, weights.const_data_ptr<float>(), self_start};
  Tensor loss = at::empty({student.size(0)}, student.options());
  on_rows_of(student, &options, [&](const auto& launch, void* workspace, cudaStream_t stream) {
    return cuda::coherence_rows(launch, workspace, stream, anchors, options, with_grad,
                                loss.mutable_data_ptr<float>());
  });
  return loss;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pc_kernels, library) {
  define_operators(library, "cuda");
}

TORCH_LIBRARY_IMPL(pc_kernels, CUDA, library) {
  library.impl("cuda_hard_rank", &hard_rank);
  library.impl("cuda_soft_rank", &soft_rank);
  library.impl("cuda_soft_rank_backward", &soft_rank_backward);
  library.impl("cuda_dissimilarity_", &dissimilarity_);
  library.impl("cuda_hard_rank_rows_", &hard_rank_rows_);
  library.impl("cuda_coherence_rows", &coherence_rows);
}

}  // namespace pck
