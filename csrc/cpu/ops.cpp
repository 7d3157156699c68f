// The CPU backend's operators: torch tensors in, row kernels over threads, torch tensors out.
// Python checks what users pass (pc_kernels/checks.py); the checks here keep a direct caller of
// torch.ops from reading out of bounds.
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <torch/types.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "rows.h"

namespace pck {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class Enum>
struct Name {
  const char* name;
  Enum value;
};

template <class Enum, size_t count>
Enum parse(const char* argument, const std::string& given, const Name<Enum> (&names)[count]) {
  std::string allowed;
  for (const auto& candidate : names) {
    if (given == candidate.name) return candidate.value;
    allowed += std::string(allowed.empty() ? "'" : ", '") + candidate.name + "'";
  }
  TORCH_CHECK_VALUE(false, argument, " must be one of ", allowed, ", got '", given, "'");
}

constexpr Name<Metric> kMetrics[] = {{"given", Metric::given},
                                     {"euclidean", Metric::euclidean},
                                     {"sqeuclidean", Metric::sqeuclidean},
                                     {"cosine", Metric::cosine}};
constexpr Name<Relaxation> kRelaxations[] = {{"logistic", Relaxation::logistic},
                                             {"normal", Relaxation::normal}};
constexpr Name<Penalty> kPenalties[] = {
    {"squared", Penalty::squared}, {"absolute", Penalty::absolute}, {"huber", Penalty::huber}};

RankOptions rank_options(const std::string& relaxation, double temperature, bool scale_std,
                         const std::string& penalty = "squared") {
  TORCH_CHECK_VALUE(temperature > 0.0 && std::isfinite(temperature),
                    "temperature must be finite and > 0, got ", temperature);
  return {parse("relaxation", relaxation, kRelaxations), parse("penalty", penalty, kPenalties),
          temperature, scale_std};
}

void check_matrix(const char* name, const Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, " must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, got ", x.device());
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK_VALUE(x.size(1) < (int64_t{1} << 30), name, " has too many columns: ", x.size(1));
}

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
  check_matrix("x", x);
  Tensor rank = at::empty_like(x);
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
  check_matrix("x", x);
  const RankOptions options = rank_options(relaxation, temperature, scale_std);
  Tensor rank = at::empty_like(x);
  Tensor density = with_grad ? at::empty_like(x) : at::empty({0}, x.options());
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
  check_matrix("x", x);
  for (const auto& [name, like_x] :
       {std::pair("grad_rank", grad_rank), std::pair("density", density)}) {
    check_matrix(name, like_x);
    TORCH_CHECK_VALUE(like_x.sizes() == x.sizes(), name, " must have the shape of x, ", x.sizes(),
                      ", got ", like_x.sizes());
  }
  const RankOptions options = rank_options(relaxation, temperature, scale_std);
  Tensor grad = at::empty_like(x);
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

// One side (student or teacher) of a chunk of anchors.
class Side {
 public:
  Side(const char* name, const Tensor& values, const std::string& metric, const OptionalTensor& anchors,
       const OptionalTensor& references, const OptionalTensor& anchor_sq,
       const OptionalTensor& reference_sq, const OptionalTensor& offsets)
      : metric_(parse("metric", metric, kMetrics)),
        values_(values.data_ptr<float>()),
        rows_(values.size(0)),
        count_(values.size(1)) {
    if (metric_ == Metric::given) return;
    for (const OptionalTensor* part : {&anchors, &references, &anchor_sq, &reference_sq, &offsets})
      TORCH_CHECK_VALUE(part->has_value(), name, ": metric '", metric,
                        "' needs anchors, references, their squared norms and the offsets");
    check_matrix(name, *anchors);
    check_matrix(name, *references);
    width_ = anchors->size(1);
    TORCH_CHECK_VALUE(
        anchors->size(0) == rows_ && references->size(0) == count_ && references->size(1) == width_,
        name, ": anchors ", anchors->sizes(), " and references ", references->sizes(),
        " do not fit values ", values.sizes());
    for (const Tensor& sq : {*anchor_sq, *reference_sq, *offsets})
      TORCH_CHECK_VALUE(sq.scalar_type() == at::kFloat && sq.device().is_cpu() && sq.is_contiguous(),
                        name, ": squared norms and offsets must be contiguous float32 on the CPU");
    TORCH_CHECK_VALUE(
        anchor_sq->numel() == rows_ && reference_sq->numel() == count_ && offsets->numel() == rows_,
        name, ": one squared norm for each anchor and reference");
    anchors_ = anchors->const_data_ptr<float>();
    references_ = references->const_data_ptr<float>();
    anchor_sq_ = anchor_sq->const_data_ptr<float>();
    reference_sq_ = reference_sq->const_data_ptr<float>();
    offsets_ = offsets->const_data_ptr<float>();
  }

