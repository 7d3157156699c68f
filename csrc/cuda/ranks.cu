// The stages that stand alone: ranks of rows as they are, and dissimilarities.
#include "dissimilarity.cuh"
#include "hard_rank.cuh"
#include "launch.cuh"
#include "soft_rank.cuh"

namespace pck::cuda {

// packed <- the values of row i that are there, side by side.
PCK_DEVICE void pack(Block& block, const Points& points, int64_t i, const Kept& kept, float* packed) {
  const int count = static_cast<int>(points.count);
  block.each_value(points.x + i * count, count, [&](int j, float value) {
    if (kept.has(j)) packed[kept.place(j)] = value;
  });
  block.sync();
}

// row <- `value` where a value is there, 0 elsewhere.
PCK_DEVICE void store_same(Block& block, float* row, int count, const Kept& kept, float value) {
  block.store_values(row, count, [&](int j) { return kept.has(j) ? value : 0.0f; });
}

// row <- the packed results at their places, 0 elsewhere.
PCK_DEVICE void unpack(Block& block, const float* packed, const Kept& kept, float* row, int count) {
  block.store_values(row, count, [&](int j) { return kept.has(j) ? packed[kept.place(j)] : 0.0f; });
}

PCK_DEVICE void run_row(Block& block, const HardRank& stage, int64_t i, NoTaps, Header&,
                        const Scratch& scratch) {
  const int count = static_cast<int>(stage.points.count);
  const Kept kept = find_kept(block, stage.points.present, i, count, scratch);
  float* const x = scratch.target;
  pack(block, stage.points, i, kept, x);
  hard_rank(block, x, kept.count, range_of(block, x, kept.count), scratch);
  unpack(block, x, kept, stage.rank + i * count, count);
}

template <class R>
PCK_DEVICE void run_row(Block& block, const SoftRank& stage, int64_t i, const Taps<R>& taps, Header&,
                        const Scratch& scratch) {
  const int count = static_cast<int>(stage.points.count);
  const Kept kept = find_kept(block, stage.points.present, i, count, scratch);
  float* const rank = stage.rank + i * count;
  float* const density = stage.density == nullptr ? nullptr : stage.density + i * count;
  pack(block, stage.points, i, kept, scratch.values);
  const Plan plan = plan_row<R>(block, kept.count, stage.options, scratch);
  const bool on_grid = plan.way == Way::grid;
  if (density != nullptr && !on_grid) store_same(block, density, count, kept, 0.0f);
  if (plan.way == Way::undefined || plan.way == Way::constant)
    return store_same(block, rank, count, kept, plan.way == Way::constant ? 0.5f : NAN);
  // Where everything is there, results go straight to their places.
  float* const packed_rank = kept.all() ? rank : scratch.target;
  float* const packed_density = !on_grid ? nullptr : kept.all() ? density : scratch.product;
  const int* const sorted = reinterpret_cast<const int*>(scratch.product);
  const float unit = plan.rank_unit();
  rank_sums<R>(block, plan, taps, scratch, [&](int j, float sum, float own_density) {
    packed_rank[on_grid ? j : sorted[j]] = sum * unit;
    if (packed_density != nullptr) packed_density[j] = own_density;
  });
  if (kept.all()) return;
  unpack(block, packed_rank, kept, rank, count);
  if (density != nullptr && on_grid) unpack(block, packed_density, kept, density, count);
}

template <class R>
PCK_DEVICE void run_row(Block& block, const SoftRankBackward& stage, int64_t i, const Taps<R>& taps,
                        Header&, const Scratch& scratch) {
  const int count = static_cast<int>(stage.points.count);
  const Kept kept = find_kept(block, stage.points.present, i, count, scratch);
  float* const x = scratch.values;
  float* const grad_x = stage.grad_x + i * count;
  const Points slopes{stage.grad_rank, stage.points.count, stage.points.present};
  const auto restore = [&] { pack(block, stage.points, i, kept, x); };
  restore();
  pack(block, slopes, i, kept, scratch.target);
  const Plan plan = plan_row<R>(block, kept.count, stage.options, scratch);
  if (plan.way == Way::undefined || plan.way == Way::constant)
    return store_same(block, grad_x, count, kept, plan.way == Way::constant ? 0.0f : NAN);
  if (plan.way == Way::grid) {
    block.each_value(stage.density + i * count, count, [&](int j, float value) {
      if (kept.has(j)) scratch.product[kept.place(j)] = value * scratch.target[kept.place(j)];
    });
    block.sync();
  }
  rank_gradient<R>(block, plan, taps, scratch, grad_x, restore);
  const Pull pull = pull_of(block, plan, stage.options, x, scratch.product, plan.rank_unit());
  block.store_values(grad_x, count, [&](int j) { return kept.has(j) ? pull(kept.place(j)) : 0.0f; });
}

PCK_DEVICE void run_row(Block& block, const DissimilarityRows& stage, int64_t i, NoTaps, Header& header,
                        const Scratch& scratch) {
  const Row row = stage.rows.row(i, -1);
  const int count = static_cast<int>(row.count);
  const Kept all = find_kept(block, Present{nullptr, -1}, i, count, scratch);
  dissimilarity(block, row, all, &header.near_count, reinterpret_cast<int*>(scratch.product),
                scratch.values);
  block.store_values(row.values, count, [&](int j) { return scratch.values[j]; });
}

template cudaError_t run(const Launch&, const HardRank&);
template cudaError_t run(const Launch&, const SoftRank&);
template cudaError_t run(const Launch&, const SoftRankBackward&);
template cudaError_t run(const Launch&, const DissimilarityRows&);

}  // namespace pck::cuda
