// Stage `coherence_rows`: one anchor's whole chain, dissimilarity -> rank -> loss -> gradient, by one
// block that reads the anchor's two rows once and writes its gradient once.
#include "dissimilarity.cuh"
#include "launch.cuh"
#include "rank_row.cuh"

namespace pck::cuda {
namespace {

// Scratch::target <- ranks of the references that count; false if they are undefined.
PCK_DEVICE bool rank_teacher(Block& block, const Row& teacher, const Kept& kept, int* near_count,
                             const Scratch& scratch) {
  float* const target = scratch.target;
  dissimilarity(block, teacher, kept, near_count, scratch, target);
  const Range range = range_of(block, target, kept.count);
  if (teacher.metric != Metric::ranked) hard_rank(block, target, kept.count, range, scratch);
  return range.finite();
}

struct HardRankRows {
  Side teacher;
  const bool* keep;
  int64_t self_start;
};

// For a teacher of several students: the ranks once.
template <bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    hard_rank_rows_kernel(const __grid_constant__ Rows rows,
                          const __grid_constant__ HardRankRows to_do) {
  PCK_DYNAMIC_SHARED(shared);
  Header& header = *reinterpret_cast<Header*>(shared);
  Block block(header.block);
  const Scratch scratch = scratch_of<kShared>(rows, shared);
  const int count = rows.layout.count;
  for_rows(block, rows, [&](int64_t i) {
    const Row row = to_do.teacher.row(i, to_do.self_start < 0 ? -1 : to_do.self_start + i);
    const bool* const keep = to_do.keep == nullptr ? nullptr : to_do.keep + i * count;
    const Kept kept = find_kept(block, row, keep, scratch);
    const bool defined = rank_teacher(block, row, kept, &header.near_count, scratch);
    block.store_values(row.values, count, [&](int j) {
      return !kept.has(j) ? 0.0f : defined ? scratch.target[kept.place(j)] : NAN;
    });
  });
}

template <Relaxation R>
struct Coherence {
  Anchors anchors;
  RankOptions options;
  bool with_grad;
  float* losses;
  Taps<R> taps;
};

struct Penalised {
  float value, slope;
};

PCK_DEVICE Penalised penalise(Penalty penalty, float residual) {
  switch (penalty) {
    case Penalty::squared:
      return {penalty_value<Penalty::squared>(residual), penalty_slope<Penalty::squared>(residual)};
    case Penalty::absolute:
      return {penalty_value<Penalty::absolute>(residual), penalty_slope<Penalty::absolute>(residual)};
    default:
      return {penalty_value<Penalty::huber>(residual), penalty_slope<Penalty::huber>(residual)};
  }
}

// The loss of the kept references, `target` holding the teacher's ranks; with_grad, slopes replace them
// and `product` takes what rank_gradient starts from.
template <Relaxation R>
PCK_DEVICE float row_loss(Block& block, const Plan& plan, const Taps<R>& taps, const Scratch& scratch,
                          Penalty penalty, bool with_grad) {
  const float unit = static_cast<float>(1.0 / (plan.count - 1.0));
  double loss = 0.0;
  const auto take = [&](int j, float rank, float density) {
    const Penalised here = penalise(penalty, rank - scratch.target[j]);
    loss += here.value;
    if (!with_grad) return;
    scratch.target[j] = here.slope;
    scratch.product[j] = here.slope * density;
  };
  if (plan.way == Plan::Way::constant)
    block.each(plan.count, [&](int j) { take(j, 0.5f, 0.0f); });
  else
    rank_sums<R>(block, plan, scratch.values, taps, scratch,
                 [&](int j, float sum, float density) { take(j, sum * unit, density); });
  return static_cast<float>(block.reduce(loss, Sum{}) / plan.count);
}

// student.values <- V: weight times the gradient, through the dissimilarity.
template <Relaxation R>
PCK_DEVICE void row_gradient(Block& block, const Row& student, const Kept& kept, const Plan& plan,
                             const Taps<R>& taps, const Scratch& scratch, const RankOptions& options,
                             float weight) {
  const float* const x = scratch.values;
  rank_gradient<R>(block, plan, x, taps, scratch, scratch.target, scratch.product);
  const double count = plan.count;
  const float factor = static_cast<float>(weight / (count * (count - 1.0)));
  const Pull pull = pull_of(block, plan, options, x, scratch.product, factor);
  block.store_values(student.values, static_cast<int>(student.count), [&](int j) {
    if (!kept.has(j)) return 0.0f;
    const int place = kept.place(j);
    return dissimilarity_backward(student, x[place], pull(place));
  });
}

template <Relaxation R>
PCK_DEVICE float coherence_row(Block& block, int64_t i, const Coherence<R>& to_do, const Taps<R>& taps,
                               Header& header, const Scratch& scratch) {
  const Anchors& anchors = to_do.anchors;
  const RankOptions& options = to_do.options;
  const int64_t self = anchors.self_start < 0 ? -1 : anchors.self_start + i;
  const int64_t first = i * anchors.student.count;
  const auto student = [&] { return anchors.student.row(i, self); };  // anew: saves registers
  const Kept kept =
      find_kept(block, student(), anchors.keep == nullptr ? nullptr : anchors.keep + first, scratch);
  const bool defined =
      rank_teacher(block, anchors.teacher.row(i, self), kept, &header.near_count, scratch);
  dissimilarity(block, student(), kept, &header.near_count, scratch, scratch.values);
  const Plan plan = plan_row<R>(block, scratch.values, kept.count, options, scratch);
  const auto give_up = [&](float value) {
    if (to_do.with_grad)
      block.store_values(anchors.student.values + first, static_cast<int>(anchors.student.count),
                         [&](int j) { return kept.has(j) ? value : 0.0f; });
    return value;
  };
  if (plan.way == Plan::Way::undefined || !defined) return give_up(NAN);
  if (kept.count < 2) return give_up(0.0f);  // nothing to rank
  const float loss = row_loss<R>(block, plan, taps, scratch, options.penalty, to_do.with_grad);
  if (!to_do.with_grad) return loss;
  if (plan.way == Plan::Way::constant)
    give_up(0.0f);
  else
    row_gradient<R>(block, student(), kept, plan, taps, scratch, options, anchors.weights[i]);
  return loss;
}

template <Relaxation R, bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    coherence_rows_kernel(const __grid_constant__ Rows rows,
                          const __grid_constant__ Coherence<R> to_do) {
  PCK_DYNAMIC_SHARED(shared);
  Header& header = *reinterpret_cast<Header*>(shared);
  Block block(header.block);
  const Scratch scratch = scratch_of<kShared>(rows, shared);
  const Taps<R>& taps = stage_taps(block, to_do.taps, header);
  for_rows(block, rows, [&](int64_t i) {
    const float loss = coherence_row<R>(block, i, to_do, taps, header, scratch);
    if (block.thread() == 0) to_do.losses[i] = loss;
  });
}

template <Relaxation R>
cudaError_t coherence_rows_of(const Launch& launch, void* workspace, cudaStream_t stream,
                              const Anchors& anchors, const RankOptions& options, bool with_grad,
                              float* losses) {
  const auto kernel =
      launch.in_shared ? coherence_rows_kernel<R, true> : coherence_rows_kernel<R, false>;
  return start(launch, workspace, stream, kernel,
               Coherence<R>{anchors, options, with_grad, losses, Taps<R>()});
}

}  // namespace

cudaError_t hard_rank_rows(const Launch& launch, void* workspace, cudaStream_t stream,
                           const Side& teacher, const bool* keep, int64_t self_start) {
  const auto kernel = launch.in_shared ? hard_rank_rows_kernel<true> : hard_rank_rows_kernel<false>;
  return start(launch, workspace, stream, kernel, HardRankRows{teacher, keep, self_start});
}

cudaError_t coherence_rows(const Launch& launch, void* workspace, cudaStream_t stream,
                           const Anchors& anchors, const RankOptions& options, bool with_grad,
                           float* losses) {
  const auto run = options.relaxation == Relaxation::logistic ? coherence_rows_of<Relaxation::logistic>
                                                              : coherence_rows_of<Relaxation::normal>;
  return run(launch, workspace, stream, anchors, options, with_grad, losses);
}

}  // namespace pck::cuda
