#include "projection.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "../arguments.h"
#include "sort.h"

namespace pck {
namespace {

double log_add(double a, double b) {
  return std::fmax(a, b) + std::log1p(std::exp(-std::fabs(a - b)));
}

// Neighbours that have one value: mean s - mean w, times their number.
struct Mean {
  int64_t first;
  double sum, number;

  Mean() = default;
  Mean(int64_t k, double s, double w) : first(k), sum(s - w), number(1.0) {}
  double value() const { return sum / number; }
  bool ascends_to(const Mean& next) const { return sum * next.number <= next.sum * number; }
  void take_in(const Mean& before) {
    first = before.first;
    sum += before.sum;
    number += before.number;
  }
};

struct LogRatio {
  int64_t first;
  double log_s, log_w;

  LogRatio() = default;
  LogRatio(int64_t k, double s, double w) : first(k), log_s(s), log_w(w) {}
  double value() const { return log_s - log_w; }
  bool ascends_to(const LogRatio& next) const { return value() <= next.value(); }
  void take_in(const LogRatio& before) {
    first = before.first;
    log_s = log_add(log_s, before.log_s);
    log_w = log_add(log_w, before.log_w);
  }
};

// Pools adjacent violators: blocks [count] <- those that are left, their number is returned. Each place
// is put there once and taken in once at most.
template <class Block, class S, class W>
int64_t pool(int64_t count, S s, W w, Block* blocks) {
  int64_t number = 0;
  for (int64_t k = 0; k < count; ++k) {
    Block here(k, s(k), w(k));
    for (; number > 0 && blocks[number - 1].ascends_to(here); --number)
      here.take_in(blocks[number - 1]);
    blocks[number++] = here;
  }
  return number;
}

template <class Block>
void label_blocks(const double* s, const double* w, int64_t count, int64_t* labels) {
  const auto blocks = std::make_unique_for_overwrite<Block[]>(static_cast<size_t>(count));
  const int64_t number =
      pool(count, [=](int64_t k) { return s[k]; }, [=](int64_t k) { return w[k]; }, blocks.get());
  for (int64_t b = 0; b < number; ++b) {
    const int64_t past = b + 1 < number ? blocks[b + 1].first : count;
    std::fill(labels + blocks[b].first, labels + past, blocks[b].first);
  }
}

// Scratch::order <- the points, the largest first, and ::wide <- s at their places, less the largest:
// (x_k - x_0) unit, with gaps closed to `widest`, beyond which nothing is pooled.
void place_descending(const float* x, int64_t count, double unit, double widest, Scratch& scratch) {
  int32_t* const order = scratch.order;
  double* const s = scratch.wide;
  sort_order(x, count, order);
  std::reverse(order, order + count);
  s[0] = 0.0;
  for (int64_t k = 1; k < count; ++k) {
    const double gap = static_cast<double>(x[order[k - 1]]) - x[order[k]];
    s[k] = s[k - 1] - std::min(gap * unit, widest);
  }
}

// The ranks of blocks, in order: `place_of(s - v)` counts from 0.
template <class Block, class W, class PlaceOf>
void rank_blocks(int64_t count, W w, PlaceOf place_of, float* rank, float* label, Scratch& scratch) {
  const auto blocks = std::make_unique_for_overwrite<Block[]>(static_cast<size_t>(count));
  const double* const s = scratch.wide;
  const int64_t number = pool(count, [=](int64_t k) { return s[k]; }, w, blocks.get());
  // Counted from block to block, without a branch where one ends: they are short, and of any length.
  double* const value = scratch.sum;
  int32_t* const begins = scratch.piece;
  std::fill_n(begins, count, 0);
  for (int64_t b = 0; b < number; ++b) {
    value[b] = blocks[b].value();
    begins[blocks[b].first] = 1;
  }
  const double unit = 1.0 / (static_cast<double>(count) - 1.0);
  int64_t block = -1;
  for (int64_t k = 0; k < count; ++k) {
    block += begins[k];
    const int32_t j = scratch.order[k];
    rank[j] = static_cast<float>(std::clamp(place_of(s[k] - value[block]) * unit, 0.0, 1.0));
    if (label != nullptr) label[j] = static_cast<float>(blocks[block].first);
  }
}

}  // namespace

void isotonic_blocks(bool kl, const double* s, const double* w, int64_t count, int64_t* labels) {
  if (kl)
    label_blocks<LogRatio>(s, w, count, labels);
  else
    label_blocks<Mean>(s, w, count, labels);
}

void projected_ranks(bool kl, const float* x, int64_t count, double tau, float* rank, float* label,
                     Scratch& scratch) {
  const double others = static_cast<double>(count) - 1.0;
  if (kl) {
    place_descending(x, count, 1.0 / tau, std::log(count) + 1.0, scratch);
    rank_blocks<LogRatio>(
        count, [=](int64_t k) { return std::log(static_cast<double>(count - k)); },
        [](double log_rank) { return std::exp(log_rank) - 1.0; }, rank, label, scratch);
  } else {
    place_descending(x, count, others / tau, static_cast<double>(count), scratch);
    rank_blocks<Mean>(
        count, [=](int64_t k) { return static_cast<double>(count - 1 - k); },
        [](double place) { return place; }, rank, label, scratch);
  }
}

namespace {

// The block of point j; what is no label, which only a direct caller has, is the first block's.
int64_t block_of(const float* label, int64_t count, int64_t j) {
  return label[j] > 0.0f && label[j] < static_cast<float>(count) ? static_cast<int64_t>(label[j]) : 0;
}

// g_j - mean g of the block.
void mean_gradient(int64_t count, const float* slope, const float* label, float* grad,
                   Scratch& scratch) {
  double *const sum = scratch.sum, *const number = scratch.below;
  std::fill_n(sum, count, 0.0);
  std::fill_n(number, count, 0.0);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t block = block_of(label, count, j);
    sum[block] += slope[j];
    number[block] += 1.0;
  }
  const double others = static_cast<double>(count) - 1.0;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t block = block_of(label, count, j);
    grad[j] = static_cast<float>(others * (slope[j] - sum[block] / number[block]));
  }
}

