// Stage `soft_rank`: sum_k Phi((x_j - x_k)/tau) and its gradient through a uniform grid, O(count).
// Included inside the namespace of one instruction set. docs/method.md tells the maths: spread each
// point to the grid, convolve with Phi or phi, gather at the points.

// Where a row's points lie on the grid, in `Scratch::cell` and `Scratch::place`.
struct Grid {
  int64_t count;
  int64_t cells;
  int64_t nodes() const { return cells + kNodes - 1; }
};

// Spread: moments[cell][a] = sum of w u^a over the cell's points. `weight` is null for w = 1. Sums are
// in double: where many points fall together, fp32 would round all their terms the same way.
inline void spread(const Grid& grid, const float* weight, Scratch& scratch) {
  double* const moments = scratch.moments;
  const int32_t* const cell = scratch.cell;
  const float* const place = scratch.place;
  for (int64_t i = 0; i < (grid.cells + 3) * kTerms; ++i) moments[i] = 0.0;
  int64_t j = 0;
  for (; j + 4 <= grid.count; j += 4) {
    const Quad u = load<Quad>(place + j);
    Quad a = weight ? load<Quad>(weight + j) : Quad{1.0f, 1.0f, 1.0f, 1.0f};
    Quad b = a * u, c = b * u, d = c * u;
    transpose(a, b, c, d);
    const auto add = [&](int64_t k, Quad powers) {
      add_quad(moments + static_cast<int64_t>(cell[k]) * kTerms, powers);
    };
    add(j, a);
    add(j + 1, b);
    add(j + 2, c);
    add(j + 3, d);
  }
  for (; j < grid.count; ++j) {
    double power = weight ? weight[j] : 1.0;
    for (int a = 0; a < kTerms; ++a, power *= place[j])
      moments[static_cast<int64_t>(cell[j]) * kTerms + a] += power;
  }
}

// Cell moments to weights on the nodes, between two bands of zeros: node n collects from the cells
// n - kNodes + 1 ... n. Moments lie by cell; transposed to lie by term, whole vectors of nodes are
// summed at a time.
inline void nodes_from_moments(const Grid& grid, int64_t band, Scratch& scratch) {
  const int64_t padded = (grid.cells + 3) / 4 * 4;
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
  for (; n < grid.nodes(); n += kWide) {
    Wide sum = {};
    for (int a = 0; a < kTerms; ++a)
      for (int k = 0; k < kNodes; ++k) sum += load(term[a] + n - k) * kStencil.weight[a][k];
    store(mass + band + n, sum);
  }
  for (int64_t i = band + n; i < grid.nodes() + 2 * band + 4 * kWide; ++i) mass[i] = 0.0f;
}

template <Relaxation R>
inline const Taps<R>& taps() {
  static const Taps<R> table;
  return table;
}

// The taps of a whole vector of nodes: what the mass `d` nodes after its first node's band begins adds
// to each of them.
template <Relaxation R>
struct WideTaps {
  static constexpr int count = 2 * kBand<R> + kWide;
  Wide pdf[count] = {};
  WideTaps() {
    for (int d = 0; d < count; ++d)
      for (int l = 0; l < kWide; ++l)
        if (d >= l && d - l <= 2 * kBand<R>) pdf[d][l] = taps<R>().pdf[d - l];
  }
};

template <Relaxation R>
inline const WideTaps<R>& wide_taps() {
  static const WideTaps<R> table;
  return table;
}

// `tile` vectors of nodes side by side: each multiplication waits for the one before in its vector.
// One mass meets a vector of taps, not one tap a vector of masses: those would lie across cache lines,
// which halves the loads that a cycle can do, and loads are what bounds this loop.
template <Relaxation R, int tile>
inline void convolve_tile(const float* mass, float* density_nodes) {
  const WideTaps<R>& taps = wide_taps<R>();
  Wide density[tile] = {};
  for (int d = 0; d < taps.count; ++d)
    for (int t = 0; t < tile; ++t) density[t] += mass[d + t * kWide] * taps.pdf[d];
  for (int t = 0; t < tile; ++t) store(density_nodes + t * kWide, density[t]);
}

