// Stage `hard_rank`: mid-ranks in [0, 1].
//
// A monotone map drops the values into as many buckets as there are points; a counting sort groups
// them by bucket. A rank is then the number of points in the buckets below plus a comparison with the
// few in the same bucket. Where a bucket is not small (outliers, many ties), the keys are sorted and
// every point searches its place. Atomics decide the order inside a bucket, but no result depends on
// it.
#pragma once

#include <cmath>

#include "block.cuh"
#include "range.cuh"
#include "scratch.cuh"

namespace pck::cuda {

inline constexpr int kWidestBucket = 32;
inline constexpr int kMostBuckets = 1 << 20;  // exact as a float

// A monotone map to buckets 0 ... last, in halves since a range may exceed the largest number.
// Infinities go to the ends, and so does the NaN of 0 times infinity: fmax takes the number. It is
// asked for three times, and must answer the same: so nothing is left for the compiler to contract.
struct Buckets {
  float half_low, scale, last;

  PCK_DEVICE Buckets(const Range& range, int count)
      : half_low(0.5f * range.low),
        scale(static_cast<float>(count - 1) / (0.5f * range.high - half_low)),
        last(static_cast<float>(count - 1)) {}
  PCK_DEVICE int of(float x) const {
    return static_cast<int>(std::fmin(std::fmax(std::fma(0.5f, x, -half_low) * scale, 0.0f), last));
  }
};

template <class T>
PCK_DEVICE void exchange_values(T& a, T& b) {
  const T before = a;
  a = b;
  b = before;
}

// Bitonic sort, every exchange upwards: what lies past the end counts as infinite and never moves.
// swap(a, b) changes places of what goes along with the keys.
template <class Swap>
PCK_DEVICE void sort_keys(Block& block, float* keys, int count, Swap swap) {
  const auto exchange = [&](int a, int b) {
    if (b < count && keys[b] < keys[a]) {
      exchange_values(keys[a], keys[b]);
      swap(a, b);
    }
  };
  int padded = 1;
  while (padded < count) padded *= 2;
  for (int half = 1; half < padded; half *= 2) {
    block.each(padded / 2, [&](int pair) {  // with the mirror image in the other half
      const int offset = pair & (half - 1), first = 2 * (pair - offset);
      exchange(first + offset, first + 2 * half - 1 - offset);
    });
    block.sync();
    for (int step = half / 2; step > 0; step /= 2) {
      block.each(padded / 2, [&](int pair) {
        const int a = 2 * pair - (pair & (step - 1));
        exchange(a, a + step);
      });
      block.sync();
    }
  }
}

// The number of sorted keys for which below(key): these come first.
template <class Below>
PCK_DEVICE int partition_point(const float* keys, int count, Below below) {
  int first = 0, past = count;
  while (first < past) {
    const int middle = first + (past - first) / 2;
    if (below(keys[middle]))
      first = middle + 1;
    else
      past = middle;
  }
  return first;
}

PCK_DEVICE void rank_by_search(Block& block, float* x, int count, float whole, float* keys) {
  block.each(count, [&](int i) { keys[i] = x[i]; });
  block.sync();
  sort_keys(block, keys, count, [](int, int) {});
  block.each(count, [&](int i) {
    const float own = x[i];
    const int below = partition_point(keys, count, [=](float key) { return key < own; });
    const int not_above = partition_point(keys, count, [=](float key) { return key <= own; });
    x[i] = static_cast<float>(below + not_above - 1) / whole;
  });
  block.sync();
}

// x[count] <- its ranks, in scratch.values and scratch.product.
PCK_DEVICE void hard_rank(Block& block, float* x, int count, const Range& range,
                          const Scratch& scratch) {
  if (count < 2 || (range.others & Range::kNaN) != 0) {  // a NaN has no rank, nor has one beside it
    const float rank = (range.others & Range::kNaN) != 0 ? NAN : 0.5f;
    block.each(count, [&](int i) { x[i] = rank; });
    block.sync();
    return;
  }
  const float whole = static_cast<float>(2 * (count - 1));  // gives exactly 0 and 1 at the ends
  const int buckets = count < kMostBuckets ? count : kMostBuckets;
  const Buckets bucket(range, buckets);
  float* const keys = scratch.values;
  int* const start = reinterpret_cast<int*>(scratch.product);
  block.each(buckets, [&](int b) { start[b] = 0; });
  block.sync();
  block.each(count, [&](int i) { atomicAdd(&start[bucket.of(x[i])], 1); });
  block.sync();
  int fullest = 0;
  block.each(buckets, [&](int b) { fullest = Largest{}(fullest, start[b]); });
  fullest = block.reduce(fullest, Largest{});
  if (fullest > kWidestBucket) return rank_by_search(block, x, count, whole, keys);
  block.scan<int>(buckets, [&](int b) { return start[b]; }, [&](int b, int sum) { start[b] = sum; });
  block.sync();
  block.each(count, [&](int i) { keys[atomicAdd(&start[bucket.of(x[i])], 1)] = x[i]; });
  block.sync();
  block.each(count, [&](int i) {
    const float own = x[i];
    const int b = bucket.of(own);
    const int first = b == 0 ? 0 : start[b - 1], past = start[b];  // a start is now where it ends
    int twice = 2 * first - 1;  // twice the rank; its own place is among those not above it
#pragma unroll 1                // a bucket has two values or so
    for (int s = first; s < past; ++s) twice += (keys[s] < own) + (keys[s] <= own);
    x[i] = static_cast<float>(twice) / whole;
  });
  block.sync();
}

}  // namespace pck::cuda
