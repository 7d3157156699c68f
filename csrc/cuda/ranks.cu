// The kernels of the stages that stand alone: a block a row.
#include "dissimilarity.cuh"
#include "launch.cuh"
#include "rank_row.cuh"

namespace pck::cuda {
namespace {

struct HardRank {
  const float* x;
  float* rank;
};

template <bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    hard_rank_kernel(const __grid_constant__ Rows rows, const __grid_constant__ HardRank to_do) {
  PCK_DYNAMIC_SHARED(shared);
  Block block(reinterpret_cast<Header*>(shared)->block);
  const Scratch scratch = scratch_of<kShared>(rows, shared);
  const int count = rows.layout.count;
  for_rows(block, rows, [&](int64_t i) {
    float* const x = scratch.target;
    block.each_value(to_do.x + i * count, count, [&](int j, float value) { x[j] = value; });
    block.sync();
    hard_rank(block, x, count, range_of(block, x, count), scratch);
    block.store_values(to_do.rank + i * count, count, [&](int j) { return x[j]; });
  });
}

template <Relaxation R>
struct SoftRank {
  const float* x;
  RankOptions options;
  float* rank;
  float* density;
  Taps<R> taps;
};

template <Relaxation R, bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    soft_rank_kernel(const __grid_constant__ Rows rows, const __grid_constant__ SoftRank<R> to_do) {
  PCK_DYNAMIC_SHARED(shared);
  Header& header = *reinterpret_cast<Header*>(shared);
  Block block(header.block);
  const Scratch scratch = scratch_of<kShared>(rows, shared);
  const Taps<R>& taps = stage_taps(block, to_do.taps, header);
  const int count = rows.layout.count;
  for_rows(block, rows, [&](int64_t i) {
    float* const x = scratch.values;
    float* const rank = to_do.rank + i * count;
    float* const density = to_do.density == nullptr ? nullptr : to_do.density + i * count;
    block.each_value(to_do.x + i * count, count, [&](int j, float value) { x[j] = value; });
    block.sync();
    const Plan plan = plan_row<R>(block, x, count, to_do.options, scratch);
    if (plan.way == Plan::Way::undefined || plan.way == Plan::Way::constant) {
      const float same = plan.way == Plan::Way::constant ? 0.5f : NAN;
      block.store_values(rank, count, [=](int) { return same; });
      if (density != nullptr) block.store_values(density, count, [](int) { return 0.0f; });
      return;
    }
    const float unit = static_cast<float>(1.0 / (count - 1.0));
    rank_sums<R>(block, plan, x, taps, scratch, [&](int j, float sum, float own_density) {
      rank[j] = sum * unit;
      if (density != nullptr) density[j] = own_density;
    });
  });
}

template <Relaxation R>
struct SoftRankBackward {
  const float* grad_rank;
  const float* x;
  const float* density;
  RankOptions options;
  float* grad_x;
  Taps<R> taps;
};

template <Relaxation R, bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    soft_rank_backward_kernel(const __grid_constant__ Rows rows,
                              const __grid_constant__ SoftRankBackward<R> to_do) {
  PCK_DYNAMIC_SHARED(shared);
  Header& header = *reinterpret_cast<Header*>(shared);
  Block block(header.block);
  const Scratch scratch = scratch_of<kShared>(rows, shared);
  const Taps<R>& taps = stage_taps(block, to_do.taps, header);
  const int count = rows.layout.count;
  for_rows(block, rows, [&](int64_t i) {
    float* const x = scratch.values;
    float* const slope = scratch.target;
    float* const grad = scratch.product;
    float* const grad_x = to_do.grad_x + i * count;
    block.each_value(to_do.x + i * count, count, [&](int j, float value) { x[j] = value; });
    block.sync();
    const Plan plan = plan_row<R>(block, x, count, to_do.options, scratch);
    if (plan.way == Plan::Way::undefined || plan.way == Plan::Way::constant) {
      const float same = plan.way == Plan::Way::constant ? 0.0f : NAN;
      block.store_values(grad_x, count, [=](int) { return same; });
      return;
    }
    const float* const density = to_do.density + i * count;
    block.each_value(to_do.grad_rank + i * count, count, [&](int j, float value) {
      slope[j] = value;
      grad[j] = value * density[j];
    });
    block.sync();
    rank_gradient<R>(block, plan, x, taps, scratch, slope, grad);
    const float unit = static_cast<float>(1.0 / (count - 1.0));
    const Pull pull = pull_of(block, plan, to_do.options, x, grad, unit);
    block.store_values(grad_x, count, pull);
  });
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    dissimilarity_kernel(const __grid_constant__ Rows rows, const __grid_constant__ Side side) {
  PCK_DYNAMIC_SHARED(shared);
  Header& header = *reinterpret_cast<Header*>(shared);
  Block block(header.block);
  const Scratch scratch = scratch_of<kShared>(rows, shared);
  for_rows(block, rows, [&](int64_t i) {
    const Row row = side.row(i, -1);
    const Kept all = find_kept(block, row, nullptr, scratch);
    dissimilarity(block, row, all, &header.near_count, scratch, scratch.values);
    block.store_values(row.values, rows.layout.count, [&](int j) { return scratch.values[j]; });
  });
}

template <Relaxation R>
cudaError_t soft_rank_of(const Launch& launch, void* workspace, cudaStream_t stream, const float* x,
                         const RankOptions& options, float* rank, float* density) {
  const auto kernel = launch.in_shared ? soft_rank_kernel<R, true> : soft_rank_kernel<R, false>;
  return start(launch, workspace, stream, kernel, SoftRank<R>{x, options, rank, density, Taps<R>()});
}

template <Relaxation R>
cudaError_t soft_rank_backward_of(const Launch& launch, void* workspace, cudaStream_t stream,
                                  const float* grad_rank, const float* x, const float* density,
                                  const RankOptions& options, float* grad_x) {
  const auto kernel =
      launch.in_shared ? soft_rank_backward_kernel<R, true> : soft_rank_backward_kernel<R, false>;
  return start(launch, workspace, stream, kernel,
               SoftRankBackward<R>{grad_rank, x, density, options, grad_x, Taps<R>()});
}

}  // namespace

cudaError_t hard_rank(const Launch& launch, void* workspace, cudaStream_t stream, const float* x,
                      float* rank) {
  const auto kernel = launch.in_shared ? hard_rank_kernel<true> : hard_rank_kernel<false>;
  return start(launch, workspace, stream, kernel, HardRank{x, rank});
}

cudaError_t soft_rank(const Launch& launch, void* workspace, cudaStream_t stream, const float* x,
                      const RankOptions& options, float* rank, float* density) {
  const auto run = options.relaxation == Relaxation::logistic ? soft_rank_of<Relaxation::logistic>
                                                              : soft_rank_of<Relaxation::normal>;
  return run(launch, workspace, stream, x, options, rank, density);
}

cudaError_t soft_rank_backward(const Launch& launch, void* workspace, cudaStream_t stream,
                               const float* grad_rank, const float* x, const float* density,
                               const RankOptions& options, float* grad_x) {
  const auto run = options.relaxation == Relaxation::logistic
                       ? soft_rank_backward_of<Relaxation::logistic>
                       : soft_rank_backward_of<Relaxation::normal>;
  return run(launch, workspace, stream, grad_rank, x, density, options, grad_x);
}

cudaError_t dissimilarity(const Launch& launch, void* workspace, cudaStream_t stream,
                          const Side& side) {
  const auto kernel = launch.in_shared ? dissimilarity_kernel<true> : dissimilarity_kernel<false>;
  return start(launch, workspace, stream, kernel, side);
}

}  // namespace pck::cuda
