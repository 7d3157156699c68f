// Stage `coherence_rows`: one anchor's whole chain, dissimilarity -> rank -> loss -> gradient.
// Included inside the namespace of one instruction set.

// The references that count move to the front of a row, and their gradients back to their places.
// Without a mask only the anchor itself has to go: the last reference takes its place, since ranks do
// not mind the order.
class Selection {
 public:
  Selection(const Row& row, const bool* keep, int32_t* chosen) : self_(row.self), whole_(row.count) {
    count_ = row.count - (row.self >= 0);
    if (keep == nullptr) return;
    chosen_ = chosen;
    count_ = 0;
    for (int64_t j = 0; j < row.count; ++j) {
      chosen[count_] = static_cast<int32_t>(j);
      count_ += keep[j] && j != row.self;
    }
  }

  int64_t count() const { return count_; }

  // front [count] <- the values that count; `front` may be `values`.
  void gather(const float* values, float* front) const {
    if (chosen_ != nullptr) {
      for (int64_t i = 0; i < count_; ++i) front[i] = values[chosen_[i]];
      return;
    }
    if (front != values)
      for (int64_t j = 0; j < count_; ++j) front[j] = values[j];
    if (self_ >= 0) front[self_] = values[count_];
  }

  // values <- front [count] at the references that count, 0 at the others.
  void scatter(const float* front, float* values) const {
    if (chosen_ != nullptr) {
      for (int64_t j = 0; j < whole_; ++j) values[j] = 0.0f;
      for (int64_t i = 0; i < count_; ++i) values[chosen_[i]] = front[i];
      return;
    }
    for (int64_t j = 0; j < count_; ++j) values[j] = front[j];
    if (self_ < 0) return;
    values[count_] = values[self_];
    values[self_] = 0.0f;
  }

 private:
  int64_t self_;
  int64_t whole_;
  int64_t count_;
  const int32_t* chosen_ = nullptr;
};

// Scratch::teacher <- ranks of the references that count; false if they are undefined.
inline bool rank_teacher(const Row& teacher, const Selection& selection, Scratch& scratch) {
  const int64_t count = selection.count();
  if (teacher.metric == Metric::ranked) {
    selection.gather(teacher.values, scratch.teacher);
    return count == 0 || scratch.teacher[0] == scratch.teacher[0];
  }
  dissimilarity(teacher);
  selection.gather(teacher.values, teacher.values);
  if (count > 0) hard_rank(teacher.values, count, scratch.teacher, scratch);
  return count == 0 || range_of(teacher.values, count).finite;
}

// For a teacher of several students: the ranks once.
inline void hard_rank_row(const Row& teacher, const bool* keep, Scratch& scratch) {
  const Selection selection(teacher, keep, scratch.chosen);
  if (!rank_teacher(teacher, selection, scratch))
    fill(scratch.teacher, selection.count(), __builtin_nanf(""));
  selection.scatter(scratch.teacher, teacher.values);
}

template <Relaxation R, Penalty P>
inline float coherence_row(const Row& student, const Row& teacher, const bool* keep,
                           const RankOptions& options, float weight, bool with_grad, Scratch& scratch) {
  dissimilarity(student);
  const Selection selection(student, keep, scratch.chosen);
  const int64_t count = selection.count();
  selection.gather(student.values, student.values);
  const bool teacher_finite = rank_teacher(teacher, selection, scratch);
  const Plan plan = plan_row<R>(student.values, count, options, scratch);
  float* const rank = scratch.student;
  float* const grad = rank;  // once the ranks are used up
  const auto all_the_same = [&](float loss, float gradient) {
    fill(grad, count, gradient);
    if (with_grad) selection.scatter(grad, student.values);
    return loss;
  };
  if (plan.way == Plan::Way::undefined || !teacher_finite)
    return all_the_same(__builtin_nanf(""), __builtin_nanf(""));
  if (count < 2) return all_the_same(0.0f, 0.0f);  // nothing to rank
  if (plan.way == Plan::Way::constant)
    fill(rank, count, 0.5f);
  else
    rank_sums<R>(plan, rank, with_grad ? scratch.density : nullptr, scratch);
  const float* const target = scratch.teacher;
  const double total =
      lane_sum(count, [=](int64_t j) { return penalty_value<P>(rank[j] - target[j]); });
  const float loss = static_cast<float>(total / static_cast<double>(count));
  if (!with_grad) return loss;
  if (plan.way == Plan::Way::constant) return all_the_same(loss, 0.0f);
  float* const slope = scratch.slope;
  for (int64_t j = 0; j < count; ++j) slope[j] = penalty_slope<P>(rank[j] - target[j]);
  const float factor = static_cast<float>(weight / (static_cast<double>(count) * (count - 1.0)));
  rank_gradient<R>(plan, student.values, slope, scratch.density, factor, options.scale_std, grad,
                   scratch);
  dissimilarity_backward(student, grad, count);
  selection.scatter(grad, student.values);
  return loss;
}
