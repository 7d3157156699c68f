// The stages and what they are given, in every compiled backend: rows in memory, which of their values
// are there, and how they are ranked. No torch headers.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace pck {

struct RankOptions {
  int relaxation;  // a code of Relaxations, in CUDA of GridRelaxations
  int penalty;     // a code of Penalties
  double temperature;
  bool scale_std;

  PCK_HD bool known() const {  // to the CUDA kernels
    return has_code(GridRelaxations{}, relaxation) && has_code(Penalties{}, penalty);
  }
};

// Which values of a chunk's rows are there: not those where `keep` is false, nor an anchor itself.
struct Present {
  const bool* keep;    // [rows, count]; null: all
  int64_t self_start;  // anchor i is reference self_start + i; -1: it is none of them

  PCK_HD const bool* keep_of(int64_t i, int64_t count) const {
    return keep == nullptr ? nullptr : keep + i * count;
  }
  PCK_HD int64_t self_of(int64_t i) const { return self_start < 0 ? -1 : self_start + i; }
};

// One anchor against `count` references. Where the dissimilarity is one of a Gram matrix, `values`
// holds the inner products of the anchor with the references, and the other fields hold what turns
// them into squared distances.
struct Row {
  float* values;              // [count]
  const float* anchor;        // [width]
  const float* references;    // [count, width]
  const float* reference_sq;  // [count]
  const int32_t* twins;       // see Rows
  float anchor_sq;
  float offset;  // the anchor's distance from the origin if it is far from all others, else 0
  int64_t count;
  int64_t width;
  int64_t self;  // the anchor's own place among the references, -1 if it has none
  int dissimilarity;

  PCK_HD bool is_far() const { return offset > 0.0f; }
  PCK_HD bool has_twins() const { return twins != nullptr && twins[count] > 0; }
  // |a - b|^2 of the inner product with reference j; of a far anchor, less |a|^2 (see formulas.h).
  PCK_HD float squared(int64_t j, float product) const {
    return (is_far() ? reference_sq[j] : anchor_sq + reference_sq[j]) - 2.0f * product;
  }
  // Whether such a squared distance has lost its digits, see kNear.
  PCK_HD bool is_near(int64_t j, float squared) const {
    return (is_far() ? anchor_sq + squared : squared) < kNear * (anchor_sq + reference_sq[j]);
  }
};

// A chunk of anchors, of the student or the teacher. Without a Gram matrix, only values, count and
// dissimilarity.
struct Rows {
  float* values;            // [anchors, count]
  const float* anchors;     // [anchors, width]
  const float* references;  // [count, width]
  const float* anchor_sq;
  const float* reference_sq;
  const float* offsets;
  // [count + 1]: the first reference that equals each bit for bit, then how many are not that
  // themselves. These take its product: a product of matrices may round equal columns differently.
  // Null: none are.
  const int32_t* twins;
  const float* unit;  // [1], of the features; null: 1
  int64_t count;
  int64_t width;
  int dissimilarity;  // a code of Dissimilarities

  PCK_HD bool known() const { return has_code(Dissimilarities{}, dissimilarity); }
  PCK_HD Row row(int64_t i, int64_t self) const {
    float* const own = values + i * count;
    if (!is_gram(dissimilarity))
      return {own, nullptr, nullptr, nullptr, nullptr, 0.0f, 0.0f, count, 0, self, dissimilarity};
    return {own,          anchors + i * width, references, reference_sq, twins,
            anchor_sq[i], offsets[i],          count,      width,        self,
            dissimilarity};
  }
  // Options for these dissimilarities, which are in units of their own.
  PCK_HD RankOptions in_units(RankOptions options) const {
    if (options.scale_std || unit == nullptr) return options;
    const int power = visit(Dissimilarities{}, dissimilarity, PowerOf{});
    for (int k = 0; k < power; ++k) options.temperature /= *unit;
    return options;
  }
};

// Rows that are ranked as they are.
struct Points {
  const float* x;  // [rows, count]
  int64_t count;
  Present present;
};

