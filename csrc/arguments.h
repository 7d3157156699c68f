// What the operators of every compiled backend are given, checked. Python checks what users pass
// (pc_kernels/checks.py); the checks here keep a direct caller of torch.ops from reading out of bounds.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

#include "stages.h"
#include "tensors.h"

namespace pck {

// The code of the table's row with this name.
template <class Table>
int code_of(const char* argument, const std::string& given, Table table) {
  std::optional<int> code;
  std::string allowed;
  for_each(table, [&](auto row) {
    if (given == row.name) code = row.code;
    allowed += std::string(allowed.empty() ? "'" : ", '") + row.name + "'";
  });
  PCK_CHECK(code.has_value(), argument, " must be one of ", allowed, ", got '", given, "'");
  return *code;
}

// `relaxations` are those that the backend has.
template <class Table>
RankOptions rank_options(Table relaxations, const std::string& relaxation, double temperature,
                         bool scale_std, const std::string& penalty = "squared") {
  PCK_CHECK(temperature > 0.0 && std::isfinite(temperature), "temperature must be finite and > 0, got ",
            temperature);
  return {code_of("relaxation", relaxation, relaxations), code_of("penalty", penalty, Penalties{}),
          temperature, scale_std};
}

// A contiguous float32 matrix on a device of this type.
inline void check_matrix(const char* name, const Tensor& x, DeviceType device) {
  PCK_CHECK(x.scalar_type() == ScalarType::Float, name, " must be float32, got ", x.scalar_type());
  PCK_CHECK(x.device().type() == device, name, " must be on the ", Device(device), ", got ",
            x.device());
  PCK_CHECK(x.dim() == 2, name, " must have 2 dimensions, got shape ", x.sizes());
  PCK_CHECK(x.is_contiguous(), name, " must be contiguous");
  PCK_CHECK(x.size(1) < (int64_t{1} << 30), name, " has too many columns: ", x.size(1));
}

// The same shape and device as x.
inline void check_like(const char* name, const Tensor& given, const Tensor& x) {
  check_matrix(name, given, x.device().type());
  PCK_CHECK(given.sizes() == x.sizes() && given.device() == x.device(), name,
            " must have the shape and device of x, ", x.sizes(), " on ", x.device(), ", got ",
            given.sizes(), " on ", given.device());
}

// `count` numbers of a type beside `values`.
inline void check_list(const char* name, const Tensor& list, const Tensor& values, int64_t count,
                       ScalarType type = ScalarType::Float) {
  PCK_CHECK(list.scalar_type() == type && list.device() == values.device() && list.is_contiguous() &&
                list.numel() == count,
            name, " must be ", count, " contiguous ", type, " on ", values.device(), ", got ",
            list.numel(), " ", list.scalar_type(), " on ", list.device());
}

// Float32, [rows, count], or on the CPU, where offsets can be looked at, lists one after the other.
inline Lists checked_lists(const char* name, const Tensor& x, const OptionalTensor& offsets,
                           const OptionalTensor& mask, DeviceType device) {
  const bool* keep = nullptr;
  if (mask.has_value()) {
    check_list(name, *mask, x, x.numel(), ScalarType::Bool);
    keep = mask->const_data_ptr<bool>();
  }
  if (!offsets.has_value()) {
    check_matrix(name, x, device);
    return {x.const_data_ptr<float>(), nullptr, x.size(1), keep};
  }
  PCK_CHECK(
      x.scalar_type() == ScalarType::Float && x.device().is_cpu() && x.is_contiguous() && x.dim() == 1,
      name, " with offsets must be contiguous float32 on the CPU, [all]; got ", x.scalar_type(), " ",
      x.sizes(), " on ", x.device());
  check_list(name, *offsets, x, offsets->numel(), ScalarType::Long);
  const int64_t* const at = offsets->const_data_ptr<int64_t>();
  const int64_t lists = offsets->numel() - 1;
  PCK_CHECK(lists >= 0 && at[0] == 0 && at[lists] == x.numel() && std::is_sorted(at, at + lists + 1),
            name, ": offsets must rise from 0 to ", x.numel());
  return {x.const_data_ptr<float>(), at, 0, keep};
}

// Points [anchors, references], or one matrix that is both.
inline void check_points(const TensorList& points, DeviceType device) {
  PCK_CHECK(points.size() == 1 || points.size() == 2, "points must be 1 or 2 matrices, got ",
            points.size());
  for (const Tensor& x : points) check_matrix("points", x, device);
  PCK_CHECK(points.front().size(1) == points.back().size(1) &&
                points.front().device() == points.back().device(),
            "points must have one width and device, got ", points.front().sizes(), " on ",
            points.front().device(), " and ", points.back().sizes(), " on ", points.back().device());
}

// Weights of pairs, of points x and y: contiguous, or a contiguous matrix's transpose.
inline void check_pull(const Tensor& values, const Tensor& x, const Tensor& y, DeviceType device) {
  check_points({x, y}, device);
  PCK_CHECK(values.dim() == 2 && values.scalar_type() == ScalarType::Float &&
                values.size(0) == x.size(0) && values.size(1) == y.size(0) &&
                values.device() == x.device(),
            "values must be float32 [n, m], x [n, D] and y [m, D], got ", values.sizes(), ", ",
            x.sizes(), " and ", y.sizes());
  const int64_t rows = values.size(0), columns = values.size(1);
  PCK_CHECK(values.is_contiguous() ||
                ((values.stride(0) == 1 || rows == 1) && (values.stride(1) == rows || columns == 1)),
            "values must be contiguous, or their transpose, got strides ", values.strides());
}

// Which of `values` are there.
inline Present checked_present(const OptionalTensor& keep, const Tensor& values,
                               int64_t self_start = -1) {
  PCK_CHECK(self_start < 0 || self_start + values.size(0) <= values.size(1), "self_start ", self_start,
            " puts an anchor outside the ", values.size(1), " references");
  if (!keep.has_value()) return {nullptr, self_start};
  check_list("keep", *keep, values, values.numel(), ScalarType::Bool);
  PCK_CHECK(keep->sizes() == values.sizes(), "keep must have the shape of the values, ", values.sizes(),
            ", got ", keep->sizes());
  return {keep->const_data_ptr<bool>(), self_start};
}

inline Points checked_points(const Tensor& x, const OptionalTensor& keep, DeviceType device) {
  check_matrix("x", x, device);
  return {x.const_data_ptr<float>(), x.size(1), checked_present(keep, x)};
}

inline Logits checked_logits(const Tensor& values, const OptionalTensor& keep, int64_t start,
                             DeviceType device) {
  check_matrix("values", values, device);
  PCK_CHECK(start >= 0 && start + values.size(0) <= values.size(1), "start ", start,
            " puts a positive outside the ", values.size(1), " keys");
  return {values.mutable_data_ptr<float>(), checked_present(keep, values).keep, values.size(1), start};
}

// A chunk of anchors. `gram` holds anchors, references, their squared norms, the offsets, twins and the
// unit where the dissimilarity is one of a Gram matrix, and nothing otherwise.
inline Rows checked_rows(const char* name, const Tensor& values, const std::string& dissimilarity,
                         const TensorList& gram, DeviceType device) {
  check_matrix(name, values, device);
  const int64_t anchors = values.size(0), count = values.size(1);
  const int code = code_of("dissimilarity", dissimilarity, Dissimilarities{});
  PCK_CHECK(gram.size() == (is_gram(code) ? 7 : 0), name, ": dissimilarity '", dissimilarity,
            is_gram(code)
                ? "' needs anchors, references, their squared norms, offsets, twins and the unit"
                : "' needs no tensors beside the values",
            ", got ", gram.size(), " tensors");
  Rows rows{};
  rows.values = values.mutable_data_ptr<float>();
  rows.count = count;
  rows.dissimilarity = code;
  if (!is_gram(code)) return rows;
  check_matrix(name, gram[0], device);
  check_matrix(name, gram[1], device);
  const int64_t width = gram[0].size(1);
  PCK_CHECK(gram[0].size(0) == anchors && gram[1].size(0) == count && gram[1].size(1) == width &&
                gram[0].device() == values.device() && gram[1].device() == values.device(),
            name, ": anchors ", gram[0].sizes(), " and references ", gram[1].sizes(),
            " do not fit values ", values.sizes());
  check_list("anchor_sq", gram[2], values, anchors);
  check_list("reference_sq", gram[3], values, count);
  check_list("offsets", gram[4], values, anchors);
  // Of no elements where it is known that no two references are equal, and that the unit is 1.
  const bool twins = gram[5].numel() > 0, unit = gram[6].numel() > 0;
  if (twins) check_list("twins", gram[5], values, count + 1, ScalarType::Int);
  if (unit) check_list("unit", gram[6], values, 1);
  const auto part = [&](size_t i) { return gram[i].const_data_ptr<float>(); };
  rows.anchors = part(0);
  rows.references = part(1);
  rows.anchor_sq = part(2);
  rows.reference_sq = part(3);
  rows.offsets = part(4);
  rows.twins = twins ? gram[5].const_data_ptr<int32_t>() : nullptr;
  rows.unit = unit ? part(6) : nullptr;
  rows.width = width;
  return rows;
}

}  // namespace pck
