// What the threads of a block do together: loops, reductions, prefix sums, rows in and out of global
// memory. All of it in a fixed order, so that results do not depend on how the threads are scheduled.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../formulas.h"

// The tests run these kernels on the CPU (tests/cuda_shim), where narrow warps are quicker.
#ifndef PCK_WARP_SIZE
#define PCK_WARP_SIZE 32
#endif
#ifndef PCK_DYNAMIC_SHARED
#define PCK_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#define PCK_DEVICE __device__ __forceinline__

namespace pck::cuda {

inline constexpr int kWarp = PCK_WARP_SIZE;
inline constexpr int kMostThreads = 1024;
inline constexpr int kMostWarps = kMostThreads / 32;
inline constexpr unsigned kEveryLane = 0xffffffffu;

struct Sum {
  template <class T>
  PCK_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

struct Largest {
  template <class T>
  PCK_DEVICE T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Shuffles move words of 4 bytes.
template <class T, class Shuffle>
PCK_DEVICE T word_by_word(T value, Shuffle shuffle) {
  constexpr int count = sizeof(T) / sizeof(unsigned);
  static_assert(sizeof(T) == count * sizeof(unsigned));
  unsigned word[count];
  memcpy(word, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < count; ++i) word[i] = shuffle(word[i]);
  memcpy(&value, word, sizeof(T));
  return value;
}

// The values of a warp's lanes, or of so many lanes side by side, combined: every lane gets the same
// result.
template <class T, class Combine>
PCK_DEVICE T reduce_warp(T value, Combine combine, int lanes = kWarp) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2)
    value = combine(value, word_by_word(value, [=](unsigned w) {
                      return __shfl_xor_sync(kEveryLane, w, distance);
                    }));
  return value;
}

class Block {
 public:
  // Shared memory for what the warps tell each other: twice a slot a warp. Uses of it take turns
  // between the two, so that a warp may write while a slower one still reads what came before.
  static constexpr int kSlot = 16;
  static constexpr int kBytes = 2 * kMostWarps * kSlot;

  PCK_DEVICE explicit Block(unsigned char* memory) : memory_(memory) {}

  PCK_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  PCK_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  PCK_DEVICE int lane() const { return thread() % kWarp; }
  PCK_DEVICE int warp() const { return thread() / kWarp; }
  PCK_DEVICE int warps() const { return threads() / kWarp; }
  PCK_DEVICE void sync() const { __syncthreads(); }

  // body(i) for every i < count, by some thread.
  template <class Body>
  PCK_DEVICE void each(int count, Body body) const {
#pragma unroll 1  // a block has warps enough to hide latencies, and no registers to spare
    for (int i = thread(); i < count; i += threads()) body(i);
  }

  // The threads' values combined; every thread gets the same result.
  template <class T, class Combine>
  PCK_DEVICE T reduce(T value, Combine combine) {
    value = reduce_warp(value, combine);
    T* const slots = tell(value, lane() == 0);
    value = slots[0];
#pragma unroll 1
    for (int w = 1; w < warps(); ++w) value = combine(value, slots[w]);
    return value;
  }

  // put(i, sum of get(k) over k < i) for i < count; returns the whole sum. Every i is read and then put
  // by the same thread, which reads it twice.
  template <class T, class Get, class Put>
  PCK_DEVICE T scan(int count, Get get, Put put) {
    // An odd share: neighbouring threads then start in different banks of shared memory.
    const int share = ((count + threads() - 1) / threads()) | 1;
    const int first = thread() * share < count ? thread() * share : count;
    const int past = first + share < count ? first + share : count;
    T own = 0;
#pragma unroll 1
    for (int i = first; i < past; ++i) own += get(i);
    T whole = 0;
    T before = sum_before(own, whole);
#pragma unroll 1
    for (int i = first; i < past; ++i) {
      const T here = get(i);
      put(i, before);
      before += here;
    }
    return whole;
  }

  // body(j, row[j]) for every j < count, four loads in flight. Neighbouring threads have neighbouring
  // values: what they do with them in shared memory meets every bank once.
  template <class Body>
  PCK_DEVICE void each_value(const float* row, int count, Body body) const {
    constexpr int kAhead = 4;
#pragma unroll 1
    for (int first = thread(); first < count; first += kAhead * threads()) {
      float value[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int j = first + i * threads();
        value[i] = j < count ? row[j] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int j = first + i * threads();
        if (j < count) body(j, value[i]);
      }
    }
  }

  // row[j] <- value(j) for every j < count.
  template <class Value>
  PCK_DEVICE void store_values(float* row, int count, Value value) const {
    each(count, [&](int j) { row[j] = value(j); });
  }

 private:
  // Every warp's value, once all have told theirs.
  template <class T>
  PCK_DEVICE T* tell(T value, bool speaker) {
    static_assert(sizeof(T) <= kSlot);
    turn_ = 1 - turn_;
    T* const slots = reinterpret_cast<T*>(memory_ + turn_ * (kBytes / 2));
    if (speaker) slots[warp()] = value;
    sync();
    return slots;
  }

  // The sum of the values of the threads before this one, and of all.
  template <class T>
  PCK_DEVICE T sum_before(T value, T& whole) {
    const auto from_below = [](T v, int distance) {
      return word_by_word(v, [=](unsigned w) { return __shfl_up_sync(kEveryLane, w, distance); });
    };
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const T below = from_below(value, distance);
      if (lane() >= distance) value += below;
    }
    T before = from_below(value, 1);
    if (lane() == 0) before = 0;
    T* const slots = tell(value, lane() == kWarp - 1);
    whole = 0;
#pragma unroll 1
    for (int w = 0; w < warps(); ++w) {
      if (w == warp()) before += whole;
      whole += slots[w];
    }
    return before;
  }

  unsigned char* const memory_;
  int turn_ = 0;
};

}  // namespace pck::cuda
