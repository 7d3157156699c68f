// The CPU backend's operators: row kernels over threads.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../operators.h"
#include "isa.h"
#include "kept_memory.h"

namespace pck {
namespace {

struct Cpu {
  static constexpr const char* name = "cpu";
  static constexpr DeviceType device = DeviceType::CPU;
  using Relaxations = pck::Relaxations;

  static Tensor empty_like(const Tensor& x) { return empty_rows(x, x.sizes()); }

  template <class Stage>
  static void run(const Tensor& x, const Stage& stage) {
    run_rows(x.size(0), x.size(1), x.size(1), stage);
  }

  // Rows of this many points on average, and at most.
  template <class Stage>
  static void run_rows(int64_t rows, int64_t count, int64_t most, const Stage& stage) {
    if (rows == 0) return;
    // What a kernel is called for: a row of so many points, or a block of columns.
    int64_t calls = rows, points = count;
    if constexpr (std::is_same_v<Stage, ContrastColumns>) {
      calls = (stage.columns + kColumnBlock - 1) / kColumnBlock;
      points = kColumnBlock * rows;
    }
    // A thread should get at least 2,000 points, some 60 us of work: waking it takes 5 to 10.
    const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(points, 1));
    const RowKernel<Stage>& kernel = row_kernels();
    parallel_for(calls, grain, [&](int64_t first, int64_t last) {
      Scratch scratch(most);
      for (int64_t i = first; i < last; ++i) kernel.run(stage, i, scratch);
    });
  }
};

Tensor empty_rows_like(const Tensor& like, int64_t rows, int64_t columns) {
  PCK_CHECK(like.scalar_type() == ScalarType::Float, "like must be float32, got ", like.scalar_type());
  PCK_CHECK(rows >= 0 && columns >= 0, "rows and columns must be >= 0, got ", rows, " and ", columns);
  return empty_rows(like, {rows, columns});
}

// Float32 on the CPU, [rows, count], or lists one after the other.
Lists checked_lists(const char* name, const Tensor& x, const OptionalTensor& offsets,
                    const OptionalTensor& mask) {
  PCK_CHECK(x.scalar_type() == ScalarType::Float && x.device().is_cpu() && x.is_contiguous() &&
                x.dim() == (offsets.has_value() ? 1 : 2),
            name, " must be contiguous float32 on the CPU, [rows, count], or [all] with offsets; ",
            "got ", x.scalar_type(), " ", x.sizes(), " on ", x.device());
  if (mask.has_value()) check_list(name, *mask, x, x.numel(), ScalarType::Bool);
  const bool* const keep = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  const float* const values = x.const_data_ptr<float>();
  if (!offsets.has_value()) return {values, nullptr, x.size(1), keep};
  check_list(name, *offsets, x, offsets->numel(), ScalarType::Long);
  const int64_t* const at = offsets->const_data_ptr<int64_t>();
  const int64_t lists = offsets->numel() - 1;
  PCK_CHECK(lists >= 0 && at[0] == 0 && at[lists] == x.numel() && std::is_sorted(at, at + lists + 1),
            name, ": offsets must rise from 0 to ", x.numel());
  return {values, at, 0, keep};
}

constexpr int64_t kMostPoints = int64_t{1} << 27;  // their cells are counted in 32 bits

// See stages.h; an empty tensor for each kernel that is not wanted.
std::tuple<Tensor, Tensor, Tensor> kernel_sums(
    const Tensor& sources, const Tensor& queries, const OptionalTensor& weights,
    const OptionalTensor& source_offsets, const OptionalTensor& query_offsets,
    const OptionalTensor& source_mask, const OptionalTensor& query_mask, bool upper, double temperature,
    const std::string& relaxation, const std::vector<bool>& wanted) {
  PCK_CHECK(wanted.size() == 3, "wanted must be 3 bools, got ", wanted.size());
  const Lists x = checked_lists("sources", sources, source_offsets, source_mask);
  const Lists y = checked_lists("queries", queries, query_offsets, query_mask);
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
  const auto sum = [&](bool is_wanted) {
    return is_wanted ? empty_rows(queries, sizes) : empty<float>(queries, {0});
  };
  Tensor density = sum(wanted[0]), cdf = sum(wanted[1]), integral = sum(wanted[2]);
  const auto to = [](const Tensor& sums, bool is_wanted) {
    return is_wanted ? sums.mutable_data_ptr<float>() : nullptr;
  };
  const int64_t points = sources.numel() + queries.numel();
  Cpu::run_rows(
      rows, points / std::max<int64_t>(rows, 1), most,
      KernelSums{x, y, upper, weights.has_value() ? weights->const_data_ptr<float>() : nullptr,
                 channels, sources.numel(), queries.numel(),
                 rank_options(SmoothSteps{}, relaxation, temperature, false), to(density, wanted[0]),
                 to(cdf, wanted[1]), to(integral, wanted[2])});
  return {density, cdf, integral};
}

template <class Add>
void visit_operators(Add add) {
  Operators<Cpu>::visit_all(add);
  add("cpu_empty_rows(Tensor like, int rows, int columns) -> Tensor",
      Operator<&empty_rows_like>::boxed);
  add("cpu_kernel_sums(Tensor sources, Tensor queries, Tensor? weights, Tensor? source_offsets, "
      "Tensor? query_offsets, Tensor? source_mask, Tensor? query_mask, bool upper, "
      "float temperature, str relaxation, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
      Operator<&kernel_sums>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
