// Points brought near the origin, and their pull on each other; pc_kernels/dissimilarities/row_maker.py
// says the same in PyTorch, a dozen launches a side.
#include <cmath>

#include "../points.h"
#include "launch.cuh"

namespace pck::cuda {
namespace {

// Neighbouring features that a block takes together: as many as a sector of memory has.
constexpr int kTile = 8;

PCK_DEVICE double* numbers(const Scratch& scratch) {
  return reinterpret_cast<double*>(scratch.low);
}

// Thread t is of column t % kColumns: returns the sum of its column's values, in a fixed order.
template <int kColumns>
PCK_DEVICE double column_sum(Block& block, double value, const Scratch& scratch) {
  double* const sums = numbers(scratch);
  const int thread = block.thread();
  sums[thread] = value;
  block.sync();
#pragma unroll 1
  for (int half = block.threads() / 2; half >= kColumns; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    block.sync();
  }
  const double sum = sums[thread % kColumns];
  block.sync();
  return sum;
}

// The sum of term(x) over the points' features `column`, by the threads of that column.
template <class Term>
PCK_DEVICE double feature_sum(Block& block, const PointSet& points, int64_t width, int64_t column,
                              const Scratch& scratch, Term term) {
  double sum = 0.0;
  const int64_t count = column < width ? points.count : 0;
#pragma unroll 4
  for (int64_t i = block.thread() / kTile; i < count; i += block.threads() / kTile)
    sum += term(points.x[i * width + column]);
  return column_sum<kTile>(block, sum, scratch);
}

PCK_DEVICE unsigned bits_of(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

PCK_DEVICE float float_of(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// Whether x is the sum of so many parts of bfloat16 (pc_kernels/products.py); 0: of as many as it
// takes.
PCK_DEVICE bool is_whole_in(int parts, float x) {
  for (int part = 0; part < parts; ++part) {
    const unsigned bits = bits_of(x);
    x -= float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);  // to nearest, ties to even
  }
  return parts == 0 || x == 0.0f;
}

constexpr unsigned kDigits = 256;

// The number of given rank among x [count], none of it negative, a digit of 8 of its bits a round: such
// floats are in the order of their bits, and NaN the last. `bins` [kDigits + 2] are shared.
PCK_DEVICE float selected(Block& block, const float* x, int count, int rank, int* bins) {
  unsigned found = 0;
#pragma unroll 1
  for (int low = 24; low >= 0; low -= 8) {
    block.each(kDigits, [&](int d) { bins[d] = 0; });
    block.sync();
    block.each_value(x, count, [&](int, float value) {
      const unsigned bits = bits_of(value);
      const bool asked = low == 24 || bits >> (low + 8) == found;
      if (asked) atomicAdd(&bins[(bits >> low) % kDigits], 1);
    });
    block.sync();
    int* const chosen = bins + kDigits;  // the digit, and how many are below it
    block.scan<int>(
        kDigits, [&](int d) { return bins[d]; },
        [&](int d, int below) {
          if (below > rank || rank - below >= bins[d]) return;
          chosen[0] = d;
          chosen[1] = below;
        });
    block.sync();
    found = found << 8 | static_cast<unsigned>(chosen[0]);
    rank -= chosen[1];
    block.sync();
  }
  return float_of(found);
}

// What an anchor's square has to exceed to be far out: of the lower median of the references', so
// often.
PCK_DEVICE float far_threshold(Block& block, const Move& stage, const Scratch& scratch) {
  const int count = static_cast<int>(stage.references.count);
  const float* const squares = stage.references.squares;
  int defined = 0;
  block.each_value(squares, count, [&](int, float square) { defined += square == square; });
  defined = block.reduce(defined, Sum{});
  if (defined == 0) return INFINITY;
  int* const bins = reinterpret_cast<int*>(scratch.low);
  return stage.far * selected(block, squares, count, (defined - 1) / 2, bins);
}

// How many blocks take the features. Even where there are none, the first has something to do.
PCK_HD int64_t tiles_of(int64_t width) {
  return width == 0 ? 1 : (width + kTile - 1) / kTile;
}

// How many groups of points there are, each a warp a point.
PCK_HD int64_t groups_of(int64_t points, int threads) {
  const int warps = threads / kWarp;
  return (points + warps - 1) / warps;
}

// take(column, x[column]) by the lanes of a warp.
template <class Take>
PCK_DEVICE void each_feature(Block& block, const float* x, int64_t width, Take take) {
#pragma unroll 4
  for (int64_t column = block.lane(); column < width; column += kWarp) take(column, x[column]);
}

// Whether this is the last of a launch's groups to get here. It then sees what the others have stored.
PCK_DEVICE bool is_last(Block& block, int* arrived, int64_t groups) {
  block.sync();
  int last = 0;
  if (block.thread() == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1) == groups - 1;
    __threadfence();
  }
  return block.reduce(last, Largest{}) != 0;
}

// Whether a point of length 1 was none.
PCK_DEVICE bool has_zeros(Block& block, const PointSet& points) {
  int zeros = 0;
  if (points.inverse != nullptr)
    block.each(static_cast<int>(points.count), [&](int i) { zeros |= points.inverse[i] == 0.0; });
  return block.reduce(zeros, Largest{}) != 0;
}

// A place in the table of references: 33 bits of their hash over the index of the first that has it.
constexpr int kIndexBits = 30;
constexpr unsigned long long kNobody = ~0ull;

PCK_DEVICE int index_of(unsigned long long entry) {
  return static_cast<int>(entry & ((1ull << kIndexBits) - 1u));
}

// 64 bits for a feature of a point: two rounds of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
PCK_DEVICE unsigned long long hash_of(int64_t column, float x) {
  unsigned long long z = static_cast<unsigned long long>(column) << 32 | bits_of(x);
  z += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// Puts reference j, of this hash, in the table: all of a hash come to one place. Returns that.
PCK_DEVICE int enter(const Move& stage, int64_t j, unsigned long long hash) {
  const unsigned long long tag = hash >> (kIndexBits + 1), entry = tag << kIndexBits | j;
  int64_t place = hash & (stage.room - 1);
  for (;; place = (place + 1) & (stage.room - 1)) {
    const unsigned long long before = atomicCAS(&stage.table[place], kNobody, entry);
    if (before != kNobody && before >> kIndexBits != tag) continue;
    if (before != kNobody) atomicMin(&stage.table[place], entry);
    return static_cast<int>(place);
  }
}

// twins [count] <- the first reference that equals each, of their places in the table; twins[count] <-
// for how many that may be another.
PCK_DEVICE void find_twins(Block& block, const Move& stage) {
  const PointSet& points = stage.references;
  const int count = static_cast<int>(points.count);
  int* const twins = stage.twins;
  int later = 0;
  block.each(count, [&](int j) {
    const int first = index_of(stage.table[twins[j]]);
    twins[j] = first;
    later += first != j;
  });
  later = block.reduce(later, Sum{});
  if (block.thread() == 0) twins[count] = later;
  if (later == 0) return;
  block.sync();
#pragma unroll 1
  for (int j = block.warp(); j < count; j += block.warps()) {
    const int first = twins[j];
    if (first == j) continue;
    int differ = 0;  // a hash proves nothing
    const float* const other = points.moved + first * stage.width;
    each_feature(block, points.moved + j * stage.width, stage.width,
                 [&](int64_t column, float x) { differ |= bits_of(x) != bits_of(other[column]); });
    if (reduce_warp(differ, Largest{}) != 0 && block.lane() == 0) twins[j] = j;
  }
}

}  // namespace

PCK_DEVICE void run_row(Block& block, const Shift& stage, int64_t tile, NoTaps, Header&,
                        const Scratch& scratch) {
  const int64_t width = stage.width, column = tile * kTile + block.thread() % kTile;
  float largest = 0.0f;
  const auto sum = [&](const PointSet& points, auto term) {
    return feature_sum(block, points, width, column, scratch, term);
  };
  const PointSet& references = stage.references;
  const double count = static_cast<double>(references.count);
  const double mean = sum(references, [](float x) { return static_cast<double>(x); }) / count;
  const double squares = sum(references, [=](float x) { return (x - mean) * (x - mean); });
  const float shift = rounded_shift(mean, std::sqrt(squares / count));
  const auto lossy = [=, &largest, parts = stage.parts](float x) {
    largest = Largest{}(std::fabs(x), largest);
    largest = x == x ? largest : INFINITY;
    const float moved = x - shift;
    return moved + shift == x && is_whole_in(parts, moved) ? 0.0 : 1.0;
  };
  const double lost = sum(references, lossy) + sum(stage.anchors, lossy);
  const bool zeros = has_zeros(block, references) || has_zeros(block, stage.anchors);
  if (block.thread() < kTile && column < width)
    stage.shift[column] = lost > 0.0 || zeros ? 0.0f : shift;
  largest = block.reduce(largest, Largest{});
  if (block.thread() == 0) stage.largest[tile] = largest;
  if (tile == 0 && block.thread() == 0) *stage.progress = {0, zeros};
  const int64_t tiles = tiles_of(width), stride = tiles * block.threads();
  for (int64_t i = tile * block.threads() + block.thread(); i < stage.room; i += stride)
    stage.table[i] = kNobody;
}

PCK_DEVICE void run_row(Block& block, const Move& stage, int64_t group, NoTaps, Header&,
                        const Scratch& scratch) {
  float largest = 0.0f;
  for (int64_t tile = block.lane(); tile < tiles_of(stage.width); tile += kWarp)
    largest = Largest{}(stage.largest[tile], largest);
  const float unit = unit_of(reduce_warp(largest, Largest{}));
  if (group == 0 && block.thread() == 0) *stage.unit = unit;
  const bool zeros = stage.progress->zeros != 0;
  const int64_t place = group * block.warps() + block.warp();
  if (place < stage.points()) {
    const bool anchor = place >= stage.references.count;
    const PointSet& points = anchor ? stage.anchors : stage.references;
    const int64_t i = anchor ? place - stage.references.count : place;
    double sum = 0.0;
    unsigned long long hash = 0;
    each_feature(block, points.x + i * stage.width, stage.width, [&](int64_t column, float x) {
      const float moved = (x - stage.shift[column]) / unit;
      points.moved[i * stage.width + column] = moved;
      sum += moved * moved;
      hash += hash_of(column, moved);
    });
    sum = reduce_warp(sum, Sum{});
    hash = reduce_warp(hash, Sum{});
    if (block.lane() == 0) {
      const float poison = points.poison == nullptr ? 0.0f : points.poison[i];
      points.squares[i] = (zeros ? 1.0f : static_cast<float>(sum)) + poison;
      if (!anchor) stage.twins[i] = enter(stage, i, hash);
    }
  }
  if (!is_last(block, &stage.progress->arrived, groups_of(stage.points(), block.threads()))) return;
  find_twins(block, stage);
  const PointSet& anchors = stage.anchors.count > 0 ? stage.anchors : stage.references;
  const float threshold = far_threshold(block, stage, scratch);
  block.each(static_cast<int>(anchors.count), [&](int i) {
    const float square = anchors.squares[i];
    stage.offsets[i] = square > threshold ? std::sqrt(square) : 0.0f;
  });
}

PCK_DEVICE void run_row(Block& block, const Scaled& stage, int64_t group, NoTaps, Header&,
                        const Scratch&) {
  const int64_t i = group * block.warps() + block.warp();
  if (i >= stage.count) return;
  double square = 0.0;
  const float* const x = stage.x + i * stage.width;
  each_feature(block, x, stage.width,
               [&](int64_t, float v) { square += static_cast<double>(v) * static_cast<double>(v); });
  square = reduce_warp(square, Sum{});
  const double inverse = square == 0.0 ? 0.0 : 1.0 / std::sqrt(square);
  each_feature(block, x, stage.width, [&](int64_t column, float v) {
    stage.y[i * stage.width + column] = static_cast<float>(v * (stage.scale * inverse));
  });
  if (block.lane() == 0) stage.inverse[i] = inverse;
}

PCK_DEVICE void run_row(Block& block, const ScaledBackward& stage, int64_t group, NoTaps, Header&,
                        const Scratch&) {
  const int64_t i = group * block.warps() + block.warp();
  if (i >= stage.count) return;
  double along = 0.0;
  const float* const y = stage.y + i * stage.width;
  const float* const grad = stage.grad + i * stage.width;
  each_feature(block, grad, stage.width,
               [&](int64_t column, float g) { along += static_cast<double>(g) * y[column]; });
  along = reduce_warp(along, Sum{});
  const double inverse = stage.inverse[i];
  const double factor = stage.scale * inverse, back = along * inverse / stage.scale;
  each_feature(block, grad, stage.width, [&](int64_t column, float g) {
    stage.to_x[i * stage.width + column] = static_cast<float>(g * factor - y[column] * back);
  });
  if (block.lane() == 0) stage.along[i] = along;
}

PCK_DEVICE void run_row(Block& block, const Quarantine& stage, int64_t group, NoTaps, Header&,
                        const Scratch&) {
  const int64_t i = group * block.warps() + block.warp();
  if (i >= stage.count) return;
  int unfit = 0;
  const float* const x = stage.x + i * stage.width;
  each_feature(block, x, stage.width, [&](int64_t, float value) { unfit |= !std::isfinite(value); });
  unfit = reduce_warp(unfit, Largest{});
  each_feature(block, x, stage.width, [&](int64_t column, float value) {
    stage.finite[i * stage.width + column] = unfit ? 0.0f : value;
  });
  if (block.lane() == 0) stage.poison[i] = unfit ? NAN : 0.0f;
}

PCK_DEVICE float unit_of(const Pull& stage) {
  return stage.unit == nullptr ? 1.0f : *stage.unit;
}

// pulled_i <- sum_j v_ij (x_i - y_j), from the differences: warps take the j in turn, lanes features.
PCK_DEVICE void pull_by_differences(Block& block, const Pull& stage, int64_t i,
                                    const Scratch& scratch) {
#pragma unroll 1
  for (int64_t first = 0; first < stage.width; first += kWarp) {
    const int64_t column = first + block.lane();
    const bool inside = column < stage.width;
    const float own = inside ? stage.x[i * stage.width + column] : 0.0f;
    double sum = 0.0;
#pragma unroll 4
    for (int64_t j = block.warp(); j < stage.m; j += block.warps()) {
      const float v = stage.v[stage.turned ? j * stage.n + i : i * stage.m + j];
      if (inside) sum += v * (own - stage.y[j * stage.width + column]);
    }
    sum = column_sum<kWarp>(block, sum, scratch);
    if (inside && block.warp() == 0)
      stage.pulled[i * stage.width + column] = static_cast<float>(sum) / unit_of(stage);
  }
}

// Of row i, whose V sum to `sum` and their squares to `squares`.
PCK_DEVICE void pull_row(Block& block, const Pull& stage, int64_t i, double sum, double squares,
                         const Scratch& scratch) {
  double size = 0.0, own_size = 0.0;
  const float* const x = stage.x + i * stage.width;
  float* const pulled = stage.pulled + i * stage.width;
  block.each(stage.has_product ? static_cast<int>(stage.width) : 0, [&](int column) {
    const double own = x[column], whole = sum * own - pulled[column];
    pulled[column] = static_cast<float>(whole) / unit_of(stage);
    size += whole * whole;
    own_size += own * own;
  });
  size = block.reduce(size, Sum{});
  own_size = block.reduce(own_size, Sum{});
  const double least = static_cast<double>(stage.cancelled) * stage.cancelled * squares * own_size;
  if (!stage.has_product || size < least) pull_by_differences(block, stage, i, scratch);
}

// Rows whose V neighbour in memory together.
template <int kRows>
PCK_DEVICE void pull_rows(Block& block, const Pull& stage, int64_t first, const Scratch& scratch) {
  const int own = block.thread() % kRows;
  double sum = 0.0, squares = 0.0;
  if (stage.has_product && first + own < stage.n) {
    const float* const v = stage.v + (stage.turned ? first + own : (first + own) * stage.m);
    const int64_t stride = stage.turned ? stage.n : 1;
#pragma unroll 4
    for (int64_t j = block.thread() / kRows; j < stage.m; j += block.threads() / kRows) {
      const float value = v[j * stride];
      sum += value;
      squares += value * value;
    }
  }
  sum = column_sum<kRows>(block, sum, scratch);
  squares = column_sum<kRows>(block, squares, scratch);
  double* const sums = numbers(scratch) + kMostThreads;
  if (block.thread() < kRows) {
    sums[2 * own] = sum;
    sums[2 * own + 1] = squares;
  }
  block.sync();
#pragma unroll 1
  for (int r = 0; r < kRows && first + r < stage.n; ++r)
    pull_row(block, stage, first + r, sums[2 * r], sums[2 * r + 1], scratch);
}

PCK_DEVICE void run_row(Block& block, const Pull& stage, int64_t tile, NoTaps, Header&,
                        const Scratch& scratch) {
  if (stage.turned)
    pull_rows<kTile>(block, stage, tile * kTile, scratch);
  else
    pull_rows<1>(block, stage, tile, scratch);
}

static int64_t calls_of(const Launch&, const Shift& stage) {
  return tiles_of(stage.width);
}

static int64_t calls_of(const Launch& launch, const Move& stage) {
  return groups_of(stage.points(), launch.threads);
}

static int64_t calls_of(const Launch&, const Pull& stage) {
  return stage.turned ? (stage.n + kTile - 1) / kTile : stage.n;
}

// A warp a point.
template <class Stage>
  requires requires(Stage stage) { stage.count; }
static int64_t calls_of(const Launch& launch, const Stage& stage) {
  return groups_of(stage.count, launch.threads);
}

template cudaError_t run(const Launch&, const Shift&);
template cudaError_t run(const Launch&, const Move&);
template cudaError_t run(const Launch&, const Scaled&);
template cudaError_t run(const Launch&, const ScaledBackward&);
template cudaError_t run(const Launch&, const Quarantine&);
template cudaError_t run(const Launch&, const Pull&);

}  // namespace pck::cuda
