#include "mirror.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "../arguments.h"

namespace pck {
namespace {

#define PCK_VECTOR_BYTES 16
#include "vector.h"

constexpr int64_t kSide = 4;        // of a block that goes through registers
constexpr int64_t kTile = 128;      // and of a tile of blocks, whose lines and pages stay at hand
constexpr int64_t kGrainTiles = 2;  // what is worth waking another thread for

struct Add {
  static void pair(float& above, float& below) { above = below = above + below; }
  // Four rows above the diagonal, and where they lie mirrored.
  static void block(float* above, float* below, int64_t stride) {
    Quad a = load<Quad>(below), b = load<Quad>(below + stride), c = load<Quad>(below + 2 * stride),
         d = load<Quad>(below + 3 * stride);
    transpose(a, b, c, d);
    a += load<Quad>(above);
    b += load<Quad>(above + stride);
    c += load<Quad>(above + 2 * stride);
    d += load<Quad>(above + 3 * stride);
    put(above, stride, a, b, c, d);
    transpose(a, b, c, d);
    put(below, stride, a, b, c, d);
  }
  static void put(float* to, int64_t stride, Quad a, Quad b, Quad c, Quad d) {
    store(to, a);
    store(to + stride, b);
    store(to + 2 * stride, c);
    store(to + 3 * stride, d);
  }
};

struct Copy {
  static void pair(float& above, float& below) { below = above; }
  static void block(float* above, float* below, int64_t stride) {
    Quad a = load<Quad>(above), b = load<Quad>(above + stride), c = load<Quad>(above + 2 * stride),
         d = load<Quad>(above + 3 * stride);
    transpose(a, b, c, d);
    Add::put(below, stride, a, b, c, d);
  }
};

// Every pair of mirrored places, the diagonal included.
template <class Do>
void for_mirrored(const Square& square) {
  const auto [corner, n, stride] = square;
  std::vector<std::pair<int64_t, int64_t>> tiles;  // on and above the diagonal
  for (int64_t i = 0; i < n; i += kTile)
    for (int64_t j = i; j < n; j += kTile) tiles.emplace_back(i, j);
  const auto tile = [=, corner = corner, n = n, stride = stride](int64_t first_i, int64_t first_j) {
    const int64_t past_i = std::min(n, first_i + kTile), past_j = std::min(n, first_j + kTile);
    for (int64_t j = first_j; j < past_j; j += kSide)  // along the rows below, which are written
      for (int64_t i = first_i; i < std::min(past_i, j + kSide); i += kSide) {
        if (i != j && i + kSide <= n && j + kSide <= n) {
          Do::block(corner + i * stride + j, corner + j * stride + i, stride);
          continue;
        }
        for (int64_t k = i; k < std::min(n, i + kSide); ++k)
          for (int64_t l = std::max(j, k); l < std::min(n, j + kSide); ++l)
            Do::pair(corner[k * stride + l], corner[l * stride + k]);
      }
  };
  parallel_for(static_cast<int64_t>(tiles.size()), kGrainTiles, [&](int64_t first, int64_t past) {
    for (int64_t k = first; k < past; ++k) tile(tiles[k].first, tiles[k].second);
  });
}

// The square that begins at column `start` of a matrix's rows.
void mirror_(Tensor values, int64_t start) {
  check_matrix("values", values, DeviceType::CPU);
  const int64_t rows = values.size(0), columns = values.size(1);
  PCK_CHECK(start >= 0 && start + rows <= columns, "values ", values.sizes(),
            " must hold a square from column ", start, " on");
  copy_mirror({values.mutable_data_ptr<float>() + start, rows, columns});
}

template <class Add>
void visit_operators(Add add) {
  add("cpu_mirror_(Tensor(a!) values, int start) -> ()", Operator<&mirror_>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace

void add_mirror(const Square& square) {
  for_mirrored<Add>(square);
}

void copy_mirror(const Square& square) {
  for_mirrored<Copy>(square);
}

}  // namespace pck
