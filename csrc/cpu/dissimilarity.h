// Stage `dissimilarity`: a Gram row becomes squared distances, then dissimilarities.
// Included inside the namespace of one instruction set.

inline float squared_distance(const float* a, const float* b, int64_t width) {
  return static_cast<float>(lane_sum(width, [=](int64_t k) { return (a[k] - b[k]) * (a[k] - b[k]); }));
}

// values <- what Row::squared gives; short distances are summed again from the differences. The
// anchor's own place gets garbage: callers drop it.
inline void squared_distances(Row row) {
  float* const d = row.values;
  if (row.has_twins())
    for (int64_t j = 0; j < row.count; ++j) d[j] = d[row.twins[j]];
  int32_t near = 0;
  for (int64_t j = 0; j < row.count; ++j) {
    const float squared = row.squared(j, d[j]);
    near += row.is_near(j, squared);
    d[j] = squared;
  }
  if (near == (row.self >= 0 && row.is_near(row.self, d[row.self]))) return;
  for (int64_t j = 0; j < row.count; ++j)
    if (j != row.self && row.is_near(j, d[j]))
      d[j] = squared_distance(row.anchor, row.references + j * row.width, row.width) -
             (row.is_far() ? row.anchor_sq : 0.0f);
}

// Dissimilarities in place; of a far anchor, less what its references have in common: its offset, or
// the offset's square for squared distances.
inline void dissimilarity(const Row& row) {
  if (!is_gram(row.dissimilarity)) return;
  squared_distances(row);
  visit(Dissimilarities{}, row.dissimilarity, [row](auto kind) {
    float* const d = row.values;
    if (row.is_far())
      for (int64_t j = 0; j < row.count; ++j) d[j] = kind.of_far(d[j], row.anchor_sq, row.offset);
    else
      for (int64_t j = 0; j < row.count; ++j) d[j] = kind.of(d[j]);
  });
}

inline void run_row(const DissimilarityRows& stage, int64_t i, Scratch&) {
  dissimilarity(stage.rows.row(i, -1));
}

// grad = dL/d(dissimilarity) -> V, of the references that are there.
inline void dissimilarity_backward(const Row& row, const Selection& selection, float* grad) {
  const float* const d = row.values;
  const int64_t count = selection.count();
  visit(Dissimilarities{}, row.dissimilarity, [&](auto kind) {
    if (!row.is_far()) {
      for (int64_t j = 0; j < count; ++j) grad[j] = kind.backward(grad[j], d[j], 0.0f);
      return;
    }
    for (int64_t j = 0; j < count; ++j) {
      if (!kind.is_beside(d[j], row.offset)) {
        grad[j] = kind.backward(grad[j], d[j], row.offset);
        continue;
      }
      const float* const reference = row.references + selection.place_of(j) * row.width;
      const float squared = squared_distance(row.anchor, reference, row.width);
      grad[j] = kind.backward(grad[j], kind.of(squared), 0.0f);
    }
  });
}
