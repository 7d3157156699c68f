// Stages `hard_rank_rows` and `coherence_rows`: one anchor's chain, dissimilarity -> rank -> loss ->
// gradient, by one block that reads the anchor's rows once and writes its gradient once.
#include "dissimilarity.cuh"
#include "hard_rank.cuh"
#include "launch.cuh"
#include "soft_rank.cuh"

namespace pck::cuda {

// Scratch::target <- ranks of the references that are there; false if they are undefined.
PCK_DEVICE bool rank_teacher(Block& block, const Row& teacher, const Kept& kept, int* near_count,
                             const Scratch& scratch) {
  float* const target = scratch.target;
  dissimilarity(block, teacher, kept, near_count, reinterpret_cast<int*>(scratch.product), target);
  const Range range = range_of(block, target, kept.count);
  if (teacher.dissimilarity != Ranked::code) hard_rank(block, target, kept.count, range, scratch);
  return range.finite();
}

PCK_DEVICE void run_row(Block& block, const HardRankRows& stage, int64_t i, NoTaps, Header& header,
                        const Scratch& scratch) {
  const Row row = stage.teacher.row(i, stage.present.self_of(i));
  const int count = static_cast<int>(row.count);
  const Kept kept = find_kept(block, stage.present, i, count, scratch);
  const bool defined = rank_teacher(block, row, kept, &header.near_count, scratch);
  block.store_values(row.values, count, [&](int j) {
    return !kept.has(j) ? 0.0f : defined ? scratch.target[kept.place(j)] : NAN;
  });
}

// The loss over the references that are there, `target` holding the teacher's ranks in the order of
// `values`; with_grad, slopes replace them and `product` takes what rank_gradient starts from.
template <class R>
PCK_DEVICE float row_loss(Block& block, const Plan& plan, const Taps<R>& taps, const Scratch& scratch,
                          int penalty, bool with_grad) {
  const float unit = plan.rank_unit();
  double loss = 0.0;
  const auto take = [&](int j, float rank, float density) {
    const float residual = rank - scratch.target[j];
    visit(Penalties{}, penalty, [&](auto row) {
      loss += row.value(residual);
      if (!with_grad) return;
      const float slope = row.slope(residual);
      scratch.target[j] = slope;
      if (plan.way == Way::grid) scratch.product[j] = slope * density;
    });
  };
  if (plan.way == Way::constant)
    block.each(plan.count, [&](int j) { take(j, 0.5f, 0.0f); });
  else
    rank_sums<R>(block, plan, taps, scratch,
                 [&](int j, float sum, float density) { take(j, sum * unit, density); });
  return static_cast<float>(block.reduce(loss, Sum{}) / plan.count);
}

// student.values <- V: weight times the gradient, through the dissimilarity.
template <class R>
PCK_DEVICE void row_gradient(Block& block, const CoherenceRows& stage, int64_t i, const Kept& kept,
                             const Plan& plan, const Taps<R>& taps, Header& header,
                             const Scratch& scratch) {
  const Row student = stage.student.row(i, stage.present.self_of(i));
  float* const x = scratch.values;
  // The row itself is spare where the values are not made of it again.
  rank_gradient<R>(block, plan, taps, scratch, student.values, [&] {
    dissimilarity(block, student, kept, &header.near_count, reinterpret_cast<int*>(scratch.target), x);
  });
  const Pull pull =
      pull_of(block, plan, stage.options, x, scratch.product, plan.loss_factor(stage.weights[i]));
  store_gradient(block, student, kept, x, pull);
}

template <class R>
PCK_DEVICE float coherence_row(Block& block, const CoherenceRows& stage, int64_t i, const Taps<R>& taps,
                               Header& header, const Scratch& scratch) {
  const RankOptions options = stage.student.in_units(stage.options);
  const int64_t self = stage.present.self_of(i);
  const int count = static_cast<int>(stage.student.count);
  const Kept kept = find_kept(block, stage.present, i, count, scratch);
  const bool defined =
      rank_teacher(block, stage.teacher.row(i, self), kept, &header.near_count, scratch);
  dissimilarity(block, stage.student.row(i, self), kept, &header.near_count,
                reinterpret_cast<int*>(scratch.product), scratch.values);
  const Plan plan = plan_row<R>(block, kept.count, options, scratch);
  const auto give_up = [&](float value) {
    if (stage.with_grad)
      block.store_values(stage.student.values + i * stage.student.count, count,
                         [&](int j) { return kept.has(j) ? value : 0.0f; });
    return value;
  };
  if (plan.way == Way::undefined || !defined) return give_up(NAN);
  if (kept.count < 2) return give_up(0.0f);  // nothing to rank
  const float loss = row_loss<R>(block, plan, taps, scratch, options.penalty, stage.with_grad);
  if (!stage.with_grad) return loss;
  if (plan.way == Way::constant)
    give_up(0.0f);
  else
    row_gradient<R>(block, stage, i, kept, plan, taps, header, scratch);
  return loss;
}

template <class R>
PCK_DEVICE void run_row(Block& block, const CoherenceRows& stage, int64_t i, const Taps<R>& taps,
                        Header& header, const Scratch& scratch) {
  const float loss = coherence_row(block, stage, i, taps, header, scratch);
  if (block.thread() == 0) stage.losses[i] = loss;
}

template cudaError_t run(const Launch&, const HardRankRows&);
template cudaError_t run(const Launch&, const CoherenceRows&);

}  // namespace pck::cuda
