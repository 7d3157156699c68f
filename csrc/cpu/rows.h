// What the row kernels and their callers agree on. No torch headers: the kernels are compiled once
// for each instruction set, and nothing that the rest of the program shares may be among them.
#pragma once

#include <cstdint>

#include "../row.h"

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
  double* wide;  // sorted coordinates of the nearly hard path
  double* sum;   // and its sums
  int32_t* order;
  int32_t* chosen;    // the references that a mask keeps
  float* sorted;      // hard_rank's bucketed keys, with room to read past both ends
  uint32_t* buckets;  // [hard_rank_buckets(count) + 1]

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
  while (buckets < count && buckets < (1 << 20)) buckets *= 2;  // exact as a float, and then some
  return buckets;
}

// One instruction set's kernels.
struct RowKernels {
  const char* name;
  // Ranks of x[count] in [0, 1].
  void (*hard_rank)(const float* x, int64_t count, float* rank, Scratch& scratch);
  // Soft ranks; `density`, if not null, takes what the backward needs of the forward.
  void (*soft_rank)(const float* x, int64_t count, const RankOptions& options, float* rank,
                    float* density, Scratch& scratch);
  // grad_x = sum_j grad_rank_j d rank_j / d x.
  void (*soft_rank_backward)(const float* grad_rank, const float* x, const float* density,
                             int64_t count, const RankOptions& options, float* grad_x,
                             Scratch& scratch);
  // Dissimilarities of a row, in place.
  void (*dissimilarity)(const Row& row);
  // The teacher's ranks, in place: 0 for what is not there, NaN where they are undefined.
  void (*hard_rank_row)(const Row& teacher, const bool* keep, Scratch& scratch);
  // The anchor's loss; with_grad: weight * dL/d(row) replaces student.values (see Row). `keep` [count]
  // says which references are there, null: all.
  float (*coherence_row)(const Row& student, const Row& teacher, const bool* keep,
                         const RankOptions& options, float weight, bool with_grad, Scratch& scratch);
};

extern const RowKernels kBaselineRows;
#if defined(__x86_64__) && defined(__GNUC__)
#define PCK_X86_CLONES 1
extern const RowKernels kAvx2Rows;
extern const RowKernels kAvx512Rows;
#endif

// The widest kernels this processor runs; PC_KERNELS_CPU_ISA=baseline|avx2|avx512 narrows the choice.
const RowKernels& row_kernels();

// Out-of-line helpers, compiled once for the baseline instruction set.
void sort_keys(float* keys, int32_t* payload, int64_t count);
void sort_order(const float* x, int64_t count, int32_t* order);

}  // namespace pck
