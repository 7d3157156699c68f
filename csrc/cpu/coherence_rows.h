// Stage `coherence_rows`: one anchor's whole chain, dissimilarity -> rank -> loss -> gradient.
// Included inside the namespace of one instruction set.

// The anchor is not its own reference: the last reference takes its place. Ranks do not mind the order.
inline int64_t drop_self(const Row& row) {
  if (row.self < 0) return row.count;
  row.values[row.self] = row.values[row.count - 1];
  return row.count - 1;
}

inline void restore_self(const Row& row) {
  if (row.self < 0) return;
  row.values[row.count - 1] = row.values[row.self];
  row.values[row.self] = 0.0f;
}

template <Relaxation R, Penalty P>
inline float coherence_row(const Row& student, const Row& teacher, const RankOptions& options,
                           float weight, bool with_grad, Scratch& scratch) {
  dissimilarity(student);
  comparable(teacher);
  const int64_t count = drop_self(student);
  drop_self(teacher);
  const Range teacher_range = count > 0 ? range_of(teacher.values, count) : Range{0, 0, true};
  const Plan plan = [&] {
    if (count > 0) hard_rank(teacher.values, count, scratch.teacher, scratch);
    return plan_row<R>(student.values, count, options, scratch);
  }();
  if (count < 2 && plan.way != Plan::Way::undefined && teacher_range.finite) {
    if (with_grad) fill(student.values, student.count, 0.0f);  // nothing to rank
    return 0.0f;
  }
  if (plan.way == Plan::Way::undefined || !teacher_range.finite) {
    if (with_grad) fill(student.values, student.count, __builtin_nanf(""));
    return __builtin_nanf("");
  }
  float* const rank = scratch.student;
  if (plan.way == Plan::Way::constant)
    fill(rank, count, 0.5f);
  else
    rank_sums<R>(plan, rank, with_grad ? scratch.density : nullptr, scratch);
  const float* const target = scratch.teacher;
  const double loss = lane_sum(count, [=](int64_t j) { return penalty_value<P>(rank[j] - target[j]); });
  if (with_grad) {
    if (plan.way == Plan::Way::constant) {
      fill(student.values, student.count, 0.0f);
    } else {
      float* const slope = scratch.slope;
      for (int64_t j = 0; j < count; ++j) slope[j] = penalty_slope<P>(rank[j] - target[j]);
      const float factor = static_cast<float>(weight / (static_cast<double>(count) * (count - 1.0)));
      rank_gradient<R>(plan, student.values, slope, scratch.density, factor, options.scale_std, rank,
                       scratch);
      dissimilarity_backward(student, rank, count);
      for (int64_t j = 0; j < count; ++j) student.values[j] = rank[j];
      restore_self(student);
    }
  }
  return static_cast<float>(loss / static_cast<double>(count));
}
