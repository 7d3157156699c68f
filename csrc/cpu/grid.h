// The uniform grid of the stage `soft_rank`: spread each point to it, convolve with phi, integrate,
// gather at the points. docs/method.md tells the maths. Included inside the namespace of one
// instruction set.

using Plan = pck::Plan<int64_t>;  // its points lie at Scratch::cell and Scratch::place

// Spread: moments[cell][a] = sum of w u^a over the cell's points. `weight` is null for w = 1. Sums are
// in double: where many points fall together, fp32 would round all their terms the same way.
inline void spread(const Plan& plan, const float* weight, Scratch& scratch) {
  double* const moments = scratch.moments;
  const int32_t* const cell = scratch.cell;
  const float* const place = scratch.place;
  for (int64_t i = 0; i < (plan.cells + 3) * kTerms; ++i) moments[i] = 0.0;
  constexpr int64_t block = 8 * kWide;
  for (int64_t first = 0; first < plan.count; first += block) {
    const int64_t past = plan.count - first < block ? plan.count : first + block;
    alignas(Wide) float powers[block * kTerms];
    for (int64_t j = first; j < past; j += kWide) {
      const Part part{j, past - j < kWide ? past - j : kWide};
      const Wide u = load(place + j);
      Wide a = weight ? part.load(weight, 0.0f) : part.load_ones();
      Wide b = a * u, c = b * u, d = c * u;
      transpose(a, b, c, d);
      float* const to = powers + (j - first) * kTerms;
      store(to, a);
      store(to + kWide, b);
      store(to + 2 * kWide, c);
      store(to + 3 * kWide, d);
    }
    for (int64_t j = first; j < past; j += kWide)
      for (int l = 0; l < kWide; ++l)
        add_quad(moments + static_cast<int64_t>(cell[j + l]) * kTerms,
                 powers + (j - first) * kTerms + l % 4 * kWide + l / 4 * 4);
  }
}

// Cell moments to weights on the nodes, between two bands of zeros: node n collects from the cells
// n - kNodes + 1 ... n. Moments lie by cell; transposed to lie by term, whole vectors of nodes are
// summed at a time.
inline void nodes_from_moments(const Plan& plan, int64_t band, Scratch& scratch) {
  const int64_t padded = (plan.cells + 3) / 4 * 4;
  const int64_t row = padded + 2 * kTermPad;
  float* term[kTerms];
  for (int a = 0; a < kTerms; ++a) {
    term[a] = scratch.terms + a * row + kTermPad;
    for (int64_t p = 1; p <= kTermPad; ++p) term[a][-p] = term[a][padded - 1 + p] = 0.0f;
  }
  for (int64_t c = 0; c < padded; c += 4) {
    Quad m[kTerms];
    for (int k = 0; k < 4; ++k) m[k] = load_quad(scratch.moments + (c + k) * kTerms);
    transpose(m[0], m[1], m[2], m[3]);
    for (int a = 0; a < kTerms; ++a) store(term[a] + c, m[a]);
  }
  float* const mass = scratch.mass;
  for (int64_t i = 0; i < band; ++i) mass[i] = 0.0f;
  int64_t n = 0;
  for (; n < plan.nodes(); n += kWide) {
    Wide sum = {};
    for (int a = 0; a < kTerms; ++a)
      for (int k = 0; k < kNodes; ++k) sum += load(term[a] + n - k) * kStencil.weight[a][k];
    store(mass + band + n, sum);
  }
  for (int64_t i = band + n; i < plan.nodes() + 2 * band + 4 * kWide; ++i) mass[i] = 0.0f;
}

template <class R>
inline const Taps<R>& taps() {
  static const Taps<R> table;
  return table;
}

// The taps of a whole vector of nodes: what the mass `d` nodes after its first node's band begins adds
// to each of them.
template <class R>
struct WideTaps {
  static constexpr int count = 2 * kBand<R> + kWide;
  Wide pdf[count] = {};
  WideTaps() {
    for (int d = 0; d < count; ++d)
      for (int l = 0; l < kWide; ++l)
        if (d >= l && d - l <= 2 * kBand<R>) pdf[d][l] = taps<R>().pdf[d - l];
  }
};

template <class R>
inline const WideTaps<R>& wide_taps() {
  static const WideTaps<R> table;
  return table;
}

// `tile` vectors of nodes side by side: each multiplication waits for the one before in its vector.
// One mass meets a vector of taps, not one tap a vector of masses: those would lie across cache lines,
// which halves the loads that a cycle can do, and loads are what bounds this loop.
template <class R, int tile>
inline void convolve_tile(const float* mass, float* density_nodes) {
  const WideTaps<R>& taps = wide_taps<R>();
  Wide density[tile] = {};
  for (int d = 0; d < taps.count; ++d)
    for (int t = 0; t < tile; ++t) density[t] += mass[d + t * kWide] * taps.pdf[d];
  for (int t = 0; t < tile; ++t) store(density_nodes + t * kWide, density[t]);
}

// Convolve: density <- mass * phi at the nodes.
template <class R>
inline void convolve(const Plan& plan, Scratch& scratch) {
  int64_t n = 0;
  const auto go = [&]<int tile>() {
    convolve_tile<R, tile>(scratch.mass + n, scratch.density_nodes + n);
    n += tile * kWide;
  };
  while (n < plan.nodes()) {
    // 12 are as many as 16 registers hold beside the rest. One of 4 takes as long as one of 8: better
    // two of 8 or 10 than one of 12 and one of 4 or 8.
    const int64_t left = (plan.nodes() - n + kWide - 1) / kWide;
    if (left > 20 || left == 11 || left == 12)
      go.template operator()<12>();
    else if (left > 16 || left == 9 || left == 10)
      go.template operator()<10>();
    else if (left > 4)
      go.template operator()<8>();
    else
      go.template operator()<4>();
  }
}