// Rows of values: `count` of them each, or lists one after the other that `offsets` cuts out.
struct Lists {
  const float* x;
  const int64_t* offsets;  // [rows + 1]; null: rows of `count`
  int64_t count;
  const bool* keep;  // like x; null: all are there

  PCK_HD int64_t first(int64_t i) const { return offsets == nullptr ? i * count : offsets[i]; }
  PCK_HD int64_t count_of(int64_t i) const { return first(i + 1) - first(i); }
};

// So many rows of this many points on average, and at most.
struct RowSizes {
  int64_t rows, count, most;
};

// The stages. An absent value has rank, density and gradient 0. In a row whose ranks are not defined,
// the results of all values that are there are NaN.

struct HardRank {
  Points points;
  float* rank;  // [rows, count], in [0, 1]
};

struct SoftRank {
  Points points;
  RankOptions options;
  float* rank;
  float* density;  // what the backward needs of the forward; null: not wanted
};

// grad_x = sum_j grad_rank_j d rank_j / d x.
struct SoftRankBackward {
  Points points;
  const float* grad_rank;
  const float* density;
  RankOptions options;
  float* grad_x;
};

// sum_k weight_k K((y_j - x_k)/tau) of sources x at queries y, for the kernels K that are wanted, each
// the derivative of the next.
struct KernelSums {
  Lists sources, queries;
  bool upper;            // K((x_k - y_j)/tau) instead
  const float* weights;  // [channels, all sources]; null: one channel of ones
  int64_t channels;
  int64_t all_sources, all_queries;  // of all rows
  RankOptions options;
  float* density;  // [channels, all queries] each; null: not wanted
  float* cdf;
  float* integral;
};

// Dissimilarities, in place.
struct DissimilarityRows {
  Rows rows;
};

// The ranks of a teacher of several students, in place.
struct HardRankRows {
  Rows teacher;
  Present present;
};

// An anchor's whole chain, dissimilarity -> rank -> loss -> gradient.
struct CoherenceRows {
  Rows student;  // with_grad: weight times V, see formulas.h, replaces its values
  Rows teacher;  // its values may be overwritten, unless they are ranks
  Present present;
  const float* weights;  // [anchors]
  RankOptions options;
  bool with_grad;
  float* losses;  // [anchors]
};

// Logits z of a chunk of anchors against `count` keys. The positive of anchor i is key start + i.
struct Logits {
  float* values;     // [rows, count]
  const bool* keep;  // [rows, count]; where it is false the key is absent; null: all are there
  int64_t count;
  int64_t start;

  PCK_HD float* row(int64_t i) const { return values + i * count; }
  PCK_HD const bool* keep_of(int64_t i) const { return keep == nullptr ? nullptr : keep + i * count; }
  PCK_HD bool is_there(int64_t i, int64_t j) const { return keep == nullptr || keep_of(i)[j]; }
};

// Adds a chunk's rows to the log-sum-exps of the negatives of columns 0 ... columns - 1, and notes the
// columns' positives, infinity where absent. What is absent may become -infinity.
struct ContrastColumns {
  Logits logits;
  int64_t anchors;
  int64_t columns;
  float* top;        // [columns], the largest so far
  double* total;     // [columns], sum of exp(z - top)
  double* positive;  // [columns]
};

// The contrastive loss of each row, log-sum-exp -> loss -> slope
// (pc_kernels/backends/contrast_rows.py).
struct ContrastRows {
  Logits logits;  // with_grad: the slopes replace the values
  float* target;  // [rows, count], the teacher's logits, of a form with targets; may be overwritten
  // What the columns add to the slopes: factor_j exp(z_j - shift_j) for the first `columns` keys, and
  // `own` to that of the positive.
  int64_t columns;
  const float* shift;    // [columns]
  const float* factor;   // [columns]
  const float* own;      // [rows]
  const float* weights;  // [rows]
  int form;              // a code of ContrastForms
  bool with_grad;
  float* losses;  // [rows]

  PCK_HD bool known() const { return has_code(ContrastForms{}, form); }
};

}  // namespace pck
