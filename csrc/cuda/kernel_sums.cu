// Stage `kernel_sums`: a block a row.
#include "kernel_sums.cuh"

#include "launch.cuh"

namespace pck::cuda {

template <class R>
Taps<Far<R>> taps_of(const Launch&, const KernelSums&, R) {
  return {};
}

PCK_DEVICE bool weights_are_finite(Block& block, Together row) {
  float poison = 0.0f;  // 0 for finite weights, NaN otherwise
  for (; row.stage.weights != nullptr && row.channel < row.stage.channels; ++row.channel)
    block.each(row.first_query(), [&](int j) { poison += row.weight(j) - row.weight(j); });
  return block.reduce(poison, Sum{}) == 0.0f;
}

template <class R>
PCK_DEVICE void run_row(Block& block, const KernelSums& stage, int64_t i, const Taps<R>& taps, Header&,
                        const Scratch& scratch) {
  Together row{stage, i, 0};
  if (row.count() == row.first_query()) return;
  place_together(block, row, scratch.values);
  const Range range = range_of(block, scratch.values, row.count());
  const bool finite = range.finite() && weights_are_finite(block, row);
  const bool defined = finite && row.first_query() > 0;
  const bool few = defined && few_pairs<R>(row, range, scratch.cells);
  // An integral grows with gaps that would be closed.
  const int cells = !defined || few ? 0
                                    : place_points<R>(block, row.count(), range, row.tau(), scratch,
                                                      !row.with_integral());
  if (defined && !few && cells == 0) sort_points(block, row.count(), scratch, [](int, int) {});
  for (; row.channel < stage.channels; ++row.channel) {
    if (!defined) {
      const float all = finite ? 0.0f : NAN;
      block.each(row.count() - row.first_query(),
                 [&](int j) { row.put(row.first_query() + j, {all, all, all}); });
    } else if (few || cells > 0) {
      float* const weights = scratch.target;
      stage_weights(block, row, weights);
      if (few)
        pair_sums<R>(block, row, scratch.values, weights);
      else
        grid_sums<R>(
            block, row, Grid(cells, scratch), PlaceWords(scratch, cells),
            {row.first_query(), row.count()}, taps, [=](int j) { return weights[j]; },
            [&](int j, const Values& values) { row.put(j, values); });
    } else {
      sorted_sums(block, row, SortedRow<R>(scratch, row.count(), row.tau()), taps, scratch);
    }
    block.sync();  // the next channel reuses the memory
  }
}

template cudaError_t run(const Launch&, const KernelSums&);

}  // namespace pck::cuda
