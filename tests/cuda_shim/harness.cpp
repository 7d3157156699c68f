// The launch functions of csrc/cuda for Python's ctypes. Every function returns 0, or what went wrong.
#include <cstring>
#include <vector>

#include "cuda/rows.h"

using namespace pck;

namespace {

// Plans a launch, provides its workspace, full of what nobody wrote, and runs it.
template <class Body>
int with_launch(int64_t rows, int64_t count, const RankOptions* options, Body body) {
  cuda::Launch launch;
  const cudaError_t error = cuda::plan_launch(rows, count, options, &launch);
  if (error != cudaSuccess) return error;
  const auto words = static_cast<size_t>(launch.workspace_bytes / 16 + 1);
  std::vector<float4> workspace(words);
  std::memset(workspace.data(), shim::kFill, words * sizeof(float4));
  return body(launch, workspace.data());
}

}  // namespace

extern "C" {

// A side, as ctypes passes it.
struct PlainSide {
  float* values;
  const float *anchors, *references, *anchor_sq, *reference_sq, *offsets;
  int64_t count, width;
  int metric;
};

struct PlainOptions {
  int relaxation, penalty;
  double temperature;
  int scale_std;
};

void configure(int threads, int shared_bytes) {
  shim::device.threads = threads;
  shim::device.shared_bytes = shared_bytes;
}

static Side side_of(const PlainSide* s) {
  return {s->values,    s->anchors,      s->references,
          s->anchor_sq, s->reference_sq, s->offsets,
          s->count,     s->width,        static_cast<Metric>(s->metric)};
}

static RankOptions options_of(const PlainOptions* o) {
  return {static_cast<Relaxation>(o->relaxation), static_cast<Penalty>(o->penalty), o->temperature,
          o->scale_std != 0};
}

int hard_rank(int64_t rows, int64_t count, const float* x, float* rank) {
  return with_launch(rows, count, nullptr, [&](const cuda::Launch& launch, void* workspace) {
    return cuda::hard_rank(launch, workspace, nullptr, x, rank);
  });
}

int soft_rank(int64_t rows, int64_t count, const float* x, const PlainOptions* plain, float* rank,
              float* density) {
  const RankOptions options = options_of(plain);
  return with_launch(rows, count, &options, [&](const cuda::Launch& launch, void* workspace) {
    return cuda::soft_rank(launch, workspace, nullptr, x, options, rank, density);
  });
}

int soft_rank_backward(int64_t rows, int64_t count, const float* grad_rank, const float* x,
                       const float* density, const PlainOptions* plain, float* grad_x) {
  const RankOptions options = options_of(plain);
  return with_launch(rows, count, &options, [&](const cuda::Launch& launch, void* workspace) {
    return cuda::soft_rank_backward(launch, workspace, nullptr, grad_rank, x, density, options, grad_x);
  });
}

int dissimilarity(int64_t rows, const PlainSide* side) {
  return with_launch(rows, side->count, nullptr, [&](const cuda::Launch& launch, void* workspace) {
    return cuda::dissimilarity(launch, workspace, nullptr, side_of(side));
  });
}

int hard_rank_rows(int64_t rows, const PlainSide* teacher, const bool* keep, int64_t self_start) {
  return with_launch(rows, teacher->count, nullptr, [&](const cuda::Launch& launch, void* workspace) {
    return cuda::hard_rank_rows(launch, workspace, nullptr, side_of(teacher), keep, self_start);
  });
}

int coherence_rows(int64_t rows, const PlainSide* student, const PlainSide* teacher, const bool* keep,
                   const float* weights, int64_t self_start, const PlainOptions* plain, int with_grad,
                   float* losses) {
  const RankOptions options = options_of(plain);
  const cuda::Anchors anchors{side_of(student), side_of(teacher), keep, weights, self_start};
  return with_launch(rows, student->count, &options, [&](const cuda::Launch& launch, void* workspace) {
    return cuda::coherence_rows(launch, workspace, nullptr, anchors, options, with_grad != 0, losses);
  });
}

}  // extern "C"
