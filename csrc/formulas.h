// The formulas that every compiled backend shares, in tables, and the stencil of the grid method. No
// torch headers, no state: usable on the host and inside device code. pc_kernels/formulas.py has the
// same relaxations and penalties; tests/test_formulas.py holds the two equal.
#pragma once

#include <cmath>

#include "table.h"

namespace pck {

// How a relaxation's ranks are found.
enum class Method {
  grid,        // of a smooth Phi: sums on a grid, which has a size
  scans,       // of exponentials: by scans of the row in order
  projection,  // there is no Phi: onto the permutahedron
};

// Relaxations: the smooth step Phi (a CDF) that replaces the comparison delta_k < delta_j, its density
// phi and its integral. Sums of those that are smooth are taken on a grid: `inverse_step` is 1/h, the
// grid nodes per unit of temperature; `support` is the distance beyond which Phi is 0 or 1 to fp32
// rounding, and `reach` that beyond which even a million Phi are 0 beside a count of 1. docs/method.md
// derives them.

struct Logistic {
  static constexpr const char* name = "logistic";
  static constexpr int code = 0;
  static constexpr Method method = Method::grid;
  static constexpr int inverse_step = 4;
  static constexpr int support = 17;  // 1 - Phi(17) = 4.1e-8
  static constexpr int reach = 34;    // 1 - Phi(34) = 1.7e-15
  template <class T>
  PCK_HD static T cdf(T x) {
    return T(1) / (T(1) + std::exp(-x));
  }
  template <class T>
  PCK_HD static T pdf(T x) {
    const T e = std::exp(-std::fabs(x));
    return e / ((T(1) + e) * (T(1) + e));
  }
  template <class T>
  PCK_HD static T integral(T x) {
    return std::fmax(x, T(0)) + std::log1p(std::exp(-std::fabs(x)));
  }
};

struct Normal {
  static constexpr const char* name = "normal";
  static constexpr int code = 1;
  static constexpr Method method = Method::grid;
  static constexpr int inverse_step = 6;
  static constexpr int support = 6;  // 1 - Phi(6) = 9.9e-10
  static constexpr int reach = 8;    // 1 - Phi(8) = 6.2e-16
  template <class T>
  PCK_HD static T cdf(T x) {
    return T(0.5) * std::erfc(x * T(-0.70710678118654752440));
  }
  template <class T>
  PCK_HD static T pdf(T x) {
    return T(0.39894228040143267794) * std::exp(T(-0.5) * x * x);
  }
  template <class T>
  PCK_HD static T integral(T x) {
    return x * cdf(x) + pdf(x);
  }
};

struct Laplace {
  static constexpr const char* name = "laplace";
  static constexpr int code = 2;
  static constexpr Method method = Method::scans;
  template <class T>
  PCK_HD static T cdf(T x) {
    const T tail = pdf(x);
    return x < T(0) ? tail : T(1) - tail;
  }
  template <class T>
  PCK_HD static T pdf(T x) {
    return T(0.5) * std::exp(-std::fabs(x));
  }
  template <class T>
  PCK_HD static T integral(T x) {
    return std::fmax(x, T(0)) + pdf(x);
  }
};

// The same relaxation, whose support is the reach if it has any.
template <class R, Method = R::method>
struct Far : R {};
template <class R>
struct Far<R, Method::grid> : R {
  static constexpr int support = R::reach;
};

// The projection of Blondel et al. (ICML 2020), Euclidean or by the Kullback-Leibler divergence
// (cpu/projection.h).
struct Projection {
  static constexpr const char* name = "projection";
  static constexpr int code = 3;
  static constexpr Method method = Method::projection;
  static constexpr bool kl = false;
};

struct KlProjection {
  static constexpr const char* name = "projection_kl";
  static constexpr int code = 4;
  static constexpr Method method = Method::projection;
  static constexpr bool kl = true;
};

using Relaxations = List<Logistic, Normal, Laplace, Projection, KlProjection>;
using SmoothSteps = List<Logistic, Normal, Laplace>;  // those with a Phi
using GridRelaxations = List<Logistic, Normal>;       // those that the CUDA kernels have

// Taps on either side of a node that the band convolution needs.
template <class R>
inline constexpr int kBand = R::support * R::inverse_step;

// Penalties of a rank residual e = r_S - r_T, and their slopes.

struct Squared {
  static constexpr const char* name = "squared";
  static constexpr int code = 0;
  PCK_HD static float value(float e) { return e * e; }
  PCK_HD static float slope(float e) { return 2.0f * e; }
};

struct Absolute {
  static constexpr const char* name = "absolute";
  static constexpr int code = 1;
  PCK_HD static float value(float e) { return std::fabs(e); }
  PCK_HD static float slope(float e) { return static_cast<float>((e > 0.0f) - (e < 0.0f)); }
};

struct Huber {
  static constexpr const char* name = "huber";
  static constexpr int code = 2;
  static constexpr float delta = 0.1f;  // in units of normalised rank
  PCK_HD static float value(float e) {
    const float a = std::fabs(e);
    return a <= delta ? 0.5f * e * e : delta * (a - 0.5f * delta);
  }
  PCK_HD static float slope(float e) { return e > delta ? delta : (e < -delta ? -delta : e); }
};

using Penalties = List<Squared, Absolute, Huber>;

// Forms of the contrastive loss: how a row of logits becomes a loss. Those that have a target take the
// teacher's logits of the row beside the student's.

struct Softmax {
  static constexpr const char* name = "softmax";
  static constexpr int code = 0;
  static constexpr bool has_target = false;
};

struct Sigmoid {
  static constexpr const char* name = "sigmoid";
  static constexpr int code = 1;
  static constexpr bool has_target = false;
};

struct Distillation {
  static constexpr const char* name = "distillation";
  static constexpr int code = 2;
  static constexpr bool has_target = true;
};

using ContrastForms = List<Softmax, Sigmoid, Distillation>;

// log(1 + exp(x)) and its slope.
PCK_HD double softplus(double x) {
  return std::fmax(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
}
PCK_HD double softplus_slope(double x) {
  return 1.0 / (1.0 + std::exp(-x));
}

// Dissimilarities: how the values of a row become dissimilarities. Those with `is_gram` are made of
// squared distances, which are made of inner products: `of` takes a squared distance. An anchor far
// from the origin would cost the digits in which its references differ; ranks do not change by what all
// of a row have in common, so `of_far` takes the squared distance less |anchor|^2 and returns the
// dissimilarity less its offset (or the offset's square for squared distances). It grows with that
// `power` of the features' scale. `backward` makes
// V of dL/d(dissimilarity), with dL/d anchor = sum_j V_j (anchor - reference_j). Of a reference beside
// a far anchor, the dissimilarity less the offset is too inexact for that: it `is_beside`.

struct NoneBeside {
  PCK_HD static bool is_beside(float, float) { return false; }
};

struct NoGram : NoneBeside {
  static constexpr bool is_gram = false;
  static constexpr int power = 1;
  PCK_HD static float of(float value) { return value; }
  PCK_HD static float of_far(float value, float, float) { return value; }
  PCK_HD static float backward(float grad, float, float) { return grad; }
};

struct Given : NoGram {  // the values are dissimilarities
  static constexpr const char* name = "given";
  static constexpr int code = 0;
};

struct Ranked : NoGram {  // of a teacher: the values are ranks, as the stage hard_rank_rows leaves them
  static constexpr const char* name = "ranked";
  static constexpr int code = 1;
};

struct Euclidean {
  static constexpr const char* name = "euclidean";
  static constexpr int code = 2;
  static constexpr bool is_gram = true;
  static constexpr int power = 1;
  PCK_HD static float of(float squared) { return std::sqrt(squared); }
  PCK_HD static float of_far(float excess, float anchor_sq, float offset) {
    const float squared = anchor_sq + excess;  // sqrt(x + y) - sqrt(x) = y/(sqrt(x + y) + sqrt(x))
    return excess / (std::sqrt(squared > 0.0f ? squared : 0.0f) + offset);
  }
  PCK_HD static bool is_beside(float dissimilarity, float offset) {
    return dissimilarity < -0.75f * offset;  // so that at most 2 bits are lost of others
  }
  PCK_HD static float backward(float grad, float dissimilarity, float offset) {
    const float distance = dissimilarity + offset;
    return distance == 0.0f ? 0.0f : grad / distance;  // a distance of 0 has gradient 0
  }
};

struct SquaredEuclidean : NoneBeside {
  static constexpr const char* name = "sqeuclidean";
  static constexpr int code = 3;
  static constexpr bool is_gram = true;
  static constexpr int power = 2;
  PCK_HD static float of(float squared) { return squared; }
  PCK_HD static float of_far(float excess, float, float) { return excess; }
  PCK_HD static float backward(float grad, float, float) { return 2.0f * grad; }
};

struct Cosine : NoneBeside {  // of features of length 1
  static constexpr const char* name = "cosine";
  static constexpr int code = 4;
  static constexpr bool is_gram = true;
  static constexpr int power = 2;
  PCK_HD static float of(float squared) { return 0.5f * squared; }
  PCK_HD static float of_far(float excess, float, float) { return 0.5f * excess; }
  PCK_HD static float backward(float grad, float, float) { return grad; }
};

using Dissimilarities = List<Given, Ranked, Euclidean, SquaredEuclidean, Cosine>;

static_assert(is_numbered(Relaxations{}) && is_numbered(Penalties{}) && is_numbered(Dissimilarities{}));

struct IsGram {  // no lambda: it would not be inlined always, see cpu/row_kernels.h
  template <class D>
  PCK_HD bool operator()(D) const {
    return D::is_gram;
  }
};

struct PowerOf {
  template <class D>
  PCK_HD int operator()(D) const {
    return D::power;
  }
};

PCK_HD bool is_gram(int dissimilarity) {
  return visit(Dissimilarities{}, dissimilarity, IsGram{});
}

// |a|^2 + |b|^2 - 2ab loses the digits that a short distance needs: below this share of
// |a|^2 + |b|^2 it is summed again from the differences. Above it, the relative error of the
// distance stays under 64 times that of an inner product.
inline constexpr float kNear = 1.0f / 64.0f;

// The stencil. A cell is one grid step wide; u in [-1/2, 1/2] is the place inside it. A smooth
// function known at the kNodes nearest nodes is, inside the cell,
//
//     f(u) = sum_a u^a sum_n stencil.weight[a][n] f(node n),    a < kTerms,
//
// the degree-7 Lagrange interpolant economised to a cubic (its Chebyshev series on the cell cut
// after T_3). Gathering reads values this way; spreading is the same matrix transposed: a cell's
// moments sum_k w_k u_k^a become weights on nodes. See docs/method.md, "The stencil".
//
// Its third use is to integrate: the rank function F is the integral of the density S1.

inline constexpr int kNodes = 8;
inline constexpr int kTerms = 4;

struct Stencil {
  float weight[kTerms][kNodes];
  float integral[kNodes];  // of the interpolant over the cell, du
  float half[kNodes];      // and from the cell's left edge to its middle
};

constexpr Stencil make_stencil() {
  Stencil stencil{};
  // T_k(v) in powers of v, and v^k in Chebyshev polynomials, for k < kNodes.
  double chebyshev[kNodes][kNodes] = {};
  chebyshev[0][0] = chebyshev[1][1] = 1.0;
  for (int k = 2; k < kNodes; ++k)
    for (int a = 0; a < kNodes; ++a)
      chebyshev[k][a] = (a > 0 ? 2.0 * chebyshev[k - 1][a - 1] : 0.0) - chebyshev[k - 2][a];
  double power[kNodes][kNodes] = {};
  power[0][0] = 1.0;
  for (int k = 1; k < kNodes; ++k)  // v T_j = (T_{j+1} + T_{|j-1|}) / 2, and v T_0 = T_1
    for (int j = 0; j < k; ++j) {
      power[k][j + 1] += (j == 0 ? 1.0 : 0.5) * power[k - 1][j];
      if (j > 0) power[k][j - 1] += 0.5 * power[k - 1][j];
    }
  for (int n = 0; n < kNodes; ++n) {
    double lagrange[kNodes] = {1.0};  // prod_{k != n} (u - x_k) / (x_n - x_k), in powers of u
    for (int k = 0, degree = 0; k < kNodes; ++k) {
      if (k == n) continue;
      const double x = k - 0.5 * (kNodes - 1);
      const double gap = n - k;
      ++degree;
      for (int a = degree; a >= 0; --a)
        lagrange[a] = ((a > 0 ? lagrange[a - 1] : 0.0) - x * lagrange[a]) / gap;
    }
    double integral = 0.0;
    for (int k = 0; k < kNodes; k += 2) {  // odd powers cancel
      double term = lagrange[k] / (k + 1);
      for (int i = 0; i < k; ++i) term *= 0.5;
      integral += term;
    }
    stencil.integral[n] = static_cast<float>(integral);
    double series[kNodes] = {};  // with v = 2u, in Chebyshev polynomials of v
    double scale = 1.0;
    for (int k = 0; k < kNodes; ++k, scale *= 0.5)
      for (int j = 0; j <= k; ++j) series[j] += lagrange[k] * scale * power[k][j];
    for (int a = 0; a < kTerms; ++a) {
      double coefficient = 0.0;
      for (int j = 0; j < kTerms; ++j) coefficient += series[j] * chebyshev[j][a];
      for (int k = 0; k < a; ++k) coefficient *= 2.0;  // back from v to u
      stencil.weight[a][n] = static_cast<float>(coefficient);
    }
    stencil.half[n] = stencil.weight[0][n] / 2 - stencil.weight[1][n] / 8 + stencil.weight[2][n] / 24 -
                      stencil.weight[3][n] / 64;
  }
  return stencil;
}

inline constexpr Stencil kStencil = make_stencil();

// Where in its cell, from the left edge on, a row's lowest point lies: at a zero of T_4(2u), the first
// term that the economised cubic leaves out, where it is flattest. A clump around the anchor is the
// lowest of its row and all in one place: at the edge, all its densities would have this term in full.
inline constexpr double kFirstPlace = 0.5 - 0.19134171618254489;  // cos(3 pi/8)/2 left of the middle

// The node at a cell's left edge is this many after the cell's first node.
inline constexpr int kLeftNode = kNodes / 2 - 1;

// Taps of the band convolution, up to whole vectors of four.
template <class R>
inline constexpr int kTaps = (2 * kBand<R> + 4) / 4 * 4;

// phi at the nodes of a band (even, so that a convolution may read forwards; then zeros), and Phi from
// one band below a node to the stencil's end above it.
template <class R>
struct alignas(16) Taps {
  static constexpr int band = kBand<R>;
  float pdf[kTaps<R>] = {};
  float cdf[band + kNodes];
  PCK_HD Taps() {
    for (int d = -band; d <= band; ++d)
      pdf[d + band] = static_cast<float>(R::pdf(static_cast<double>(d) / R::inverse_step));
    for (int n = 0; n < band + kNodes; ++n)
      cdf[n] = static_cast<float>(R::cdf(static_cast<double>(kLeftNode - n) / R::inverse_step));
  }
};

}  // namespace pck
