// Working memory of the row kernels.
#pragma once

#include <cstdint>

namespace pck {

// Working memory of one thread, grown on demand and reused from row to row.
struct Scratch {
  explicit Scratch(int64_t count);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void reserve_cells(int64_t cells);

  // [count] each
  float* student;
  float* teacher;
  float* slope;
  float* density;  // S1 at the points
  float* place;    // u, the place inside the cell
  int32_t* cell;
  double* wide;   // sorted coordinates of the nearly hard path
  double* sum;    // and its sums
  double* below;  // of the nearly hard path, in order: see nearly_hard.h
  double* ramp;
  bool in_order;  // whether the row went the nearly hard path, which sorts it
  int32_t* order;
  int32_t* piece;   // of the nearly hard path, in order: see nearly_hard.h
  int32_t* chosen;  // the references that a mask keeps
  float* sorted;    // hard_rank's bucketed keys, with room to read past both ends
  uint8_t* place_in_bucket;
  uint64_t* items;   // its keys with their places
  int32_t* buckets;  // [hard_rank_buckets(count)]

  // [cells] each, times the constant shown
  double* moments;     // x kTerms
  float* terms;        // x kTerms, with kTermPad zeros on both sides of each
  float* polynomials;  // x kTerms
  float* mass;         // nodes, with a band of zeros on both sides
  float* level;
  float* gain;
  float* density_nodes;

 private:
  void* points_;
  void* cells_ = nullptr;
  int64_t cell_capacity_ = 0;
};

inline constexpr int kSortedPad = 64;
inline constexpr int kTermPad = 32;

constexpr int64_t hard_rank_buckets(int64_t count) {
  int64_t buckets = 64;
  while (buckets < count && buckets < (1 << 20)) buckets *= 2;  // exact as a float
  return buckets;
}

}  // namespace pck
