#include "scratch.h"

#include <algorithm>
#include <new>

#include "../formulas.h"

namespace pck {

namespace {

constexpr int64_t kAlign = 64;

// One allocation, cut into aligned arrays: layout(cut) is called to add up their sizes, then to place
// them.
template <class Layout>
void* allocate(Layout layout) {
  char* base = nullptr;
  int64_t size = 0;
  const auto cut = [&]<class T>(T*& array, int64_t count) {
    if (base != nullptr) array = reinterpret_cast<T*>(base + size);
    size += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  };
  layout(cut);
  base = static_cast<char*>(::operator new(static_cast<size_t>(size), std::align_val_t(kAlign)));
  size = 0;
  layout(cut);
  return base;
}

void release(void* memory) {
  ::operator delete(memory, std::align_val_t(kAlign));
}

}  // namespace

Scratch::Scratch(int64_t count) {
  const int64_t padded = count + 32;
  points_ = allocate([&](auto cut) {
    for (float** array : {&student, &teacher, &slope, &density, &place}) cut(*array, padded);
    cut(cell, padded);
    cut(wide, padded);
    cut(sum, padded);
    cut(below, padded);
    cut(ramp, padded);
    cut(order, padded);
    cut(piece, padded);
    cut(chosen, padded);
    cut(sorted, padded + 2 * kSortedPad);
    cut(place_in_bucket, padded);
    cut(items, padded);
    cut(buckets, hard_rank_buckets(count));
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
  constexpr int64_t band =
      largest(GridRelaxations{}, [](auto row) { return kBand<Far<decltype(row)>>; });
  const int64_t nodes = capacity + kNodes + tile;
  cells_ = allocate([&](auto cut) {
    cut(moments, (capacity + 4) * kTerms);
    cut(terms, (nodes + 2 * kTermPad) * kTerms);
    cut(polynomials, (capacity + tile) * kTerms);
    cut(mass, nodes + 2 * band);
    cut(level, capacity + tile);
    cut(gain, capacity + tile);
    cut(density_nodes, nodes);
  });
  cell_capacity_ = capacity;
}

}  // namespace pck
