// Stages `contrast_columns` and `contrast_rows`: the logits of one anchor, log-sum-exp -> loss ->
// slope. The formulas are in pc_kernels/backends/contrast_rows.py.
#include <cmath>

#include "launch.cuh"

namespace pck::cuda {
namespace {

// In place of a logit that is absent, or of the positive among the negatives.
constexpr float kNone = -INFINITY;

// A row of logits; a `positive` of -1: none is special.
struct LogitRow {
  float* z;
  const bool* keep;
  int count;
  int positive;

  PCK_DEVICE bool is_there(int j) const { return keep == nullptr || keep[j]; }
  PCK_DEVICE float negative(int j, float value) const {
    return j == positive || !is_there(j) ? kNone : value;
  }
};

// Of the exponentials of a row's negatives: `top`, what was subtracted, is the largest, 0 if there is
// none.
struct Exponentials {
  float top;
  double total;
  bool finite;
};

PCK_DEVICE Exponentials exponentials(Block& block, const LogitRow& row) {
  float top = kNone;
  int unfit = 0;
  block.each_value(row.z, row.count, [&](int j, float value) {
    const float z = row.negative(j, value);
    if (j != row.positive && row.is_there(j) && !std::isfinite(z)) unfit = 1;
    top = std::fmax(top, z);
  });
  top = block.reduce(top, Largest{});
  unfit = block.reduce(unfit, Largest{});
  if (top == kNone) return {0.0f, 0.0, unfit == 0};
  double total = 0.0;
  block.each_value(row.z, row.count, [&](int j, float value) {
    total += static_cast<double>(std::exp(row.negative(j, value) - top));
  });
  return {top, block.reduce(total, Sum{}), unfit == 0};
}

// row <- slope(j) where something is there, 0 elsewhere; NaN throughout a row that is not finite.
template <class Slope>
PCK_DEVICE void store_slopes(Block& block, const LogitRow& row, bool finite, Slope slope) {
  block.store_values(row.z, row.count, [&](int j) {
    if (!row.is_there(j)) return 0.0f;
    return finite ? slope(j) : NAN;
  });
}

PCK_DEVICE double softmax_row(Block& block, const ContrastRows& stage, int64_t i, const LogitRow& row,
                              double positive) {
  const Exponentials sums = exponentials(block, row);
  const bool finite = sums.finite && positive == positive;
  const double margin = sums.top - positive + std::log(sums.total);
  if (stage.with_grad) {
    const double pull = stage.weights[i] * softplus_slope(margin);
    const float rate = sums.total > 0.0 ? static_cast<float>(pull / sums.total) : 0.0f;
    const float own = static_cast<float>(-pull) + (stage.columns > 0 ? stage.own[i] : 0.0f);
    const int columns = static_cast<int>(stage.columns);
    store_slopes(block, row, finite, [&](int j) {
      if (j == row.positive) return own;
      const float z = row.z[j];
      const float slope = std::exp(z - sums.top) * rate;
      return j < columns ? slope + std::exp(z - stage.shift[j]) * stage.factor[j] : slope;
    });
  }
  return finite ? softplus(margin) : NAN;
}

PCK_DEVICE double sigmoid_row(Block& block, const ContrastRows& stage, int64_t i, const LogitRow& row,
                              double positive) {
  int unfit = positive != positive;
  double total = 0.0;
  block.each_value(row.z, row.count, [&](int j, float value) {
    const float z = row.negative(j, value);
    if (j != row.positive && row.is_there(j) && !std::isfinite(z)) unfit = 1;
    total += static_cast<double>(std::fmax(z, 0.0f) + std::log1p(std::exp(-std::fabs(z))));
  });
  total = block.reduce(total, Sum{});
  const bool finite = block.reduce(unfit, Largest{}) == 0;
  if (stage.with_grad) {
    const float weight = stage.weights[i];
    const float own = static_cast<float>(-weight * softplus_slope(-positive));
    store_slopes(block, row, finite, [&](int j) {
      if (j == row.positive) return own;
      const float z = row.z[j], e = std::exp(-std::fabs(z));
      return weight * (z > 0.0f ? 1.0f : e) / (1.0f + e);
    });
  }
  return finite ? total + softplus(-positive) : NAN;
}

PCK_DEVICE double distillation_row(Block& block, const ContrastRows& stage, int64_t i,
                                   const LogitRow& row, const LogitRow& target) {
  const Exponentials student = exponentials(block, row), teacher = exponentials(block, target);
  const bool finite = student.finite && teacher.finite;
  const double of_student = std::fmax(student.total, 1.0), of_teacher = std::fmax(teacher.total, 1.0);
  double ahead = 0.0;
  block.each_value(row.z, row.count, [&](int j, float value) {
    if (!row.is_there(j)) return;
    const float z = value - student.top, y = target.z[j] - teacher.top, t = std::exp(y);
    if (t > 0.0f) ahead += static_cast<double>(t * (y - z));
  });
  ahead = block.reduce(ahead, Sum{});
  if (stage.with_grad) {
    const float rate = static_cast<float>(stage.weights[i] / of_student);
    const float target_rate = static_cast<float>(stage.weights[i] / of_teacher);
    store_slopes(block, row, finite, [&](int j) {
      return std::exp(row.z[j] - student.top) * rate -
             std::exp(target.z[j] - teacher.top) * target_rate;
    });
  }
  const double loss = ahead / of_teacher + std::log(of_student / of_teacher);
  return finite ? std::fmax(loss, 0.0) : NAN;
}

}  // namespace

PCK_DEVICE void run_row(Block& block, const ContrastRows& stage, int64_t i, NoTaps, Header&,
                        const Scratch&) {
  const Logits& logits = stage.logits;
  const int count = static_cast<int>(logits.count);
  LogitRow row{logits.row(i), logits.keep_of(i), count, -1};
  double loss;
  if (stage.form == Distillation::code) {
    loss = distillation_row(block, stage, i, row, {stage.target + i * count, row.keep, count, -1});
  } else {
    row.positive = static_cast<int>(logits.start + i);
    double positive = INFINITY;  // an absent one pulls nothing
    if (row.is_there(row.positive)) {
      const float z = row.z[row.positive];
      positive = std::isfinite(z) ? z : NAN;
    }
    loss = stage.form == Sigmoid::code ? sigmoid_row(block, stage, i, row, positive)
                                       : softmax_row(block, stage, i, row, positive);
  }
  if (block.thread() == 0) stage.losses[i] = static_cast<float>(loss);
}

// A column a thread, so that neighbouring threads read neighbouring logits: `call` says which columns.
PCK_DEVICE void run_row(Block& block, const ContrastColumns& stage, int64_t call, NoTaps, Header&,
                        const Scratch&) {
  const int64_t j = call * block.threads() + block.thread();
  if (j >= stage.columns) return;
  float top = stage.top[j];
  double total = stage.total[j];
  for (int64_t i = 0; i < stage.anchors; ++i) {
    const float z = stage.logits.row(i)[j];
    const bool there = stage.logits.is_there(i, j);
    if (stage.logits.start + i == j)
      stage.positive[j] = there ? z : INFINITY;
    else if (there) {
      const float higher = z > top ? z : top;
      const float base = higher == kNone ? 0.0f : higher;
      total =
          total * static_cast<double>(std::exp(top - base)) + static_cast<double>(std::exp(z - base));
      top = higher;
    }
  }
  stage.top[j] = top;
  stage.total[j] = total;
}

static int64_t calls_of(const Launch& launch, const ContrastColumns& stage) {
  return (stage.columns + launch.threads - 1) / launch.threads;
}

template cudaError_t run(const Launch&, const ContrastColumns&);
template cudaError_t run(const Launch&, const ContrastRows&);

}  // namespace pck::cuda