// Node densities to the cubic of every cell.
inline void cell_polynomials(const Plan& plan, Scratch& scratch) {
  for (int64_t c = 0; c < plan.cells; c += kWide) {
    float coefficient[kTerms][kWide];
    Wide sum[kTerms] = {};
    for (int n = 0; n < kNodes; ++n) {
      const Wide value = load(scratch.density_nodes + c + n);
      for (int a = 0; a < kTerms; ++a) sum[a] += value * kStencil.weight[a][n];
    }
    for (int a = 0; a < kTerms; ++a) store(coefficient[a], sum[a]);
    for (int l = 0; l < kWide; l += 4) {
      Quad q[kTerms];
      for (int a = 0; a < kTerms; ++a) q[a] = load<Quad>(coefficient[a] + l);
      transpose(q[0], q[1], q[2], q[3]);
      for (int k = 0; k < 4; ++k) store(scratch.polynomials + (c + l + k) * kTerms, q[k]);
    }
  }
}

// Integrate: F = Phi * mass is the integral of the density, so no second convolution is needed.
// level[c] <- the constant that makes level + h (a u + b u^2/2 + c u^3/3 + d u^4/4) the rank function
// in cell c. F starts from its value at the first cell's left edge, which only the masses of the
// first band reach.
template <class R>
inline void integrate(const Plan& plan, Scratch& scratch) {
  constexpr float h = 1.0f / R::inverse_step;
  const float* const nodes = scratch.density_nodes;
  const float* const mass = scratch.mass + kBand<R>;
  const float* const cdf = taps<R>().cdf;
  const int64_t nearby = kBand<R> + kNodes < plan.nodes() ? kBand<R> + kNodes : plan.nodes();
  double edge = lane_sum(nearby, [=](int64_t n) { return mass[n] * cdf[n]; });
  for (int64_t c = 0; c < plan.cells; c += kWide) {
    Wide whole = {}, half = {};  // of the interpolant, and of the cubic from the left edge to u = 0
    for (int n = 0; n < kNodes; ++n) {
      const Wide value = load(nodes + c + n);
      whole += value * (h * kStencil.integral[n]);
      half += value * (h * kStencil.half[n]);
    }
    const Wide sums = running_sums(whole);
    const float high = static_cast<float>(edge);
    const float low = static_cast<float>(edge - static_cast<double>(high));
    store(scratch.level + c, high + (low + lanes_up<1>(sums) + half));
    edge += static_cast<double>(sums[kWide - 1]);
  }
}

// Integrate again: Scratch::gain <- the constant that makes gain + h (level u +
// Cubics::twice_integral_at(u)) the integral of the rank function in cell c. `start` is its value at
// the first cell's left edge.
template <class R>
inline void integrate_twice(const Plan& plan, double start, Scratch& scratch) {
  constexpr double h = 1.0 / R::inverse_step;
  double edge = start;
  for (int64_t i = 0; i < plan.cells; ++i) {
    const float* const q = scratch.polynomials + i * kTerms;
    const double a = h * q[0], b = h * q[1], c = h * q[2], d = h * q[3], level = scratch.level[i];
    scratch.gain[i] = static_cast<float>(edge + h * (level / 2 - a / 8 + b / 48 - c / 192 + d / 640));
    edge += h * (level + b / 24 + d / 320);
  }
}

// Gather: the cubics of a vector of points, one load a point, transposed.
struct Cubics {
  Wide a, b, c, d;
  Wide at(Wide u) const { return ((d * u + c) * u + b) * u + a; }
  Wide integral_at(Wide u) const {
    return (((d * 0.25f * u + c * (1.0f / 3.0f)) * u + b * 0.5f) * u + a) * u;
  }
  Wide twice_integral_at(Wide u) const {
    return (((d * 0.05f * u + c * (1.0f / 12.0f)) * u + b * (1.0f / 6.0f)) * u + a * 0.5f) * u * u;
  }
};

inline Cubics gather(const Scratch& scratch, int64_t j) {
  const auto every_fourth = [&](int64_t first) {
    return join([&](int q) {
      return load<Quad>(scratch.polynomials +
                        static_cast<int64_t>(scratch.cell[first + 4 * q]) * kTerms);
    });
  };
  Cubics cubics{every_fourth(j), every_fourth(j + 1), every_fourth(j + 2), every_fourth(j + 3)};
  transpose(cubics.a, cubics.b, cubics.c, cubics.d);
  return cubics;
}

// Of Scratch::level, or another array by cell.
inline Wide gather_levels(const float* levels, const Scratch& scratch, int64_t j) {
#if PCK_VECTOR_BYTES == 64
  return _mm512_mask_i32gather_ps(Wide{}, 0xffff, _mm512_loadu_si512(scratch.cell + j), levels,
                                  sizeof(float));
#else
  const auto level = [&](int64_t k) { return levels[scratch.cell[k]]; };
  return join([&](int q) {
    const int64_t k = j + 4 * q;
    return Quad{level(k), level(k + 1), level(k + 2), level(k + 3)};
  });
#endif
}
