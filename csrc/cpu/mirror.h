// Square matrices and their mirror images.
#pragma once

#include <cstdint>

namespace pck {

// A square part of a matrix in memory.
struct Square {
  float* corner;
  int64_t size, stride;  // rows and columns, and from row to row
};

// S <- S + S^T.
void add_mirror(const Square& square);

// What is below the diagonal <- what is above it, mirrored.
void copy_mirror(const Square& square);

}  // namespace pck
