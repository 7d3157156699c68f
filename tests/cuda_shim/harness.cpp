// The stages of csrc/cuda for Python's ctypes. Every function returns 0, or what went wrong.
#include <cstring>
#include <vector>

#include "cuda/stages.h"

using namespace pck;

// Plans a launch, provides its workspace, full of what nobody wrote, and runs it.
template <class Stage>
static int run(int64_t rows, int64_t count, const Stage& stage) {
  cuda::Launch launch;
  const cudaError_t error = cuda::plan_launch(rows, count, cuda::Needs(stage), &launch);
  if (error != cudaSuccess) return error;
  const auto words = static_cast<size_t>(launch.workspace_bytes / 16 + 1);
  std::vector<float4> workspace(words);
  std::memset(workspace.data(), shim::kFill, words * sizeof(float4));
  launch.workspace = workspace.data();
  return cuda::run(launch, stage);
}

extern "C" {

void configure(int threads, int shared_bytes, int side_by_side) {
  shim::device.threads = threads;
  shim::device.shared_bytes = shared_bytes;
  shim::device.side_by_side = side_by_side;
}

int launches() {
  return shim::launches;
}

int latest_limit() {
  return shim::latest_limit;
}

// The structs of csrc/stages.h, as tests/shim.py lays them out.
int hard_rank(int64_t rows, const HardRank* stage) {
  return run(rows, stage->points.count, *stage);
}

int soft_rank(int64_t rows, const SoftRank* stage) {
  return run(rows, stage->points.count, *stage);
}

int soft_rank_backward(int64_t rows, const SoftRankBackward* stage) {
  return run(rows, stage->points.count, *stage);
}

int kernel_sums(int64_t rows, const KernelSums* stage) {
  return run(rows, stage->sources.count + stage->queries.count, *stage);
}

int dissimilarity(int64_t rows, const DissimilarityRows* stage) {
  return run(rows, stage->rows.count, *stage);
}

int hard_rank_rows(int64_t rows, const HardRankRows* stage) {
  return run(rows, stage->teacher.count, *stage);
}

int coherence_rows(int64_t rows, const CoherenceRows* stage) {
  return run(rows, stage->student.count, *stage);
}

int contrast_columns(int64_t rows, const ContrastColumns* stage) {
  return run(rows, stage->logits.count, *stage);
}

int contrast_rows(int64_t rows, const ContrastRows* stage) {
  return run(rows, stage->logits.count, *stage);
}

int shift(int64_t rows, const Shift* stage) {
  return run(rows, stage->references.count, *stage);
}

int move(int64_t rows, const Move* stage) {
  return run(rows, stage->width, *stage);
}

int scaled(int64_t rows, const Scaled* stage) {
  return run(rows, stage->width, *stage);
}

int scaled_backward(int64_t rows, const ScaledBackward* stage) {
  return run(rows, stage->width, *stage);
}

int quarantine(int64_t rows, const Quarantine* stage) {
  return run(rows, stage->width, *stage);
}

int pull(int64_t rows, const Pull* stage) {
  return run(rows, stage->m, *stage);
}

}  // extern "C"
