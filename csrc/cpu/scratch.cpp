#include "scratch.h"

#include <algorithm>
#include <new>

#include "../formulas.h"

namespace pck {

namespace {

constexpr int64_t kAlign = 64;

// Cuts one allocation into aligned arrays: sized on the first pass (null base), cut on the second.
class Cutter {
 public:
  explicit Cutter(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  void cut(T*& array, int64_t count) {
    if (base_ != nullptr) array = reinterpret_cast<T*>(base_ + size_);
    size_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }
  int64_t size() const { return size_; }

 private:
  char* base_;
  int64_t size_ = 0;
};

template <class Layout>
void* allocate(Layout layout) {
  Cutter sizes(nullptr);
  layout(sizes);
  void* const memory = ::operator new(static_cast<size_t>(sizes.size()), std::align_val_t(kAlign));
  Cutter cutter(memory);
  layout(cutter);
  return memory;
}

void release(void* memory) {
  ::operator delete(memory, std::align_val_t(kAlign));
}

}  // namespace

Scratch::Scratch(int64_t count) {
  const int64_t padded = count + 32;
  points_ = allocate([&](Cutter& cutter) {
    for (float** array : {&student, &teacher, &slope, &density, &place}) cutter.cut(*array, padded);
    cutter.cut(cell, padded);
    cutter.cut(wide, padded);
    cutter.cut(sum, padded);
    cutter.cut(order, padded);
    cutter.cut(chosen, padded);
    cutter.cut(sorted, padded + 2 * kSortedPad);
    cutter.cut(buckets, hard_rank_buckets(count) + 1);
  });
  // Whole vectors are read past the row's end; what they read must be harmless, not meaningful.
  for (float* array : {student, teacher, slope, density, place}) std::fill_n(array, padded, 0.0f);
  std::fill_n(sorted, padded + 2 * kSortedPad, 0.0f);
}

Scratch::~Scratch() {
  release(points_);
  release(cells_);
}

void Scratch::reserve_cells(int64_t cells) {
  if (cells <= cell_capacity_) return;
  const int64_t capacity = std::max<int64_t>(cells + cells / 4, 512);
  release(cells_);
  cells_ = nullptr;
  cell_capacity_ = 0;
  constexpr int64_t tile = 256;  // whole tiles of cells and nodes are read and written
  constexpr int64_t band = largest(Relaxations{}, [](auto row) { return kBand<decltype(row)>; });
  const int64_t nodes = capacity + kNodes + tile;
  cells_ = allocate([&](Cutter& cutter) {
    cutter.cut(moments, (capacity + 4) * kTerms);
    cutter.cut(terms, (nodes + 2 * kTermPad) * kTerms);
    cutter.cut(polynomials, (capacity + tile) * kTerms);
    cutter.cut(mass, nodes + 2 * band);
    cutter.cut(level, capacity + tile);
    cutter.cut(gain, capacity + tile);
    cutter.cut(density_nodes, nodes);
  });
  cell_capacity_ = capacity;
}

}  // namespace pck
