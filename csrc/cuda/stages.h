// What the CUDA kernels and their callers agree on: stages of raw pointers, sizes and a stream. No
// torch headers: the kernels also compile as C++ for the tests (tests/cuda_shim).
//
// Every function only enqueues on the stream: none waits for the device or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "../stages.h"
#include "points.h"

namespace pck::cuda {

inline constexpr int kMostBlocks = 0x7fffffff;  // of a launch

// How a stage is launched over `rows` rows of `count` values.
struct Launch {
  int64_t rows;
  int count;
  int cells;                     // room on the grid of soft_rank
  bool masked, apart, weighted;  // see Layout
  int blocks;
  int threads;     // of a block
  bool in_shared;  // whether the arrays of a row's references are in shared memory
  int64_t shared_bytes;
  int shared_most;  // that a block of the device may have
  int64_t workspace_bytes;
  void* workspace = nullptr;  // global memory, of as many bytes, that the caller provides
  cudaStream_t stream = nullptr;
};

// What a stage has that decides how it is launched.
struct Needs {
  const RankOptions* options = nullptr;  // of soft ranks
  bool masked = false;
  bool weighted = false;  // points with weights, whose sums may be small
  bool arrays = true;     // of a row's references; those of logits and points do without
  int shared_bytes = 0;

  template <class Stage>
  explicit Needs(const Stage& stage) {
    if constexpr (requires { stage.options; }) options = &stage.options;
    if constexpr (requires { stage.present; }) masked = stage.present.keep != nullptr;
    if constexpr (requires { stage.points; }) masked = stage.points.present.keep != nullptr;
    if constexpr (requires { stage.sources; }) weighted = true;
    if constexpr (requires { stage.logits; }) arrays = false;
    if constexpr (requires { Stage::kSharedBytes; }) {
      arrays = false;
      shared_bytes = Stage::kSharedBytes;
    }
  }
};

// Everything but workspace and stream, for the current device.
cudaError_t plan_launch(int64_t rows, int64_t count, const Needs& needs, Launch* launch);

// Any of csrc/stages.h.
template <class Stage>
cudaError_t run(const Launch& launch, const Stage& stage);

}  // namespace pck::cuda
