// Every kernel once or more, for ThreadSanitizer: rows of several kinds, in both memories.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/rows.h"

using namespace pck;

namespace {

using Values = std::vector<float>;

std::mt19937 generator(1);

Values random_values(int64_t count, int kind) {
  std::normal_distribution<float> normal;
  Values values(static_cast<size_t>(count));
  for (float& v : values) v = kind == 0 ? normal(generator) : std::round(2.0f * normal(generator));
  if (kind == 2 && count > 0) values[0] = 1e4f;
  return values;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) std::exit(2);
}

template <class Body>
void launch(int64_t rows, int64_t count, const RankOptions* options, Body body) {
  cuda::Launch plan;
  check(cuda::plan_launch(rows, count, options, &plan));
  std::vector<float4> workspace(static_cast<size_t>(plan.workspace_bytes / 16 + 1));
  check(body(plan, workspace.data()));
}

void ranks(int64_t rows, int64_t count, int kind, const RankOptions& options) {
  const Values x = random_values(rows * count, kind), upstream = random_values(rows * count, 0);
  Values rank(x.size()), density(x.size()), grad(x.size());
  launch(rows, count, nullptr, [&](const cuda::Launch& plan, void* workspace) {
    return cuda::hard_rank(plan, workspace, nullptr, x.data(), rank.data());
  });
  launch(rows, count, &options, [&](const cuda::Launch& plan, void* workspace) {
    return cuda::soft_rank(plan, workspace, nullptr, x.data(), options, rank.data(), density.data());
  });
  launch(rows, count, &options, [&](const cuda::Launch& plan, void* workspace) {
    return cuda::soft_rank_backward(plan, workspace, nullptr, upstream.data(), x.data(), density.data(),
                                    options, grad.data());
  });
}

// Features whose inner products are `values`; the last two rows are near duplicates.
struct Features {
  Values points, squares, offsets, values;

  Features(int64_t count, int64_t width) : points(random_values(count * width, 0)) {
    const auto at = [=](int64_t i, int64_t k) { return static_cast<size_t>(i * width + k); };
    for (int64_t k = 0; k < width && count > 1; ++k)
      points[at(count - 1, k)] = points[at(count - 2, k)];
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < count; ++j) {
        float sum = 0.0f;
        for (int64_t k = 0; k < width; ++k) sum += points[at(i, k)] * points[at(j, k)];
        values.push_back(sum);
        if (i == j) squares.push_back(sum);
      }
    offsets.assign(static_cast<size_t>(count), 0.0f);
  }

  Side side(int64_t count, int64_t width) {
    return {values.data(),  points.data(), points.data(), squares.data(),   squares.data(),
            offsets.data(), count,         width,         Metric::euclidean};
  }
};

void coherence(int64_t count, bool masked, const RankOptions& options) {
  constexpr int64_t width = 5;
  Features student(count, width), teacher(count, width);
  const Values weights(static_cast<size_t>(count), 1.0f);
  Values losses(weights.size());
  std::vector<char> keep;
  for (int64_t i = 0; i < count * count; ++i) keep.push_back(generator() % 4 != 0);
  const cuda::Anchors anchors{student.side(count, width), teacher.side(count, width),
                              masked ? reinterpret_cast<const bool*>(keep.data()) : nullptr,
                              weights.data(), 0};
  launch(count, count, nullptr, [&](const cuda::Launch& plan, void* workspace) {
    Features own(count, width);
    return cuda::dissimilarity(plan, workspace, nullptr, own.side(count, width));
  });
  launch(count, count, &options, [&](const cuda::Launch& plan, void* workspace) {
    return cuda::coherence_rows(plan, workspace, nullptr, anchors, options, true, losses.data());
  });
}

}  // namespace

int main() {
  const RankOptions everyday{Relaxation::logistic, Penalty::huber, 0.1, true};
  const RankOptions nearly_hard{Relaxation::normal, Penalty::squared, 1e-4, false};
  for (const int shared_bytes : {232448, 2048}) {
    shim::device.shared_bytes = shared_bytes;
    for (const RankOptions& options : {everyday, nearly_hard}) {
      for (const int kind : {0, 1, 2}) ranks(2, 150, kind, options);
      ranks(2, 9, 0, options);
      coherence(12, false, options);
      coherence(70, !options.scale_std, options);
    }
  }
  std::puts("done");
}
