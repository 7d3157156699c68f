// What the operators of every compiled backend are given, checked. Python checks what users pass
// (pc_kernels/checks.py); the checks here keep a direct caller of torch.ops from reading out of bounds.
#pragma once

#include <torch/library.h>
#include <torch/types.h>

#include <cmath>
#include <optional>
#include <string>
#include <utility>

#include "row.h"

namespace pck {

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

inline constexpr Name<Metric> kMetrics[] = {{"given", Metric::given},
                                            {"ranked", Metric::ranked},
                                            {"euclidean", Metric::euclidean},
                                            {"sqeuclidean", Metric::sqeuclidean},
                                            {"cosine", Metric::cosine}};
inline constexpr Name<Relaxation> kRelaxations[] = {{"logistic", Relaxation::logistic},
                                                    {"normal", Relaxation::normal}};
inline constexpr Name<Penalty> kPenalties[] = {
    {"squared", Penalty::squared}, {"absolute", Penalty::absolute}, {"huber", Penalty::huber}};

inline RankOptions rank_options(const std::string& relaxation, double temperature, bool scale_std,
                                const std::string& penalty = "squared") {
  TORCH_CHECK_VALUE(temperature > 0.0 && std::isfinite(temperature),
                    "temperature must be finite and > 0, got ", temperature);
  return {parse("relaxation", relaxation, kRelaxations), parse("penalty", penalty, kPenalties),
          temperature, scale_std};
}

// A contiguous float32 matrix on a device of this type.
inline void check_matrix(const char* name, const Tensor& x, c10::DeviceType device) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, name, " must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().type() == device, name, " must be on the ", c10::DeviceTypeName(device),
                    ", got ", x.device());
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, got shape ", x.sizes());
  TORCH_CHECK_VALUE(x.is_contiguous(), name, " must be contiguous");
  TORCH_CHECK_VALUE(x.size(1) < (int64_t{1} << 30), name, " has too many columns: ", x.size(1));
}

// The same shape and device as x.
inline void check_like(const char* name, const Tensor& given, const Tensor& x) {
  check_matrix(name, given, x.device().type());
  TORCH_CHECK_VALUE(given.sizes() == x.sizes() && given.device() == x.device(), name,
                    " must have the shape and device of x, ", x.sizes(), " on ", x.device(), ", got ",
                    given.sizes(), " on ", given.device());
}

// `count` numbers of a type beside `values`.
inline void check_list(const char* name, const Tensor& list, const Tensor& values, int64_t count,
                       at::ScalarType type = at::kFloat) {
  TORCH_CHECK_VALUE(list.scalar_type() == type && list.device() == values.device() &&
                        list.is_contiguous() && list.numel() == count,
                    name, " must be ", count, " contiguous ", type, " on ", values.device(), ", got ",
                    list.numel(), " ", list.scalar_type(), " on ", list.device());
}

// One side (student or teacher) of a chunk of anchors.
inline Side checked_side(const char* name, const Tensor& values, const std::string& metric,
                         const OptionalTensor& anchors, const OptionalTensor& references,
                         const OptionalTensor& anchor_sq, const OptionalTensor& reference_sq,
                         const OptionalTensor& offsets) {
  const int64_t rows = values.size(0), count = values.size(1);
  Side side{};
  side.values = values.data_ptr<float>();
  side.count = count;
  side.metric = parse("metric", metric, kMetrics);
  if (!is_gram(side.metric)) return side;
  for (const OptionalTensor* part : {&anchors, &references, &anchor_sq, &reference_sq, &offsets})
    TORCH_CHECK_VALUE(part->has_value(), name, ": metric '", metric,
                      "' needs anchors, references, their squared norms and the offsets");
  check_matrix(name, *anchors, values.device().type());
  check_matrix(name, *references, values.device().type());
  side.width = anchors->size(1);
  TORCH_CHECK_VALUE(anchors->size(0) == rows && references->size(0) == count &&
                        references->size(1) == side.width && anchors->device() == values.device() &&
                        references->device() == values.device(),
                    name, ": anchors ", anchors->sizes(), " and references ", references->sizes(),
                    " do not fit values ", values.sizes());
  check_list("anchor_sq", *anchor_sq, values, rows);
  check_list("reference_sq", *reference_sq, values, count);
  check_list("offsets", *offsets, values, rows);
  side.anchors = anchors->const_data_ptr<float>();
  side.references = references->const_data_ptr<float>();
  side.anchor_sq = anchor_sq->const_data_ptr<float>();
  side.reference_sq = reference_sq->const_data_ptr<float>();
  side.offsets = offsets->const_data_ptr<float>();
  return side;
}

// The pairs of `values` that count, null for all, and the place of the first anchor among the
// references.
inline const bool* checked_keep(const OptionalTensor& keep, const Tensor& values, int64_t self_start) {
  TORCH_CHECK_VALUE(self_start < 0 || self_start + values.size(0) <= values.size(1), "self_start ",
                    self_start, " puts an anchor outside the ", values.size(1), " references");
  if (!keep.has_value()) return nullptr;
  check_list("keep", *keep, values, values.numel(), at::kBool);
  TORCH_CHECK_VALUE(keep->sizes() == values.sizes(), "keep must have the shape of the values, ",
                    values.sizes(), ", got ", keep->sizes());
  return keep->const_data_ptr<bool>();
}

// What coherence_rows is given beside the two sides.
inline void check_coherence(const Tensor& student, const Tensor& teacher, const Tensor& weights) {
  TORCH_CHECK_VALUE(student.sizes() == teacher.sizes() && student.device() == teacher.device(),
                    "student ", student.sizes(), " and teacher ", teacher.sizes(),
                    " must have the same shape and device");
  check_list("weights", weights, student, student.size(0));
}

// The operators of a backend, all with its name in front.
inline void define_operators(torch::Library& library, const std::string& backend) {
  const std::string side =
      "str $_metric, Tensor? $_anchors, Tensor? $_references, "
      "Tensor? $_anchor_sq, Tensor? $_reference_sq, Tensor? $_offsets, ";
  const auto side_of = [&](const std::string& name) {
    std::string named = side;
    for (size_t at; (at = named.find('$')) != std::string::npos;) named.replace(at, 1, name);
    return named;
  };
  for (const std::string& schema : {
           std::string("hard_rank(Tensor x) -> Tensor"),
           std::string("soft_rank(Tensor x, float temperature, str relaxation, bool scale_std, "
                       "bool with_grad) -> (Tensor, Tensor)"),
           std::string("soft_rank_backward(Tensor grad_rank, Tensor x, Tensor density, "
                       "float temperature, str relaxation, bool scale_std) -> Tensor"),
           std::string("dissimilarity_(Tensor(a!) values, str metric, Tensor? anchors, "
                       "Tensor? references, Tensor? anchor_sq, Tensor? reference_sq, "
                       "Tensor? offsets) -> ()"),
           std::string("hard_rank_rows_(Tensor(a!) teacher, str metric, Tensor? anchors, "
                       "Tensor? references, Tensor? anchor_sq, Tensor? reference_sq, "
                       "Tensor? offsets, Tensor? keep, int self_start) -> ()"),
           "coherence_rows(Tensor(a!) student, " + side_of("student") + "Tensor(b!) teacher, " +
               side_of("teacher") +
               "Tensor weights, Tensor? keep, int self_start, float temperature, str relaxation, "
               "bool scale_std, str penalty, bool with_grad) -> Tensor",
       })
    library.def((backend + "_" + schema).c_str());
}

}  // namespace pck
