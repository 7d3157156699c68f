// What the CUDA kernels and their callers agree on: raw pointers, sizes and a stream. No torch headers:
// the kernels also compile as C++ for the tests (tests/cuda_shim).
//
// Every function only enqueues on the stream: none waits for the device or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../row.h"

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
  int64_t workspace_bytes;  // of global memory that the caller has to provide
};

// For the current device. `options`: of the soft ranks, null for stages without.
cudaError_t plan_launch(int64_t rows, int64_t count, const RankOptions* options, Launch* launch);

// rank[rows, count] <- ranks of the rows of x in [0, 1].
cudaError_t hard_rank(const Launch& launch, void* workspace, cudaStream_t stream, const float* x,
                      float* rank);

// Soft ranks; `density`, if not null, takes what the backward needs of the forward.
cudaError_t soft_rank(const Launch& launch, void* workspace, cudaStream_t stream, const float* x,
                      const RankOptions& options, float* rank, float* density);

// grad_x = sum_j grad_rank_j d rank_j / d x, row by row.
cudaError_t soft_rank_backward(const Launch& launch, void* workspace, cudaStream_t stream,
                               const float* grad_rank, const float* x, const float* density,
                               const RankOptions& options, float* grad_x);

// Dissimilarities of all rows, in place.
cudaError_t dissimilarity(const Launch& launch, void* workspace, cudaStream_t stream, const Side& side);

// The teacher's ranks, in place: 0 for what is not there, NaN where they are undefined. `keep` and
// `self_start` as in Anchors.
cudaError_t hard_rank_rows(const Launch& launch, void* workspace, cudaStream_t stream,
                           const Side& teacher, const bool* keep, int64_t self_start);

// A chunk of anchors, the whole chain dissimilarity -> rank -> loss -> gradient of each.
struct Anchors {
  Side student;
  Side teacher;
  const bool* keep;      // [anchors, count], true where a pair counts; null: all do
  const float* weights;  // [anchors]
  int64_t self_start;    // anchor i is reference self_start + i; -1: it is none of them
};

// losses[anchors]; with_grad: weight * dL/d(row) replaces student.values (see dissimilarity_backward).
cudaError_t coherence_rows(const Launch& launch, void* workspace, cudaStream_t stream,
                           const Anchors& anchors, const RankOptions& options, bool with_grad,
                           float* losses);

}  // namespace pck::cuda