// Convolve: density <- mass * phi at the nodes.
template <Relaxation R>
inline void convolve(const Grid& grid, Scratch& scratch) {
  int64_t n = 0;
  const auto go = [&]<int tile>() {
    convolve_tile<R, tile>(scratch.mass + n, scratch.density_nodes + n);
    n += tile * kWide;
  };
  while (n < grid.nodes()) {
    const int64_t left = grid.nodes() - n;
    if (left > 8 * kWide)
      go.template operator()<12>();  // as many as 16 registers hold beside the rest
    else if (left > 4 * kWide)
      go.template operator()<8>();
    else
      go.template operator()<4>();
  }
}

// Node densities to the cubic of every cell.
inline void cell_polynomials(const Grid& grid, Scratch& scratch) {
  for (int64_t c = 0; c < grid.cells; c += kWide) {
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
// in cell c. F starts from its value at the first cell's left edge, where only the first band has a
// say.
template <Relaxation R>
inline void integrate(const Grid& grid, Scratch& scratch) {
  constexpr float h = 1.0f / Relax<R>::inverse_step;
  const float* const nodes = scratch.density_nodes;
  float* const level = scratch.level;
  float* const gain = scratch.gain;
  for (int64_t c = 0; c < grid.cells; c += kWide) {
    Wide whole = {}, half = {};
    for (int n = 0; n < kNodes; ++n) {
      const Wide value = load(nodes + c + n);
      whole += value * (h * kStencil.integral[n]);
      half += value * (h * (kStencil.weight[0][n] / 2 - kStencil.weight[1][n] / 8 +
                            kStencil.weight[2][n] / 24 - kStencil.weight[3][n] / 64));
    }
    store(gain + c, whole);
    store(level + c, half);  // of the cubic, from the left edge to u = 0
  }
  const float* const mass = scratch.mass + kBand<R>;
  const float* const cdf = taps<R>().cdf;
  const int64_t nearby = kBand<R> + kNodes < grid.nodes() ? kBand<R> + kNodes : grid.nodes();
  const double start = lane_sum(nearby, [=](int64_t n) { return mass[n] * cdf[n]; });
  // A running sum waits for each of its additions: four parts of the row run side by side.
  constexpr int parts = 4;
  const int64_t length = grid.cells / parts;
  double rank[parts] = {start};
  for (int p = 1; p < parts; ++p)
    rank[p] = rank[p - 1] + sum_over(gain + (p - 1) * length, length, [](auto v) { return v; });
  for (int64_t c = 0; c < length; ++c)
    for (int p = 0; p < parts; ++p) {
      const int64_t here = p * length + c;
      level[here] = static_cast<float>(rank[p] + level[here]);
      rank[p] += gain[here];
    }
  for (int64_t c = parts * length; c < grid.cells; ++c) {
    level[c] = static_cast<float>(rank[parts - 1] + level[c]);
    rank[parts - 1] += gain[c];
  }
}

// Gather: the cubics of a vector of points, one load a point, transposed.
struct Cubics {
  Wide a, b, c, d;
  Wide at(Wide u) const { return ((d * u + c) * u + b) * u + a; }
  Wide integral_at(Wide u) const {
    return (((d * 0.25f * u + c * (1.0f / 3.0f)) * u + b * 0.5f) * u + a) * u;
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

inline Wide gather_levels(const Scratch& scratch, int64_t j) {
  const auto level = [&](int64_t k) { return scratch.level[scratch.cell[k]]; };
  return join([&](int q) {
    const int64_t k = j + 4 * q;
    return Quad{level(k), level(k + 1), level(k + 2), level(k + 3)};
  });
}

// Mean and population standard deviation of a row of finite values.
struct Moments {
  double mean;
  double sigma;
};

inline Moments moments_of(const float* x, int64_t count, double low) {
  const double n = static_cast<double>(count);
  const double mean = low + sum_over(x, count, [=](auto v) { return v - low; }) / n;
  const double variance = sum_over(x, count, [=](auto v) { return (v - mean) * (v - mean); }) / n;
  return {mean, std::sqrt(variance)};
}

// How a row goes through the stage.
struct Plan {
  enum class Way {
    undefined,  // a value is not finite: everything is NaN
    constant,   // all equal under scale="std", or nothing to compare with: 1/2, no gradient
    grid,
    windowed  // nearly hard: pairs within the support, summed directly
  };
  Way way;
  Grid grid;
  Moments moments;
  double tau;
};

// Decides the way and, for the grid, places the points. A grid of more than 8 cells a point costs
// more than the sort that the nearly hard ways begin with (docs/method.md, "Regimes").
template <Relaxation R>
inline Plan plan_row(const float* x, int64_t count, const RankOptions& options, Scratch& scratch) {
  Plan plan{Plan::Way::constant, {count, 0}, {}, 0.0};
  if (count == 0) return plan;
  const Range range = range_of(x, count);
  if (!range.finite) {
    plan.way = Plan::Way::undefined;
    return plan;
  }
  if (count == 1 || (options.scale_std && range.low == range.high)) return plan;
  if (options.scale_std) plan.moments = moments_of(x, count, range.low);
  plan.tau = options.temperature * (options.scale_std ? plan.moments.sigma : 1.0);
  const double inverse_step = Relax<R>::inverse_step / plan.tau;
  const double low = range.low;
  const double span = (static_cast<double>(range.high) - low) * inverse_step;
  const double limit = 8.0 * static_cast<double>(count);
  plan.way = Plan::Way::grid;
  if (!(span <= limit) || !(inverse_step < 1e30)) {
    plan.grid.cells = place_nearly_hard(x, count, plan.tau, Relax<R>::support, Relax<R>::inverse_step,
                                        limit, scratch);
    if (plan.grid.cells == 0) plan.way = Plan::Way::windowed;
  } else {
    // In double: a small value beside a large one has digits that their difference in fp32 has not.
    // One cell of slack at the end, whatever rounding does.
    plan.grid.cells = static_cast<int64_t>(span) + 2;
    int64_t j = 0;
    for (; j + kHalf <= count; j += kHalf) {
      const HalfDouble t = (load_double(x + j) - low) * inverse_step;
      const HalfIndex cell = __builtin_convertvector(t, HalfIndex);
      const HalfDouble middle = __builtin_convertvector(cell, HalfDouble) + 0.5;
      store(scratch.cell + j, cell);
      store(scratch.place + j, __builtin_convertvector(t - middle, Half));
    }
    for (; j < count; ++j) {
      const double t = (static_cast<double>(x[j]) - low) * inverse_step;
      scratch.cell[j] = static_cast<int32_t>(t);
      scratch.place[j] = static_cast<float>(t - (scratch.cell[j] + 0.5));
    }
  }
  for (int64_t j = count; j < count + kWide; ++j) {  // whole vectors for `gather`
    scratch.cell[j] = 0;
    scratch.place[j] = 0.0f;
  }
  scratch.reserve_cells(plan.grid.cells);
  return plan;
}

// Calls wide(j, load, store) for a vector of points at a time; past the row's end nothing is read or
// written.
template <class Body>
inline void for_points(int64_t count, Body wide) {
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide)
    wide(j, [](const float* p) { return load(p); }, [](float* p, Wide v) { store(p, v); });
  if (j == count) return;
  const auto rest = static_cast<size_t>(count - j) * sizeof(float);
  wide(
      j,
      [=](const float* p) {
        Wide v = {};
        __builtin_memcpy(&v, p, rest);
        return v;
      },
      [=](float* p, Wide v) { __builtin_memcpy(p, &v, rest); });
}

// rank[j] <- (sum_k Phi((x_j - x_k)/tau) - 1/2)/(count - 1), k = j included, and density[j] <- phi's
// sum, if wanted (the nearly hard way has no use for it).
template <Relaxation R>
inline void rank_sums(const Plan& plan, float* rank, float* density, Scratch& scratch) {
  const Grid& grid = plan.grid;
  const int64_t count = grid.count;
  const float unit = static_cast<float>(1.0 / static_cast<double>(count - 1));
  if (plan.way == Plan::Way::windowed) {
    windowed_rank_sums(R, count, rank, scratch);
    for (int64_t j = 0; j < count; ++j) rank[j] = (rank[j] - 0.5f) * unit;
    return;
  }
  spread(grid, nullptr, scratch);
  nodes_from_moments(grid, kBand<R>, scratch);
  convolve<R>(grid, scratch);
  cell_polynomials(grid, scratch);
  integrate<R>(grid, scratch);
  constexpr float h = 1.0f / Relax<R>::inverse_step;
  for_points(count, [&](int64_t j, auto, auto put) {
    const Wide u = load(scratch.place + j);
    const Cubics cubics = gather(scratch, j);
    const Wide level = gather_levels(scratch, j);
    put(rank + j, (level + h * cubics.integral_at(u) - 0.5f) * unit);
    if (density != nullptr) put(density + j, cubics.at(u));
  });
}

// grad[j] <- factor sum_k (slope_j - slope_k) phi((x_j - x_k)/tau) / tau, with rank_sums' density, and
// through tau = temperature sigma as well under scale="std".
template <Relaxation R>
inline void rank_gradient(const Plan& plan, const float* x, const float* slope, const float* density,
                          float factor, bool scale_std, float* grad, Scratch& scratch) {
  const Grid& grid = plan.grid;
  const int64_t count = grid.count;
  // Scaling comes last and in two steps: either product may leave fp32's normal numbers, and at the
  // smallest temperatures 1/tau leaves fp32's range; what is 0 must stay 0.
  const float inverse_tau = static_cast<float>(std::fmin(1.0 / plan.tau, 3.4e38));
  const auto scaled = [=](auto value) { return value * factor * inverse_tau; };
  if (plan.way == Plan::Way::windowed) {
    windowed_rank_gradient(R, count, slope, grad, scratch);
  } else {
    spread(grid, slope, scratch);
    nodes_from_moments(grid, kBand<R>, scratch);
    convolve<R>(grid, scratch);
    cell_polynomials(grid, scratch);
    for_points(count, [&](int64_t j, auto get, auto put) {
      const Wide weighted = gather(scratch, j).at(load(scratch.place + j));
      put(grad + j, get(slope + j) * get(density + j) - weighted);
    });
  }
  if (!scale_std) {
    for (int64_t j = 0; j < count; ++j) grad[j] = scaled(grad[j]);
    return;
  }
  // Ranks are functions of x/tau, so dL/dtau = -sum_k grad_k (x_k - mean)/tau, and
  // dtau/dx_j = temperature (x_j - mean)/(count sigma).
  const double mean = plan.moments.mean;
  const double unit = 1.0 / plan.moments.sigma;
  float* const standard = scratch.density;  // read for the last time above
  for (int64_t j = 0; j < count; ++j) standard[j] = static_cast<float>((x[j] - mean) * unit);
  const double pull = lane_sum(count, [=](int64_t j) { return grad[j] * standard[j]; });
  const float share = static_cast<float>(pull / static_cast<double>(count));
  for (int64_t j = 0; j < count; ++j) grad[j] = scaled(grad[j] - share * standard[j]);
}

inline void fill(float* values, int64_t count, float value) {
  for (int64_t j = 0; j < count; ++j) values[j] = value;
}

// `density`, if wanted, is what soft_rank_backward needs of it.
template <Relaxation R>
inline void soft_rank(const float* x, int64_t count, const RankOptions& options, float* rank,
                      float* density, Scratch& scratch) {
  const Plan plan = plan_row<R>(x, count, options, scratch);
  if (density != nullptr && plan.way != Plan::Way::grid) fill(density, count, 0.0f);
  if (plan.way == Plan::Way::undefined) return fill(rank, count, __builtin_nanf(""));
  if (plan.way == Plan::Way::constant) return fill(rank, count, 0.5f);
  rank_sums<R>(plan, rank, density, scratch);
}

template <Relaxation R>
inline void soft_rank_backward(const float* grad_rank, const float* x, const float* density,
                               int64_t count, const RankOptions& options, float* grad_x,
                               Scratch& scratch) {
  const Plan plan = plan_row<R>(x, count, options, scratch);
  if (plan.way == Plan::Way::undefined) return fill(grad_x, count, __builtin_nanf(""));
  if (plan.way == Plan::Way::constant) return fill(grad_x, count, 0.0f);
  const float unit = static_cast<float>(1.0 / static_cast<double>(count - 1));
  rank_gradient<R>(plan, x, grad_rank, density, unit, options.scale_std, grad_x, scratch);
}
