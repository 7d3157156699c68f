// Stages `hard_rank_rows` and `coherence_rows`: one anchor's chain, dissimilarity -> rank -> loss ->
// gradient. Included inside the namespace of one instruction set.

// Scratch::teacher <- ranks of the references that are there; false if they are undefined.
inline bool rank_teacher(const Row& teacher, const Selection& selection, Scratch& scratch) {
  const int64_t count = selection.count();
  if (teacher.dissimilarity == Ranked::code) {
    selection.gather(teacher.values, scratch.teacher);
    return count == 0 || scratch.teacher[0] == scratch.teacher[0];
  }
  dissimilarity(teacher);
  selection.gather(teacher.values, teacher.values);
  if (count > 0) hard_rank(teacher.values, count, scratch.teacher, scratch);
  return count == 0 || range_of(teacher.values, count).finite;
}

inline void run_row(const HardRankRows& stage, int64_t i, Scratch& scratch) {
  const Row teacher = stage.teacher.row(i, stage.present.self_of(i));
  const Selection selection(stage.present, i, teacher.count, scratch);
  if (!rank_teacher(teacher, selection, scratch))
    fill(scratch.teacher, selection.count(), __builtin_nanf(""));
  selection.scatter(scratch.teacher, teacher.values);
}

// The anchor's loss; with_grad, V replaces the student's values.
template <class R, class P>
inline float coherence_row(const CoherenceRows& stage, int64_t i, Scratch& scratch) {
  const int64_t self = stage.present.self_of(i);
  const Row student = stage.student.row(i, self), teacher = stage.teacher.row(i, self);
  dissimilarity(student);
  const Selection selection(stage.present, i, student.count, scratch);
  const int64_t count = selection.count();
  selection.gather(student.values, student.values);
  const bool teacher_finite = rank_teacher(teacher, selection, scratch);
  const Plan plan = plan_row<R>(student.values, count, stage.options, scratch);
  float* const rank = scratch.student;
  float* const grad = rank;  // once the ranks are used up
  const auto all_the_same = [&](float loss, float gradient) {
    fill(grad, count, gradient);
    if (stage.with_grad) selection.scatter(grad, student.values);
    return loss;
  };
  if (plan.way == Way::undefined || !teacher_finite)
    return all_the_same(__builtin_nanf(""), __builtin_nanf(""));
  if (count < 2) return all_the_same(0.0f, 0.0f);  // nothing to rank
  if (plan.way == Way::constant)
    fill(rank, count, 0.5f);
  else
    rank_sums<R>(plan, student.values, rank, stage.with_grad ? scratch.density : nullptr, scratch);
  const float* const target = scratch.teacher;
  const double total = lane_sum(count, [=](int64_t j) { return P::value(rank[j] - target[j]); });
  const float loss = static_cast<float>(total / static_cast<double>(count));
  if (!stage.with_grad) return loss;
  if (plan.way == Way::constant) return all_the_same(loss, 0.0f);
  float* const slope = scratch.slope;
  for (int64_t j = 0; j < count; ++j) slope[j] = P::slope(rank[j] - target[j]);
  const float factor = plan.loss_factor(stage.weights[i]);
  rank_gradient<R>(plan, student.values, slope, scratch.density, factor, stage.options.scale_std, grad,
                   scratch);
  dissimilarity_backward(student, selection, grad);
  selection.scatter(grad, student.values);
  return loss;
}

inline void run_row(const CoherenceRows& stage, int64_t i, Scratch& scratch) {
  visit(Relaxations{}, stage.options.relaxation, [&](auto relaxation) {
    visit(Penalties{}, stage.options.penalty, [&](auto penalty) {
      stage.losses[i] = coherence_row<decltype(relaxation), decltype(penalty)>(stage, i, scratch);
    });
  });
}
