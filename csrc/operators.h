// The operators of a compiled backend: torch tensors in, checked, a stage over all rows, torch tensors
// out. What a backend adds is how it runs rows:
//
//     struct Backend {
//       static constexpr const char* name;             // in front of its operators' names
//       static constexpr DeviceType device;            // of its tensors
//       using Relaxations = List<...>;                 // that its kernels have
//       using Steps = List<...>;                       // those of which it has sums
//       static Tensor empty_rows(const Tensor&, Sizes);   // for results, beside a tensor
//       static void run(const Tensor& x, const Stage&);   // any of stages.h, over the rows of x
//       static void run_rows(const Tensor& x, const RowSizes&, const Stage&);  // over other rows
//     };
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace pck {

inline constexpr int64_t kMostPoints = int64_t{1}
                                       << 27;  // of a row: their cells are counted in 32 bits

template <class Backend>
struct Operators {
  using Relaxations = typename Backend::Relaxations;

  static Tensor hard_rank(const Tensor& x, const OptionalTensor& keep) {
    const Points points = checked_points(x, keep, Backend::device);
    Tensor rank = Backend::empty_rows(x, x.sizes());
    Backend::run(x, HardRank{points, rank.mutable_data_ptr<float>()});
    return rank;
  }

  // Ranks, and with_grad what the backward needs of the forward (else empty).
  static std::tuple<Tensor, Tensor> soft_rank(const Tensor& x, const OptionalTensor& keep,
                                              double temperature, const std::string& relaxation,
                                              bool scale_std, bool with_grad) {
    const Points points = checked_points(x, keep, Backend::device);
    const RankOptions options = rank_options(Relaxations{}, relaxation, temperature, scale_std);
    Tensor rank = Backend::empty_rows(x, x.sizes());
    Tensor density = with_grad ? Backend::empty_rows(x, x.sizes()) : empty<float>(x, {0});
    Backend::run(x, SoftRank{points, options, rank.mutable_data_ptr<float>(),
                             with_grad ? density.mutable_data_ptr<float>() : nullptr});
    return {rank, density};
  }

  static Tensor soft_rank_backward(const Tensor& grad_rank, const Tensor& x, const Tensor& density,
                                   const OptionalTensor& keep, double temperature,
                                   const std::string& relaxation, bool scale_std) {
    const Points points = checked_points(x, keep, Backend::device);
    check_like("grad_rank", grad_rank, x);
    check_like("density", density, x);
    const RankOptions options = rank_options(Relaxations{}, relaxation, temperature, scale_std);
    Tensor grad_x = Backend::empty_rows(x, x.sizes());
    Backend::run(
        x, SoftRankBackward{points, grad_rank.const_data_ptr<float>(), density.const_data_ptr<float>(),
                            options, grad_x.mutable_data_ptr<float>()});
    return grad_x;
  }

  // See stages.h; an empty tensor for each kernel that is not wanted.
  static std::tuple<Tensor, Tensor, Tensor> kernel_sums(
      const Tensor& sources, const Tensor& queries, const OptionalTensor& weights,
      const OptionalTensor& source_offsets, const OptionalTensor& query_offsets,
      const OptionalTensor& source_mask, const OptionalTensor& query_mask, bool upper,
      double temperature, const std::string& relaxation, const std::vector<bool>& wanted) {
    PCK_CHECK(wanted.size() == 3, "wanted must be 3 bools, got ", wanted.size());
    const DeviceType device = Backend::device;
    const Lists x = checked_lists("sources", sources, source_offsets, source_mask, device);
    const Lists y = checked_lists("queries", queries, query_offsets, query_mask, device);
    PCK_CHECK(sources.device() == queries.device(), "sources and queries must be on one device, got ",
              sources.device(), " and ", queries.device());
    const auto rows_of = [](const Tensor& values, const OptionalTensor& offsets) {
      return offsets.has_value() ? offsets->numel() - 1 : values.size(0);
    };
    const int64_t rows = rows_of(sources, source_offsets);
    PCK_CHECK(rows == rows_of(queries, query_offsets), "sources and queries must have as many ",
              "rows, got ", rows, " and ", rows_of(queries, query_offsets));
    const int64_t channels = weights.has_value() ? weights->size(0) : 1;
    if (weights.has_value()) check_list("weights", *weights, sources, channels * sources.numel());
    int64_t most = 0;
    for (int64_t i = 0; i < rows; ++i) most = std::max(most, x.count_of(i) + y.count_of(i));
    PCK_CHECK(most < kMostPoints, "a row has too many sources and queries: ", most);
    std::vector<int64_t> sizes{channels};
    for (const int64_t size : queries.sizes()) sizes.push_back(size);
    TensorList sums;
    float* to[3];
    for (size_t k = 0; k < 3; ++k) {
      sums.push_back(wanted[k] ? Backend::empty_rows(queries, sizes) : empty<float>(queries, {0}));
      to[k] = wanted[k] ? sums[k].mutable_data_ptr<float>() : nullptr;
    }
    const int64_t points = sources.numel() + queries.numel();
    Backend::run_rows(
        queries, {rows, points / std::max<int64_t>(rows, 1), most},
        KernelSums{x, y, upper, weights.has_value() ? weights->const_data_ptr<float>() : nullptr,
                   channels, sources.numel(), queries.numel(),
                   rank_options(typename Backend::Steps{}, relaxation, temperature, false), to[0],
                   to[1], to[2]});
    return {sums[0], sums[1], sums[2]};
  }

  static void dissimilarity_(Tensor values, const std::string& dissimilarity, const TensorList& gram) {
    Backend::run(values, DissimilarityRows{
                             checked_rows("values", values, dissimilarity, gram, Backend::device)});
  }

  static void hard_rank_rows_(Tensor teacher, const std::string& dissimilarity, const TensorList& gram,
                              const OptionalTensor& keep, int64_t self_start) {
    const Rows rows = checked_rows("teacher", teacher, dissimilarity, gram, Backend::device);
    Backend::run(teacher, HardRankRows{rows, checked_present(keep, teacher, self_start)});
  }

  static Tensor coherence_rows(Tensor student, const std::string& student_dissimilarity,
                               const TensorList& student_gram, Tensor teacher,
                               const std::string& teacher_dissimilarity, const TensorList& teacher_gram,
                               const Tensor& weights, const OptionalTensor& keep, int64_t self_start,
                               double temperature, const std::string& relaxation, bool scale_std,
                               const std::string& penalty, bool with_grad) {
    const Rows student_rows =
        checked_rows("student", student, student_dissimilarity, student_gram, Backend::device);
    const Rows teacher_rows =
        checked_rows("teacher", teacher, teacher_dissimilarity, teacher_gram, Backend::device);
    PCK_CHECK(student.sizes() == teacher.sizes() && student.device() == teacher.device(), "student ",
              student.sizes(), " and teacher ", teacher.sizes(),
              " must have the same shape and device");
    check_list("weights", weights, student, student.size(0));
    const Present present = checked_present(keep, student, self_start);
    const RankOptions options =
        rank_options(Relaxations{}, relaxation, temperature, scale_std, penalty);
    Tensor losses = empty<float>(student, {student.size(0)});
    Backend::run(student,
                 CoherenceRows{student_rows, teacher_rows, present, weights.const_data_ptr<float>(),
                               options, with_grad, losses.mutable_data_ptr<float>()});
    return losses;
  }

  static void contrast_columns_(Tensor values, const OptionalTensor& keep, int64_t start, Tensor top,
                                Tensor total, Tensor positive) {
    const Logits logits = checked_logits(values, keep, start, Backend::device);
    const int64_t columns = top.numel();
    PCK_CHECK(columns <= logits.count && start + values.size(0) <= columns, columns,
              " columns do not fit values ", values.sizes(), " from key ", start, " on");
    check_list("top", top, values, columns);
    check_list("total", total, values, columns, ScalarType::Double);
    check_list("positive", positive, values, columns, ScalarType::Double);
    Backend::run(
        values, ContrastColumns{logits, values.size(0), columns, top.mutable_data_ptr<float>(),
                                total.mutable_data_ptr<double>(), positive.mutable_data_ptr<double>()});
  }

  static Tensor contrast_rows(Tensor values, const OptionalTensor& keep, int64_t start,
                              const OptionalTensor& target, const TensorList& columns,
                              const Tensor& weights, const std::string& form, bool with_grad) {
    const Logits logits = checked_logits(values, keep, start, Backend::device);
    ContrastRows stage{logits, nullptr, 0, nullptr, nullptr, nullptr, nullptr, 0, with_grad, nullptr};
    stage.form = code_of("form", form, ContrastForms{});
    const bool has_target =
        visit(ContrastForms{}, stage.form, [](auto row) { return decltype(row)::has_target; });
    PCK_CHECK(has_target == target.has_value(), "form '", form,
              has_target ? "' needs a target" : "' has no target");
    if (has_target) {
      check_like("target", *target, values);
      stage.target = target->mutable_data_ptr<float>();
    }
    PCK_CHECK(columns.size() == 0 || (columns.size() == 3 && stage.form == Softmax::code),
              "columns are shift, factor and own, of form 'softmax', or none; got ", columns.size());
    if (columns.size() == 3) {
      stage.columns = columns[0].numel();
      PCK_CHECK(stage.columns <= logits.count, stage.columns, " columns do not fit values ",
                values.sizes());
      check_list("shift", columns[0], values, stage.columns);
      check_list("factor", columns[1], values, stage.columns);
      check_list("own", columns[2], values, values.size(0));
      stage.shift = columns[0].const_data_ptr<float>();
      stage.factor = columns[1].const_data_ptr<float>();
      stage.own = columns[2].const_data_ptr<float>();
    }
    check_list("weights", weights, values, values.size(0));
    stage.weights = weights.const_data_ptr<float>();
    Tensor losses = empty<float>(values, {values.size(0)});
    stage.losses = losses.mutable_data_ptr<float>();
    Backend::run(values, stage);
    return losses;
  }

  // add(schema, boxed function) for each.
  template <class Add>
  static void visit_all(Add add_named) {
    const auto add = [&](const char* schema, auto boxed) {
      add_named(std::string(Backend::name) + "_" + schema, boxed);
    };
    add("hard_rank(Tensor x, Tensor? keep) -> Tensor", Operator<&hard_rank>::boxed);
    add("soft_rank(Tensor x, Tensor? keep, float temperature, str relaxation, bool scale_std, "
        "bool with_grad) -> (Tensor, Tensor)",
        Operator<&soft_rank>::boxed);
    add("soft_rank_backward(Tensor grad_rank, Tensor x, Tensor density, Tensor? keep, "
        "float temperature, str relaxation, bool scale_std) -> Tensor",
        Operator<&soft_rank_backward>::boxed);
    add("kernel_sums(Tensor sources, Tensor queries, Tensor? weights, Tensor? source_offsets, "
        "Tensor? query_offsets, Tensor? source_mask, Tensor? query_mask, bool upper, "
        "float temperature, str relaxation, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
        Operator<&kernel_sums>::boxed);
    add("dissimilarity_(Tensor(a!) values, str dissimilarity, Tensor[] gram) -> ()",
        Operator<&dissimilarity_>::boxed);
    add("hard_rank_rows_(Tensor(a!) teacher, str dissimilarity, Tensor[] gram, Tensor? keep, "
        "int self_start) -> ()",
        Operator<&hard_rank_rows_>::boxed);
    add("coherence_rows(Tensor(a!) student, str student_dissimilarity, Tensor[] student_gram, "
        "Tensor(b!) teacher, str teacher_dissimilarity, Tensor[] teacher_gram, Tensor weights, "
        "Tensor? keep, int self_start, float temperature, str relaxation, bool scale_std, "
        "str penalty, bool with_grad) -> Tensor",
        Operator<&coherence_rows>::boxed);
    add("contrast_columns_(Tensor(a!) values, Tensor? keep, int start, Tensor(b!) top, "
        "Tensor(c!) total, Tensor(d!) positive) -> ()",
        Operator<&contrast_columns_>::boxed);
    add("contrast_rows(Tensor(a!) values, Tensor? keep, int start, Tensor(b!)? target, "
        "Tensor[] columns, Tensor weights, str form, bool with_grad) -> Tensor",
        Operator<&contrast_rows>::boxed);
  }
};

}  // namespace pck