// R_j (g_j - sum_k R_k g_k / sum_k R_k), with the ranks R from 1 to count: of a block, its sum of the
// ranks shared out by exp(x/tau).
void share_gradient(const float* x, int64_t count, double tau, const float* slope, const float* label,
                    float* grad, Scratch& scratch) {
  double *const top = scratch.wide, *const number = scratch.below;
  double *const total = scratch.sum, *const share = scratch.ramp;
  std::fill_n(top, count, -HUGE_VAL);
  std::fill_n(number, count, 0.0);
  std::fill_n(total, count, 0.0);
  for (int64_t j = 0; j < count; ++j) {
    top[block_of(label, count, j)] = std::fmax(top[block_of(label, count, j)], x[j]);
    number[block_of(label, count, j)] += 1.0;
  }
  for (int64_t j = 0; j < count; ++j) {
    share[j] = std::exp((x[j] - top[block_of(label, count, j)]) / tau);
    total[block_of(label, count, j)] += share[j];
  }
  double* const pull = top;  // read for the last time above
  std::fill_n(pull, count, 0.0);
  for (int64_t j = 0; j < count; ++j) {
    share[j] /= total[block_of(label, count, j)];
    pull[block_of(label, count, j)] += share[j] * slope[j];
  }
  for (int64_t j = 0; j < count; ++j) {
    const int64_t block = block_of(label, count, j);
    const double highest = static_cast<double>(count - block);  // of the block's ranks
    const double ranks = number[block] * (highest - (number[block] - 1.0) / 2.0);
    grad[j] = static_cast<float>(share[j] * ranks * (slope[j] - pull[block]));
  }
}

}  // namespace

void projected_gradient(bool kl, const float* x, int64_t count, double tau, const float* slope,
                        const float* label, float* grad, Scratch& scratch) {
  if (kl)
    share_gradient(x, count, tau, slope, label, grad, scratch);
  else
    mean_gradient(count, slope, label, grad, scratch);
}

namespace {

// Of every row of s and w [rows, count], float64.
Tensor isotonic_blocks_of_rows(const Tensor& s, const Tensor& w, bool kl) {
  PCK_CHECK(s.scalar_type() == ScalarType::Double && s.dim() == 2 && s.is_contiguous(),
            "s must be a contiguous float64 matrix, got ", s.scalar_type(), " ", s.sizes());
  check_list("w", w, s, s.numel(), ScalarType::Double);
  const int64_t count = s.size(1);
  Tensor labels = empty<int64_t>(s, s.sizes());
  const double *const values = s.const_data_ptr<double>(), *const weights = w.const_data_ptr<double>();
  int64_t* const found = labels.mutable_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, 2048 / std::max<int64_t>(count, 1));
  parallel_for(s.size(0), grain, [&](int64_t first, int64_t past) {
    for (int64_t i = first * count; i < past * count; i += count)
      isotonic_blocks(kl, values + i, weights + i, count, found + i);
  });
  return labels;
}

template <class Add>
void visit_operators(Add add) {
  add("cpu_isotonic_blocks(Tensor s, Tensor w, bool kl) -> Tensor",
      Operator<&isotonic_blocks_of_rows>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
