#include "points.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../points.h"
#include "isa.h"
#include "mirror.h"

namespace pck {
namespace {

// What is worth waking another thread for.
constexpr int64_t kGrainElements = 1 << 15;
constexpr int64_t kGrainLooked = 1 << 17;  // by the one pass that is made of vectors

// A contiguous matrix, [rows, width].
struct Matrix {
  const float* values;
  int64_t rows, width;

  explicit Matrix(const Tensor& x)
      : values(x.const_data_ptr<float>()), rows(x.size(0)), width(x.size(1)) {}
  Matrix(const float* values, int64_t rows, int64_t width) : values(values), rows(rows), width(width) {}

  const float* row(int64_t i) const { return values + i * width; }
};

// body(block, first row, past the last row)
template <class Body>
void for_blocks(int64_t rows, int64_t width, Body body) {
  const int64_t blocks = (rows + kPointBlock - 1) / kPointBlock;
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, kPointBlock * width));
  parallel_for(blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b)
      body(b, b * kPointBlock, std::min(rows, (b + 1) * kPointBlock));
  });
}

// For every column the sum over rows of term(x, column): in float within a block, whose loop vectors
// are made of, in double from block to block.
template <class Term>
std::vector<double> column_sums(const Matrix& x, Term term) {
  const int64_t rows = x.rows, width = x.width;
  const int64_t blocks = (rows + kPointBlock - 1) / kPointBlock;
  std::vector<float> partial(static_cast<size_t>(blocks * width), 0.0f);
  for_blocks(rows, width, [&](int64_t b, int64_t first, int64_t past) {
    float* const own = partial.data() + b * width;
    for (int64_t i = first; i < past; ++i)
      for (int64_t c = 0; c < width; ++c) own[c] += term(x.row(i)[c], c);
  });
  std::vector<double> sums(width, 0.0);
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t c = 0; c < width; ++c) sums[c] += partial[b * width + c];
  return sums;
}

// What one pass over points finds.
struct Found {
  float largest;                     // |x|; a NaN may go unseen
  std::vector<double> sums, powers;  // of every column, of x and x^2
  Tensor squares;                    // norms
};

Found look_at(const Tensor& points) {
  const Matrix x(points);
  const int64_t blocks = (x.rows + kPointBlock - 1) / kPointBlock;
  std::vector<float> largest(blocks), sums(blocks * x.width), powers(blocks * x.width);
  Found found{0.0f, std::vector<double>(x.width), std::vector<double>(x.width),
              empty<float>(points, {x.rows})};
  const PointSums stage{x.values,
                        x.rows,
                        x.width,
                        largest.data(),
                        sums.data(),
                        powers.data(),
                        found.squares.mutable_data_ptr<float>()};
  const RowKernel<PointSums>& kernel = row_kernels();
  const int64_t grain = kGrainLooked / (kPointBlock * std::max<int64_t>(1, x.width)) + 1;
  parallel_for(blocks, grain, [&](int64_t first, int64_t past) {
    Scratch scratch(0);
    for (int64_t b = first; b < past; ++b) kernel.run(stage, b, scratch);
  });
  for (int64_t b = 0; b < blocks; ++b) {
    found.largest = std::fmax(found.largest, largest[b]);
    for (int64_t c = 0; c < x.width; ++c) {
      found.sums[c] += sums[b * x.width + c];
      found.powers[c] += powers[b * x.width + c];
    }
  }
  return found;
}

float largest_of(const std::vector<Found>& found) {
  float largest = 0.0f;
  for (const Found& points : found) largest = std::fmax(largest, points.largest);
  return largest;
}

// How far each feature is shifted. Empty where the points are centred already.
std::vector<float> shift_of(const Matrix& references, const Found& found) {
  const int64_t width = references.width;
  const double count = static_cast<double>(references.rows);
  std::vector<double> mean = found.sums;
  bool off_centre = false;
  for (int64_t c = 0; c < width; ++c) {
    mean[c] /= count;
    off_centre |= mean[c] * mean[c] * 2.0 >= found.powers[c] / count;
  }
  if (!off_centre) return {};
  const std::vector<float> middle(mean.begin(), mean.end());
  const std::vector<double> squares = column_sums(references, [&](float v, int64_t c) {
    const float deviation = v - middle[c];
    return deviation * deviation;
  });
  std::vector<float> shift(width);
  for (int64_t c = 0; c < width; ++c) shift[c] = rounded_shift(mean[c], std::sqrt(squares[c] / count));
  return shift;
}

// Takes back the shifts that would cost a digit of some point.
void keep_exact(const TensorList& points, std::vector<float>& shift) {
  for (const Tensor& x : points) {
    const std::vector<double> inexact = column_sums(Matrix(x), [&](float v, int64_t c) {
      const float moved = v - shift[c];
      return moved + shift[c] == v ? 0.0f : 1.0f;
    });
    for (size_t c = 0; c < shift.size(); ++c)
      if (inexact[c] > 0.0) shift[c] = 0.0f;
  }
}

