// How kernels start and how they find their memory.
#pragma once

#include <algorithm>

#include "block.cuh"
#include "scratch.cuh"
#include "stages.h"

namespace pck::cuda {

// The most threads of a block. Working memory in global memory needs 64-bit addresses, for which 1024
// threads have too few registers.
template <bool kShared>
inline constexpr int kThreads = kShared ? kMostThreads : kMostThreads / 2;

inline constexpr int kMostTapsBytes = largest(GridRelaxations{}, [](auto row) {
  return static_cast<int>(sizeof(Taps<decltype(row)>) + 15) / 16 * 16;
});

// What a block keeps in shared memory in any case, before a row's working memory.
struct Header {
  unsigned char block[Block::kBytes];
  unsigned char taps[kMostTapsBytes];
  int near_count;
  int unused[3];
};
static_assert(sizeof(Header) % 16 == 0);

// A chunk of rows and the working memory of each.
struct Chunk {
  int64_t rows;
  Layout layout;
  unsigned char* workspace;
};

// For the stages without soft ranks.
struct NoTaps {};

PCK_DEVICE NoTaps stage_taps(Block&, NoTaps, Header&) {
  return {};
}

// The taps, copied to where threads read them together.
template <class R>
PCK_DEVICE const Taps<R>& stage_taps(Block& block, const Taps<R>& taps, Header& header) {
  static_assert(sizeof(Taps<R>) == (kTaps<R> + kBand<R> + kNodes) * sizeof(float));
  float* const target = reinterpret_cast<float*>(header.taps);
  block.each(kTaps<R>, [&](int i) { target[i] = taps.pdf[i]; });
  block.each(kBand<R> + kNodes, [&](int i) { target[kTaps<R> + i] = taps.cdf[i]; });
  block.sync();
  return reinterpret_cast<const Taps<R>&>(header.taps);
}

// Of a reach, they stay in constant memory, in which all threads read the same one mostly.
template <class R>
PCK_DEVICE const Taps<Far<R>>& stage_taps(Block&, const Taps<Far<R>>& taps, Header&) {
  return taps;
}

// Traps unless the tables have all codes of a stage.
template <class Stage>
PCK_DEVICE void check_codes(const Stage& stage) {
  bool known = true;
  if constexpr (requires { stage.form; }) known = known && stage.known();
  if constexpr (requires { stage.options; }) known = known && stage.options.known();
  if constexpr (requires { stage.rows; }) known = known && stage.rows.known();
  if constexpr (requires { stage.student; }) known = known && stage.student.known();
  if constexpr (requires { stage.teacher; }) known = known && stage.teacher.known();
  if (!known) __trap();
}

// A stage: run_row(block, stage, i, taps, header, scratch) for every row, a block a row.
template <class Stage, class AnyTaps, bool kShared>
__global__ void __launch_bounds__(kThreads<kShared>, 1)
    stage_kernel(const __grid_constant__ Chunk chunk, const __grid_constant__ Stage stage,
                 const __grid_constant__ AnyTaps constant_taps) {
  check_codes(stage);
  PCK_DYNAMIC_SHARED(shared);
  Header& header = *reinterpret_cast<Header*>(shared);
  Block block(header.block);
  unsigned char* const for_cells = shared + sizeof(Header);
  const Scratch scratch(chunk.layout, for_cells,
                        kShared ? for_cells + chunk.layout.cell_bytes()
                                : chunk.workspace + blockIdx.x * chunk.layout.point_bytes());
  const auto& taps = stage_taps(block, constant_taps, header);
  for (int64_t i = blockIdx.x; i < chunk.rows; i += gridDim.x) {
    run_row(block, stage, i, taps, header, scratch);
    block.sync();  // the next row reuses the memory
  }
}

template <class Stage, class AnyTaps>
cudaError_t start(const Launch& launch, const Stage& stage, const AnyTaps& taps) {
  const auto kernel =
      launch.in_shared ? stage_kernel<Stage, AnyTaps, true> : stage_kernel<Stage, AnyTaps, false>;
  // The limit is the kernel's, whoever launches it: all threads of the host set it alike, lest one
  // lowers it between another's setting and launching.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared_most);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = launch.stream;
  const Chunk chunk{launch.rows,
                    {launch.count, launch.cells, launch.masked, launch.apart, launch.weighted},
                    static_cast<unsigned char*>(launch.workspace)};
  return cudaLaunchKernelEx(&config, kernel, chunk, stage, taps);
}

// How often run_row is called: for every row, unless there is an overload for the stage.
template <class Stage>
int64_t calls_of(const Launch& launch, const Stage&) {
  return launch.rows;
}

// The taps of a relaxation, unless there is an overload for the stage.
template <class Stage, class R>
Taps<R> taps_of(const Launch&, const Stage&, R) {
  return {};
}

template <class Stage>
cudaError_t run(const Launch& planned, const Stage& stage) {
  Launch launch = planned;
  launch.rows = calls_of(planned, stage);
  if (launch.rows == 0) return cudaSuccess;
  if (launch.rows != planned.rows)
    launch.blocks = static_cast<int>(std::min<int64_t>(launch.rows, kMostBlocks));
  if constexpr (requires { stage.options; })
    return visit(GridRelaxations{}, stage.options.relaxation,
                 [&](auto row) { return start(launch, stage, taps_of(launch, stage, row)); });
  else
    return start(launch, stage, NoTaps{});
}

}  // namespace pck::cuda