  Row row(int64_t i, int64_t self_start) const {
    const int64_t self = self_start < 0 ? -1 : self_start + i;
    float* const values = values_ + i * count_;
    if (metric_ == Metric::given)
      return {values, nullptr, nullptr, nullptr, 0.0f, 0.0f, count_, 0, self, metric_};
    return {values,        anchors_ + i * width_,
            references_,   reference_sq_,
            anchor_sq_[i], offsets_[i],
            count_,        width_,
            self,          metric_};
  }

 private:
  Metric metric_;
  float* values_;
  const float* anchors_ = nullptr;
  const float* references_ = nullptr;
  const float* anchor_sq_ = nullptr;
  const float* reference_sq_ = nullptr;
  const float* offsets_ = nullptr;
  int64_t rows_;
  int64_t count_;
  int64_t width_ = 0;
};

void check_self(int64_t self_start, const Tensor& values) {
  TORCH_CHECK_VALUE(self_start < 0 || self_start + values.size(0) <= values.size(1), "self_start ",
                    self_start, " puts an anchor outside the ", values.size(1), " references");
}

void dissimilarity_(Tensor values, const std::string& metric, const OptionalTensor& anchors,
                    const OptionalTensor& references, const OptionalTensor& anchor_sq,
                    const OptionalTensor& reference_sq, const OptionalTensor& offsets) {
  check_matrix("values", values);
  const Side side("values", values, metric, anchors, references, anchor_sq, reference_sq, offsets);
  for_rows(values.size(0), values.size(1),
           [&](int64_t i, Scratch&) { row_kernels().dissimilarity(side.row(i, -1)); });
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
  check_matrix("student", student);
  check_matrix("teacher", teacher);
  check_self(self_start, student);
  TORCH_CHECK_VALUE(student.sizes() == teacher.sizes(), "student ", student.sizes(), " and teacher ",
                    teacher.sizes(), " must have the same shape");
  TORCH_CHECK_VALUE(weights.scalar_type() == at::kFloat && weights.is_contiguous() &&
                        weights.numel() == student.size(0),
                    "weights must hold one contiguous float32 for each anchor");
  TORCH_CHECK_VALUE(!keep.has_value() || (keep->scalar_type() == at::kBool && keep->is_contiguous() &&
                                          keep->sizes() == student.sizes()),
                    "keep must hold one contiguous bool for each pair");
  const RankOptions options = rank_options(relaxation, temperature, scale_std, penalty);
  const Side student_side("student", student, student_metric, student_anchors, student_references,
                          student_anchor_sq, student_reference_sq, student_offsets);
  const Side teacher_side("teacher", teacher, teacher_metric, teacher_anchors, teacher_references,
                          teacher_anchor_sq, teacher_reference_sq, teacher_offsets);
  Tensor loss = at::empty({student.size(0)}, student.options());
  float* const losses = loss.mutable_data_ptr<float>();
  const float* const weight = weights.const_data_ptr<float>();
  const bool* const kept = keep.has_value() ? keep->const_data_ptr<bool>() : nullptr;
  const int64_t count = student.size(1);
  for_rows(student.size(0), count, [&](int64_t i, Scratch& scratch) {
    losses[i] = row_kernels().coherence_row(
        student_side.row(i, self_start), teacher_side.row(i, self_start),
        kept == nullptr ? nullptr : kept + i * count, options, weight[i], with_grad, scratch);
  });
  return loss;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pc_kernels, library) {
  library.def("cpu_hard_rank(Tensor x) -> Tensor");
  library.def(
      "cpu_soft_rank(Tensor x, float temperature, str relaxation, bool scale_std, bool with_grad) -> "
      "(Tensor, Tensor)");
  library.def(
      "cpu_soft_rank_backward(Tensor grad_rank, Tensor x, Tensor density, float temperature, "
      "str relaxation, bool scale_std) -> Tensor");
  library.def(
      "cpu_dissimilarity_(Tensor(a!) values, str metric, Tensor? anchors, Tensor? references, "
      "Tensor? anchor_sq, Tensor? reference_sq, Tensor? offsets) -> ()");
  library.def(
      "cpu_coherence_rows(Tensor(a!) student, str student_metric, Tensor? student_anchors, "
      "Tensor? student_references, Tensor? student_anchor_sq, Tensor? student_reference_sq, Tensor? "
      "student_offsets, "
      "Tensor(b!) teacher, str teacher_metric, Tensor? teacher_anchors, "
      "Tensor? teacher_references, Tensor? teacher_anchor_sq, Tensor? teacher_reference_sq, Tensor? "
      "teacher_offsets, "
      "Tensor weights, Tensor? keep, int self_start, float temperature, str relaxation, bool "
      "scale_std, "
      "str penalty, bool with_grad) -> Tensor");
}

TORCH_LIBRARY_IMPL(pc_kernels, CPU, library) {
  library.impl("cpu_hard_rank", &hard_rank);
  library.impl("cpu_soft_rank", &soft_rank);
  library.impl("cpu_soft_rank_backward", &soft_rank_backward);
  library.impl("cpu_dissimilarity_", &dissimilarity_);
  library.impl("cpu_coherence_rows", &coherence_rows);
}

}  // namespace pck