// f(value, column) of every value.
template <class F>
Tensor mapped(const Tensor& x, F f) {
  const Matrix from(x);
  Tensor made = empty<float>(x, x.sizes());
  float* const to = made.mutable_data_ptr<float>();
  for_blocks(from.rows, from.width, [&](int64_t, int64_t first, int64_t past) {
    for (int64_t i = first; i < past; ++i)
      for (int64_t c = 0; c < from.width; ++c) to[i * from.width + c] = f(from.row(i)[c], c);
  });
  return made;
}

// sum_k term(x_k): strips of float sums, which vectors are made of, added up in double.
template <class Term>
double strip_sum(const float* x, int64_t count, Term term) {
  constexpr int64_t lanes = 16, strip = 16 * lanes;
  double total = 0.0;
  for (int64_t from = 0; from < count; from += strip) {
    const int64_t to = std::min(count, from + strip), whole = from + (to - from) / lanes * lanes;
    float partial[lanes] = {};
    for (int64_t k = from; k < whole; k += lanes)
      for (int64_t l = 0; l < lanes; ++l) partial[l] += term(x[k + l]);
    for (int64_t k = whole; k < to; ++k) partial[k - whole] += term(x[k]);
    for (const float part : partial) total += part;
  }
  return total;
}

double sum_of_squares(const float* x, int64_t count) {
  return strip_sum(x, count, [](float v) { return v * v; });
}

// |a| of the anchors whose |a|^2 is more than `far` times the median of the references', else 0.
Tensor far_offsets(const Tensor& anchor_sq, const Tensor& reference_sq, double far) {
  Tensor offsets = empty<float>(anchor_sq, anchor_sq.sizes());
  const float* const squares = reference_sq.const_data_ptr<float>();
  std::vector<float> sorted(squares, squares + reference_sq.numel());
  const bool defined = std::none_of(sorted.begin(), sorted.end(), [](float v) { return v != v; });
  float threshold = INFINITY;
  if (!sorted.empty() && defined) {
    const auto middle = sorted.begin() + static_cast<int64_t>(sorted.size() - 1) / 2;
    std::nth_element(sorted.begin(), middle, sorted.end());
    threshold = static_cast<float>(far) * *middle;
  }
  const float* const own = anchor_sq.const_data_ptr<float>();
  float* const target = offsets.mutable_data_ptr<float>();
  for (int64_t i = 0; i < anchor_sq.numel(); ++i)
    target[i] = own[i] > threshold ? std::sqrt(own[i]) : 0.0f;
  return offsets;
}

// The first point that equals each bit for bit, then how many are not that themselves; empty if none
// is.
Tensor twins_of(const Tensor& points, const Tensor& squares) {
  const Matrix x(points);
  const size_t bytes = static_cast<size_t>(x.width) * sizeof(float);
  const float* const square = squares.const_data_ptr<float>();
  const auto compare = [&](int64_t a, int64_t b) { return std::memcmp(x.row(a), x.row(b), bytes); };
  // Twins have the same norm: few others do, and only these are compared.
  std::vector<std::pair<uint32_t, int32_t>> order(static_cast<size_t>(x.rows));
  for (size_t i = 0; i < order.size(); ++i) {
    std::memcpy(&order[i].first, square + i, sizeof(float));
    order[i].second = static_cast<int32_t>(i);
  }
  std::sort(order.begin(), order.end());
  std::vector<std::pair<int32_t, int32_t>> later;  // than the first that it equals
  for (auto run = order.begin(), past = run; run != order.end(); run = past) {
    past = std::find_if(run, order.end(), [=](const auto& p) { return p.first != run->first; });
    if (past - run == 1) continue;
    std::stable_sort(run, past,
                     [&](const auto& a, const auto& b) { return compare(a.second, b.second) < 0; });
    int32_t first = run->second;
    for (auto p = run + 1; p != past; ++p) {
      if (compare(first, p->second) == 0)
        later.emplace_back(p->second, first);
      else
        first = p->second;
    }
  }
  Tensor twins = empty<int32_t>(points, {later.empty() ? 0 : x.rows + 1});
  if (later.empty()) return twins;
  int32_t* const target = twins.mutable_data_ptr<int32_t>();
  std::iota(target, target + x.rows, 0);
  for (const auto& [own, first] : later) target[own] = first;
  target[x.rows] = static_cast<int32_t>(later.size());
  return twins;
}

}  // namespace

Tensor divided(const Tensor& x, float unit) {
  return mapped(x, [=](float v, int64_t) { return v / unit; });
}

