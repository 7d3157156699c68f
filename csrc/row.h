// What a row is to every compiled backend: its place in memory and how it is ranked. No torch headers.
#pragma once

#include <cstdint>

#include "formulas.h"

namespace pck {

// How a Gram row becomes a row of dissimilarities. `given`: it already is one. `ranked`, of a teacher:
// it holds ranks, as the stage `hard_rank_rows` leaves them.
enum class Metric { given, ranked, euclidean, sqeuclidean, cosine };

PCK_HD bool is_gram(Metric metric) {
  return metric != Metric::given && metric != Metric::ranked;
}

// One anchor's row against `count` references. For the metrics that have a name, `values` holds the
// inner products of the anchor with the references, and the other fields what turns them into
// squared distances.
struct Row {
  float* values;              // [count]
  const float* anchor;        // [width]
  const float* references;    // [count, width]
  const float* reference_sq;  // [count]
  float anchor_sq;
  float offset;  // the anchor's distance from the origin if it is far from all others, else 0
  int64_t count;
  int64_t width;
  int64_t self;  // the anchor's own place among the references, -1 if it has none
  Metric metric;
};

// One side (student or teacher) of a chunk of anchors. Without a Gram matrix, only values, count and
// metric.
struct Side {
  float* values;            // [anchors, count]
  const float* anchors;     // [anchors, width]
  const float* references;  // [count, width]
  const float* anchor_sq;
  const float* reference_sq;
  const float* offsets;
  int64_t count;
  int64_t width;
  Metric metric;

  PCK_HD Row row(int64_t i, int64_t self) const {
    float* const own = values + i * count;
    if (!is_gram(metric)) return {own, nullptr, nullptr, nullptr, 0.0f, 0.0f, count, 0, self, metric};
    return {own,          anchors + i * width,
            references,   reference_sq,
            anchor_sq[i], offsets[i],
            count,        width,
            self,         metric};
  }
};

struct RankOptions {
  Relaxation relaxation;
  Penalty penalty;
  double temperature;
  bool scale_std;
};

}  // namespace pck
