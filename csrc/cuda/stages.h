// What the CUDA kernels and their callers agree on: stages of raw pointers, sizes and a stream. No
// torch headers: the kernels also compile as C++ for the tests (tests/cuda_shim).
//
// Every function only enqueues on the stream: none waits for the device or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "../stages.h"

namespace pck::cuda {

// How a stage is launched over `rows` rows of `count` values.
struct Launch {
  int64_t rows;
  int count;
  int cells;  // room on the grid of soft_rank
  int blocks;
  int threads;     // of a block
  bool in_shared;  // whether a row's working memory is shared memory
  int64_t shared_bytes;
  int shared_most;  // that a block of the device may have
  int64_t workspace_bytes;
  void* workspace = nullptr;  // global memory, of as many bytes, that the caller provides
  cudaStream_t stream = nullptr;
};

// Everything but workspace and stream, for the current device. `options`: of the soft ranks, null for
// stages without.
cudaError_t plan_launch(int64_t rows, int64_t count, const RankOptions* options, Launch* launch);

template <class Stage>
const RankOptions* options_of(const Stage& stage) {
  if constexpr (requires { stage.options; })
    return &stage.options;
  else
    return nullptr;
}

// Any of csrc/stages.h.
template <class Stage>
cudaError_t run(const Launch& launch, const Stage& stage);

}  // namespace pck::cuda