NearOrigin near_origin(TensorList points, double far) {
  check_points(points, DeviceType::CPU);
  std::vector<Found> found;
  const auto look = [&] {
    found.clear();
    for (const Tensor& x : points) found.push_back(look_at(x));
  };
  look();
  const float unit = points.back().numel() == 0 ? 1.0f : unit_of(largest_of(found));
  bool moved = unit != 1.0f;
  if (moved) {
    for (Tensor& x : points) x = divided(x, unit);
    look();
  }
  if (points.back().size(0) > 0) {
    std::vector<float> shift = shift_of(Matrix(points.back()), found.back());
    if (!shift.empty()) keep_exact(points, shift);
    if (std::any_of(shift.begin(), shift.end(), [](float v) { return v != 0.0f; })) {
      moved = true;
      for (Tensor& x : points) x = mapped(x, [&](float v, int64_t c) { return v - shift[c]; });
      look();
    }
  }
  TensorList squares;
  for (const Found& of : found) squares.push_back(of.squares);
  Tensor offsets = far_offsets(squares.front(), squares.back(), far);
  Tensor twins = twins_of(points.back(), squares.back());
  if (!moved) points.clear();
  return {points, squares, offsets, twins, unit};
}

Tensor with_mirror(Tensor values) {
  check_matrix("values", values, DeviceType::CPU);
  PCK_CHECK(values.size(0) == values.size(1), "values must be square, got ", values.sizes());
  add_mirror({values.mutable_data_ptr<float>(), values.size(0), values.size(1)});
  return values;
}

namespace {

// Rows v_i of a matrix that is contiguous, or a contiguous one's transpose.
struct Weights {
  Matrix stored;
  bool turned;
  int64_t row, column;  // strides

  explicit Weights(const Tensor& v) : stored(v), turned(!v.is_contiguous()) {
    const int64_t rows = v.size(0), columns = v.size(1);
    if (turned) stored = Matrix(stored.values, columns, rows);
    row = turned ? 1 : columns;
    column = turned ? rows : 1;
  }

  // Of every row the sum, and the sum of squares.
  std::pair<std::vector<double>, std::vector<double>> sums() const {
    if (turned)
      return {column_sums(stored, [](float v, int64_t) { return v; }),
              column_sums(stored, [](float v, int64_t) { return v * v; })};
    std::vector<double> sum(stored.rows), squares(stored.rows);
    for_blocks(stored.rows, stored.width, [&](int64_t, int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i) {
        sum[i] = strip_sum(stored.row(i), stored.width, [](float value) { return value; });
        squares[i] = sum_of_squares(stored.row(i), stored.width);
      }
    });
    return {sum, squares};
  }
};

}  // namespace

Tensor pull(const Tensor& values, const Tensor& x, const Tensor& y, int64_t few_pairs,
            double cancelled) {
  check_pull(values, x, y, DeviceType::CPU);
  const Weights weights(values);
  const int64_t n = x.size(0), width = x.size(1);
  const float* const v = weights.stored.values;
  const float* const own = x.const_data_ptr<float>();
  Tensor pulled = empty<float>(x, x.sizes());
  float* const target = pulled.mutable_data_ptr<float>();
  const bool few = n * y.size(0) <= few_pairs;
  std::vector<double> squares;
  if (!few) {
    std::vector<double> sum;
    std::tie(sum, squares) = weights.sums();
    for_blocks(n, width, [&](int64_t, int64_t first, int64_t past) {
      for (int64_t i = first; i < past; ++i)
        for (int64_t c = 0; c < width; ++c)
          target[i * width + c] = static_cast<float>(sum[i]) * own[i * width + c];
    });
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(pulled.get(), pulled.get(), values.get(), y.get(), 1.0, -1.0));
  }
  const PullRows rows{v,         weights.row, weights.column, own, y.const_data_ptr<float>(),
                      y.size(0), width,       target};
  const RowKernel<PullRows>& kernel = row_kernels();
  for_blocks(n, width, [&](int64_t, int64_t first, int64_t past) {
    Scratch scratch(0);
    for (int64_t i = first; i < past; ++i) {
      const auto terms = [&] {
        return cancelled * cancelled * squares[i] * sum_of_squares(own + i * width, width);
      };
      if (few || sum_of_squares(target + i * width, width) < terms()) kernel.run(rows, i, scratch);
    }
  });
  return pulled;
}

namespace {

template <class Add>
void visit_operators(Add add) {
  add("cpu_near_origin(Tensor[] points, float far) -> (Tensor[], Tensor[], Tensor, Tensor, float)",
      Operator<&near_origin>::boxed);
  add("cpu_with_mirror(Tensor(a!) values) -> Tensor(a!)", Operator<&with_mirror>::boxed);
  add("cpu_pull(Tensor values, Tensor x, Tensor y, int few_pairs, float cancelled) -> Tensor",
      Operator<&pull>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
