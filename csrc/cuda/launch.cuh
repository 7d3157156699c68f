// How kernels start and how they find their memory.
#pragma once

#include "block.cuh"
#include "rows.h"
#include "scratch.cuh"

namespace pck::cuda {

// The most threads of a block. Addresses in global memory take registers, of which 1024 threads have
// too few.
template <bool kShared>
inline constexpr int kThreads = kShared ? kMostThreads : kMostThreads / 2;

// What a block keeps in shared memory in any case, before a row's working memory.
struct Header {
  unsigned char block[Block::kBytes];
  unsigned char taps[sizeof(Taps<Relaxation::logistic>)];
  int near_count;
  int unused[3];
};
static_assert(sizeof(Header) % 16 == 0 && sizeof(Taps<Relaxation::logistic>) % 16 == 0);
static_assert(sizeof(Taps<Relaxation::normal>) <= sizeof(Header::taps));

// What every kernel is told.
struct Rows {
  int64_t rows;
  Layout layout;
  unsigned char* workspace;
};

// body(i) for this block's rows, one after the other.
template <class Body>
PCK_DEVICE void for_rows(Block& block, const Rows& rows, Body body) {
  for (int64_t i = blockIdx.x; i < rows.rows; i += gridDim.x) {
    body(i);
    block.sync();  // the next row reuses the memory
  }
}

template <bool kShared>
PCK_DEVICE Scratch scratch_of(const Rows& rows, unsigned char* shared) {
  if constexpr (kShared)
    return Scratch(rows.layout, shared + sizeof(Header));
  else
    return Scratch(rows.layout, rows.workspace + blockIdx.x * rows.layout.bytes());
}

// The taps, copied to where threads read them together.
template <Relaxation R>
PCK_DEVICE const Taps<R>& stage_taps(Block& block, const Taps<R>& taps, Header& header) {
  static_assert(sizeof(Taps<R>) == (kTaps<R> + kBand<R> + kNodes) * sizeof(float));
  float* const target = reinterpret_cast<float*>(header.taps);
  block.each(kTaps<R>, [&](int i) { target[i] = taps.pdf[i]; });
  block.each(kBand<R> + kNodes, [&](int i) { target[kTaps<R> + i] = taps.cdf[i]; });
  block.sync();
  return reinterpret_cast<const Taps<R>&>(header.taps);
}

// Starts kernel(rows, arguments...).
template <class... Parameters>
cudaError_t start(const Launch& launch, void* workspace, cudaStream_t stream,
                  void (*kernel)(Rows, Parameters...), const Parameters&... arguments) {
  if (launch.rows == 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(launch.shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(static_cast<unsigned>(launch.threads));
  config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
  config.stream = stream;
  const Rows rows{launch.rows, {launch.count, launch.cells}, static_cast<unsigned char*>(workspace)};
  return cudaLaunchKernelEx(&config, kernel, rows, arguments...);
}

}  // namespace pck::cuda
