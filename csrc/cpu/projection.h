// The relaxations by projection (Blondel, Teboul, Berthet and Djolonga, "Fast differentiable sorting
// and ranking", ICML 2020), O(count) after the sort. Out of line: nothing here gains from wider
// vectors.
//
// With values s and w, both in descending order, the projection of s onto the permutahedron of w is s -
// v, v the isotonic regression that pools neighbours into blocks wherever what is pooled would else
// ascend:
//
//     of a block    mean s - mean w,    by the Kullback-Leibler divergence    log sum exp s - log sum
//     exp w.
#pragma once

#include "scratch.h"

namespace pck {

// labels[k] <- the first place of the block of place k; s and w [count] descend.
void isotonic_blocks(bool kl, const double* s, const double* w, int64_t count, int64_t* labels);

// Ranks in [0, 1] of count > 1 values: s = (count - 1) x/tau and w = count - 1 ... 0, or s = x/tau and
// w = log(count ... 1). label[j], if wanted, <- the first place of the block of point j, counted from
// the largest value; exact in a float up to 2^24.
void projected_ranks(bool kl, const float* x, int64_t count, double tau, float* rank, float* label,
                     Scratch& scratch);

// grad <- (count - 1) times the gradient in x/tau of ranks with these slopes and labels.
void projected_gradient(bool kl, const float* x, int64_t count, double tau, const float* slope,
                        const float* label, float* grad, Scratch& scratch);

}  // namespace pck
