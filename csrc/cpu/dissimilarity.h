// Stage `dissimilarity`: a Gram row becomes squared distances, then dissimilarities.
// Included inside the namespace of one instruction set.

inline float squared_distance(const float* a, const float* b, int64_t width) {
  return static_cast<float>(lane_sum(width, [=](int64_t k) { return (a[k] - b[k]) * (a[k] - b[k]); }));
}

// values <- squared distances (the anchor's own place gets garbage: callers drop it).
inline void squared_distances(const Row& row) {
  float* const d = row.values;
  const float anchor_sq = row.anchor_sq;
  const float* const reference_sq = row.reference_sq;
  int32_t near = 0;
  for (int64_t j = 0; j < row.count; ++j) {
    const float scale = anchor_sq + reference_sq[j];
    const float sq = scale - 2.0f * d[j];
    near += sq < kNear * scale;
    d[j] = sq;
  }
  if (near == (row.self >= 0 && !(d[row.self] >= kNear * 2.0f * anchor_sq))) return;
  for (int64_t j = 0; j < row.count; ++j)
    if (j != row.self && d[j] < kNear * (anchor_sq + reference_sq[j]))
      d[j] = squared_distance(row.anchor, row.references + j * row.width, row.width);
}

// The same but for the anchor's |a|^2, for an anchor so far out that |a|^2 would cost the digits in
// which its references differ. A rank does not mind what all of a row have in common.
inline void far_squared_distances(const Row& row) {
  for (int64_t j = 0; j < row.count; ++j) {
    const float excess = row.reference_sq[j] - 2.0f * row.values[j];
    const bool near = row.anchor_sq + excess < kNear * (row.anchor_sq + row.reference_sq[j]);
    row.values[j] =
        near && j != row.self
            ? squared_distance(row.anchor, row.references + j * row.width, row.width) - row.anchor_sq
            : excess;
  }
}

template <class D>
inline void from_squared(const Row& row) {
  float* const d = row.values;
  const float anchor_sq = row.anchor_sq, offset = row.offset;
  if (offset > 0.0f)
    for (int64_t j = 0; j < row.count; ++j) d[j] = D::of_far(d[j], anchor_sq, offset);
  else
    for (int64_t j = 0; j < row.count; ++j) d[j] = D::of(d[j]);
}

// Dissimilarities in place; of a far anchor, less what its references have in common: its offset, or
// the offset's square for squared distances.
inline void dissimilarity(const Row& row) {
  if (!is_gram(row.dissimilarity)) return;
  row.offset > 0.0f ? far_squared_distances(row) : squared_distances(row);
  visit(Dissimilarities{}, row.dissimilarity, [&](auto kind) { from_squared<decltype(kind)>(row); });
}

template <class D>
inline void to_squared(const Row& row, float* grad, int64_t count) {
  const float* const d = row.values;
  const float offset = row.offset;
  for (int64_t j = 0; j < count; ++j) grad[j] = D::backward(grad[j], d[j], offset);
}

// grad = dL/d(dissimilarity) -> V.
inline void dissimilarity_backward(const Row& row, float* grad, int64_t count) {
  visit(Dissimilarities{}, row.dissimilarity,
        [&](auto kind) { to_squared<decltype(kind)>(row, grad, count); });
}
