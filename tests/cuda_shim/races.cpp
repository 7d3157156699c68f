// Every kernel once or more, for ThreadSanitizer: rows of several kinds, in both memories, three blocks
// at a time.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/stages.h"

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

// A form of the contrastive loss, in both directions or in one.
struct Form {
  int code;
  bool columns;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) std::exit(2);
}

template <class Stage>
void launch(int64_t rows, int64_t count, const Stage& stage) {
  cuda::Launch plan;
  check(cuda::plan_launch(rows, count, cuda::Needs(stage), &plan));
  std::vector<float4> workspace(static_cast<size_t>(plan.workspace_bytes / 16 + 1));
  plan.workspace = workspace.data();
  check(cuda::run(plan, stage));
}

using Mask = std::vector<char>;

Mask random_mask(int64_t count) {
  Mask mask;
  for (int64_t i = 0; i < count; ++i) mask.push_back(generator() % 4 != 0);
  return mask;
}

Present present_of(const Mask& mask, bool masked, int64_t self_start) {
  return {masked ? reinterpret_cast<const bool*>(mask.data()) : nullptr, self_start};
}

void ranks(int64_t rows, int64_t count, int kind, const RankOptions& options) {
  const Values x = random_values(rows * count, kind), upstream = random_values(rows * count, 0);
  const Mask mask = random_mask(rows * count);
  Values rank(x.size()), density(x.size()), grad(x.size());
  for (const bool masked : {false, true}) {
    const Points points{x.data(), count, present_of(mask, masked, -1)};
    launch(rows, count, HardRank{points, rank.data()});
    launch(rows, count, SoftRank{points, options, rank.data(), density.data()});
    launch(rows, count,
           SoftRankBackward{points, upstream.data(), density.data(), options, grad.data()});
  }
}

// Of the sources' values at themselves and elsewhere, in two channels.
void sums(int64_t rows, int64_t sources, int64_t queries, int kind, const RankOptions& options) {
  const Values x = random_values(rows * sources, kind), y = random_values(rows * queries, kind);
  const Values weights = random_values(2 * rows * sources, 0);
  const Mask there = random_mask(rows * sources), asked = random_mask(rows * queries);
  Values density(2 * y.size()), cdf(2 * y.size()), integral(2 * y.size());
  for (const bool masked : {false, true}) {
    const auto lists = [&](const Values& values, int64_t count, const Mask& mask) {
      return Lists{values.data(), nullptr, count, present_of(mask, masked, -1).keep};
    };
    KernelSums stage{lists(x, sources, there),
                     lists(y, queries, asked),
                     masked,
                     weights.data(),
                     2,
                     rows * sources,
                     rows * queries,
                     options,
                     density.data(),
                     cdf.data(),
                     nullptr};
    launch(rows, sources + queries, stage);
    stage.integral = integral.data();
    launch(rows, sources + queries, stage);
  }
}

// Features whose inner products are `values`; the last two rows are near duplicates.
struct Features {
  Values points, squares, offsets, values;
  std::vector<int> twins;

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
    for (int j = 0; j < count; ++j) twins.push_back(count > 1 && j == count - 1 ? j - 1 : j);
    twins.push_back(1);
  }

  Rows rows(int64_t count, int64_t width) {
    return {values.data(), points.data(), points.data(), squares.data(), squares.data(), offsets.data(),
            twins.data(),  nullptr,       count,         width,          Euclidean::code};
  }
};

void coherence(int64_t count, bool masked, const RankOptions& options) {
  constexpr int64_t width = 5;
  Features student(count, width), teacher(count, width);
  const Values weights(static_cast<size_t>(count), 1.0f);
  Values losses(weights.size());
  const Mask mask = random_mask(count * count);
  const Present present = present_of(mask, masked, 0);
  launch(count, count, DissimilarityRows{Features(teacher).rows(count, width)});
  launch(count, count, HardRankRows{Features(teacher).rows(count, width), present});
  launch(count, count,
         CoherenceRows{student.rows(count, width), teacher.rows(count, width), present, weights.data(),
                       options, true, losses.data()});
}

void contrast(int64_t count, bool masked, const Form& form) {
  const auto size = static_cast<size_t>(count);
  Values z = random_values(count * count, 0), target = random_values(count * count, 0);
  Values top(size, -INFINITY), losses(size);
  std::vector<double> total(size), positive(size);
  const Mask mask = random_mask(count * count);
  const Logits logits{z.data(), present_of(mask, masked, -1).keep, count, 0};
  launch(count, count,
         ContrastColumns{logits, count, count, top.data(), total.data(), positive.data()});
  const Values ones(size, 1.0f);
  const float* const row = ones.data();
  launch(count, count,
         ContrastRows{logits, target.data(), form.columns ? count : 0, row, row, row, row, form.code,
                      true, losses.data()});
}

// Points near the origin, some of them equal, and their pull at each other.
void points(int64_t anchors, int64_t references) {
  constexpr int64_t width = 11, room = 128;
  const Values x = random_values(anchors * width, 0);
  Values y = random_values(references * width, 2);
  std::copy_n(y.begin(), 3 * width, y.end() - 5 * width);
  Values moved_x(x.size()), moved_y(y.size()), square_x(x.size() / width), square_y(y.size() / width);
  Values shift(width), largest(width / 8 + 1), offsets(std::max(square_x.size(), square_y.size()));
  const std::vector<double> inverse(std::max(square_x.size(), square_y.size()), 1.0);
  std::vector<int> twins(square_y.size() + 1);
  std::vector<unsigned long long> table(room);
  float unit;
  Progress progress;
  NearOrigin near{};
  near.references = {y.data(), references, moved_y.data(), square_y.data(), nullptr, inverse.data()};
  near.anchors = {x.data(), anchors, moved_x.data(), square_x.data(), nullptr, inverse.data()};
  near.width = width;
  near.parts = 2;
  near.far = 64.0f;
  near.shift = shift.data();
  near.largest = largest.data();
  near.unit = &unit;
  near.offsets = offsets.data();
  near.twins = twins.data();
  near.table = table.data();
  near.room = room;
  near.progress = &progress;
  launch(width, references, Shift{near});
  launch(near.points(), width, Move{near});
  std::vector<double> lengths(square_y.size()), along(square_y.size());
  launch(references, width, Scaled{y.data(), references, width, 1.0, moved_y.data(), lengths.data()});
  launch(references, width,
         ScaledBackward{y.data(), moved_y.data(), lengths.data(), references, width, 1.0, y.data(),
                        along.data()});
  launch(references, width, Quarantine{y.data(), references, width, moved_y.data(), square_y.data()});
  const Values v = random_values(anchors * references, 0);
  for (const bool turned : {false, true})
    for (const bool has_product : {false, true})
      launch(anchors, references,
             Pull{v.data(), turned, x.data(), y.data(), anchors, references, width, has_product,
                  has_product ? 1e3f : 0.0f, &unit, moved_x.data()});
}

}  // namespace

int main() {
  const RankOptions everyday{Logistic::code, Huber::code, 0.1, true};
  const RankOptions nearly_hard{Normal::code, Squared::code, 1e-4, false};
  shim::device.side_by_side = 3;
  points(0, 40);
  points(30, 40);
  for (const int shared_bytes : {232448, 40000, 15000}) {
    shim::device.shared_bytes = shared_bytes;
    for (const RankOptions& options : {everyday, nearly_hard}) {
      for (const int kind : {0, 1, 2}) ranks(2, 150, kind, options);
      ranks(2, 9, 0, options);
      for (const int kind : {0, 1}) sums(2, 200, 170, kind, options);
      sums(2, 90, 3, 2, options);
      coherence(12, false, options);
      coherence(70, !options.scale_std, options);
      for (const Form form : {Form{Softmax::code, true}, Form{Softmax::code, false},
                              Form{Sigmoid::code, false}, Form{Distillation::code, false}})
        contrast(70, options.scale_std, form);
    }
  }
  std::puts("done");
}
