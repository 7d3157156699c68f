// Stage `soft_rank`: sum_k Phi((x_j - x_k)/tau) and its gradient, O(count): on the grid of grid.h, pair
// by pair where that would be too large, or as scans.h and projection.h have it. Included inside the
// namespace of one instruction set.

// In one pass, from some value of the row: as no value is further from the mean than
// sqrt(count - 1) sigma (Samuelson 1968), the difference of squares loses a factor of count, of 2^53.
inline Moments moments_of(const float* x, int64_t count, double low) {
  const double n = static_cast<double>(count);
  const auto [sum, squares] = sums_about(x, count, low);
  const double above = sum / n;
  return {low + above, std::sqrt(squares / n - above * above)};
}

// Once the points are placed: whole vectors for `gather`, and memory for the cells.
inline void ready_for_grid(const Plan& plan, Scratch& scratch) {
  for (int64_t j = plan.count; j < plan.count + kWide; ++j) {
    scratch.cell[j] = 0;
    scratch.place[j] = 0.0f;
  }
  scratch.reserve_cells(plan.cells);
}

// Places the points of a row in this range on the grid, or decides that it is nearly hard.
template <class R>
PCK_HD void place_row(const float* x, const Range& range, Plan& plan, Scratch& scratch) {
  const int64_t count = plan.count;
  const double inverse_step = R::inverse_step / plan.tau;
  const double low = range.low;
  const double span = (static_cast<double>(range.high) - low) * inverse_step;
  const double limit = kMostCellsPerPoint * static_cast<double>(count);
  if (!(span <= limit) || !(inverse_step < kFinestGrid)) {
    scratch.in_order = true;
    plan.cells = place_nearly_hard(x, count, plan.tau, kStep<R>, limit, scratch);
    if (plan.cells == 0) plan.way = Way::pairs;
  } else {
    // In double: a small value beside a large one has digits that their difference in fp32 has not.
    // One cell of slack at the end, whatever rounding does.
    plan.cells = static_cast<int64_t>(span + kFirstPlace) + 2;
    int64_t j = 0;
    for (; j + kHalf <= count; j += kHalf) {
      const HalfDouble t = (load_double(x + j) - low) * inverse_step + kFirstPlace;
      const HalfIndex cell = __builtin_convertvector(t, HalfIndex);
      const HalfDouble middle = widen(cell) + 0.5;
      store(scratch.cell + j, cell);
      store(scratch.place + j, __builtin_convertvector(t - middle, Half));
    }
    for (; j < count; ++j) {
      const double t = (static_cast<double>(x[j]) - low) * inverse_step + kFirstPlace;
      scratch.cell[j] = static_cast<int32_t>(t);
      scratch.place[j] = static_cast<float>(t - (scratch.cell[j] + 0.5));
    }
  }
  ready_for_grid(plan, scratch);
}

// Decides the way, and readies the row for it; few points go pair by pair where that `may_be_few`.
template <class R, bool may_be_few = true>
inline Plan plan_row(const float* x, int64_t count, const RankOptions& options, Scratch& scratch) {
  if (count == 0) return {Way::constant, 0, 0, {}, 0.0};
  scratch.in_order = false;
  const Range range = range_of(x, count);
  Plan plan = begin_plan(count, range.finite, range.low == range.high, options,
                         [&] { return moments_of(x, count, range.low); });
  if (plan.way != Way::grid) return plan;
  if constexpr (R::method == Method::projection) {
    plan.way = Way::projection;
  } else if constexpr (R::method == Method::scans) {
    plan.way = Way::scans;
    begin_scans(x, count, plan.tau, scratch);
  } else if (may_be_few && is_few<R>(range, plan)) {
    plan.way = Way::few;
    begin_few(x, range, plan, scratch);
  } else {
    place_row<R>(x, range, plan, scratch);
  }
  return plan;
}

// How a vector of points is read and written: whole, or the last few of a row.
struct WholeVector {
  Wide get(const float* p) const { return load(p); }
  void put(float* p, Wide v) const { store(p, v); }
};

struct PartOfVector {
  size_t bytes;
  Wide get(const float* p) const {
    Wide v = {};
    __builtin_memcpy(&v, p, bytes);
    return v;
  }
  void put(float* p, Wide v) const { __builtin_memcpy(p, &v, bytes); }
};

// Calls body(j, vector) for a vector of points at a time; past the row's end nothing is read or
// written.
template <class Body>
inline void for_points(int64_t count, Body body) {
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide) body(j, WholeVector{});
  if (j < count) body(j, PartOfVector{static_cast<size_t>(count - j) * sizeof(float)});
}

// The density of points with weights, as the cubic of every cell. Always inlined, as it was when only
// ordinary rows called it: that spares these the test for weights, 6% of the stage.
template <class R>
PCK_HD void density_on_grid(const Plan& plan, const float* weight, Scratch& scratch) {
  spread(plan, weight, scratch);
  nodes_from_moments(plan, kBand<R>, scratch);
  convolve<R>(plan, scratch);
  cell_polynomials(plan, scratch);
}

// What a vector of points reads off the grid.
template <class R>
PCK_HD Wide rank_at(const Scratch& scratch, int64_t j, const Cubics& cubics) {
  constexpr float h = 1.0f / R::inverse_step;
  return gather_levels(scratch.level, scratch, j) + h * cubics.integral_at(load(scratch.place + j));
}

// Calls body(piece, plan) for every piece of a nearly hard row, placed on its grid.
template <class R, class Body>
inline void for_pieces(int64_t count, Scratch& scratch, Body body) {
  for (Piece piece = next_piece(kStep<R>, count, 0, scratch); piece.first < count;
       piece = next_piece(kStep<R>, count, piece.past, scratch)) {
    const Plan plan{Way::grid, piece.points(), piece.cells, {}, 0.0};
    ready_for_grid(plan, scratch);
    body(piece, plan);
  }
}

// Calls body(i, j) for a vector of a piece's points at a time, the i-th in order, at j on its grid.
template <class Body>
inline void for_points_of(const Piece& piece, Body body) {
  for (int64_t i = piece.first; i < piece.past; i += kWide) body(i, i - piece.first_on_grid);
}

// rank_sums of a nearly hard row; the density is that of the points in pieces, and of others 0.
template <class R>
__attribute__((noinline)) void nearly_hard_rank_sums(const Plan& whole, float* rank, float* density,
                                                     Scratch& scratch) {
  const int64_t count = whole.count;
  const float unit = whole.rank_unit();
  double* const sum = scratch.sum;
  const int32_t* const order = scratch.order;
  sum_below(count, nullptr, false, scratch);
  pairs_sums(Kernel::cdf, kStep<R>, count, nullptr, 0, scratch);
  for_pieces<R>(count, scratch, [&](const Piece& piece, const Plan& plan) {
    density_on_grid<R>(plan, nullptr, scratch);
    integrate<R>(plan, scratch);
    for_points_of(piece, [&](int64_t i, int64_t j) {
      const Cubics cubics = gather(scratch, j);
      float here[kWide], value[kWide];
      store(here, cubics.at(load(scratch.place + j)));
      store(value, rank_at<R>(scratch, j, cubics));
      for (int64_t l = 0; l < kWide && i + l < piece.past; ++l) {
        sum[i + l] = scratch.below[piece.first_on_grid] + value[l];
        if (density != nullptr) density[order[i + l]] = here[l];
      }
    });
  });
  for (int64_t k = 0; k < count; ++k) rank[order[k]] = (static_cast<float>(sum[k]) - 0.5f) * unit;
}

// The sums of rank_gradient of a nearly hard row.
template <class R>
__attribute__((noinline)) void nearly_hard_rank_gradient(int64_t count, const float* slope,
                                                         const float* density, float* grad,
                                                         Scratch& scratch) {
  const int32_t* const order = scratch.order;
  float* const weight = scratch.sorted;  // the stage hard_rank is over
  pairs_rank_gradient(kStep<R>, count, slope, scratch);
  for_pieces<R>(count, scratch, [&](const Piece& piece, const Plan& plan) {
    for (int64_t j = 0; j < plan.count; ++j) weight[j] = slope[order[piece.first_on_grid + j]];
    density_on_grid<R>(plan, weight, scratch);
    for_points_of(piece, [&](int64_t i, int64_t j) {
      float weighted[kWide];
      store(weighted, gather(scratch, j).at(load(scratch.place + j)));
      for (int64_t l = 0; l < kWide && i + l < piece.past; ++l) {
        const int32_t point = order[i + l];
        scratch.sum[i + l] = slope[point] * density[point] - weighted[l];
      }
    });
  });
  for (int64_t k = 0; k < count; ++k) grad[order[k]] = static_cast<float>(scratch.sum[k]);
}

// rank[j] <- (sum_k Phi((x_j - x_k)/tau) - 1/2)/(count - 1), k = j included, and density[j] <- phi's
// sum, if wanted: pairs and scans have no use for it, nor have few points, projections leave the
// points' blocks there.
template <class R>
inline void rank_sums(const Plan& plan, const float* x, float* rank, float* density, Scratch& scratch) {
  if constexpr (R::method == Method::projection) {
    projected_ranks(R::kl, x, plan.count, plan.tau, rank, density, scratch);
  } else if constexpr (R::method == Method::scans) {
    scanned_rank_sums(plan, rank, scratch);
  } else if (plan.way == Way::few) {
    few_rank_sums(plan, rank, scratch);
  } else if (plan.way == Way::pairs) {
    nearly_hard_rank_sums<R>(plan, rank, density, scratch);
  } else {
    const float unit = plan.rank_unit();
    density_on_grid<R>(plan, nullptr, scratch);
    integrate<R>(plan, scratch);
    for_points(plan.count, [&](int64_t j, auto vector) {
      const Cubics cubics = gather(scratch, j);
      vector.put(rank + j, (rank_at<R>(scratch, j, cubics) - 0.5f) * unit);
      if (density != nullptr) vector.put(density + j, cubics.at(load(scratch.place + j)));
    });
  }
}

// grad[j] <- factor sum_k (slope_j - slope_k) phi((x_j - x_k)/tau) / tau, with rank_sums' density, and
// through tau = temperature sigma as well under scale="std".
template <class R>
inline void rank_gradient(const Plan& plan, const float* x, const float* slope, const float* density,
                          float factor, bool scale_std, float* grad, Scratch& scratch) {
  const int64_t count = plan.count;
  // Scaling comes last and in two steps: either product may leave fp32's normal numbers.
  const bool in_double = plan.tau_is_tiny();  // and then at the very end
  const float inverse_tau = in_double ? 1.0f : plan.inverse_tau();
  const float unit = in_double ? 1.0f : factor;
  const auto scaled = [=](auto value) { return value * unit * inverse_tau; };
  if constexpr (R::method == Method::projection) {
    projected_gradient(R::kl, x, count, plan.tau, slope, density, grad, scratch);
  } else if constexpr (R::method == Method::scans) {
    scanned_rank_gradient(count, slope, grad, scratch);
  } else if (plan.way == Way::few) {
    few_rank_gradient(plan, slope, grad, scratch);
  } else if (plan.way == Way::pairs) {
    nearly_hard_rank_gradient<R>(count, slope, density, grad, scratch);
  } else {
    density_on_grid<R>(plan, slope, scratch);
    for_points(count, [&](int64_t j, auto vector) {
      const Wide weighted = gather(scratch, j).at(load(scratch.place + j));
      vector.put(grad + j, vector.get(slope + j) * vector.get(density + j) - weighted);
    });
  }
  if (!scale_std) {
    for (int64_t j = 0; j < count; ++j) grad[j] = scaled(grad[j]);
  } else {
    // Ranks are functions of x/tau, so dL/dtau = -sum_k grad_k (x_k - mean)/tau, and
    // dtau/dx_j = temperature (x_j - mean)/(count sigma).
    const double mean = plan.moments.mean;
    const double inverse_sigma = 1.0 / plan.moments.sigma;
    float* const standard = scratch.density;  // read for the last time above
    for (int64_t j = 0; j < count; ++j) standard[j] = static_cast<float>((x[j] - mean) * inverse_sigma);
    const double pull = lane_sum(count, [=](int64_t j) { return grad[j] * standard[j]; });
    const float share = static_cast<float>(pull / static_cast<double>(count));
    for (int64_t j = 0; j < count; ++j) grad[j] = scaled(grad[j] - share * standard[j]);
  }
  if (in_double)
    for (int64_t j = 0; j < count; ++j)
      grad[j] = static_cast<float>(static_cast<double>(grad[j]) * factor / plan.tau);
}

inline void fill(float* values, int64_t count, float value) {
  for (int64_t j = 0; j < count; ++j) values[j] = value;
}

template <class R>
inline void soft_rank(const float* x, int64_t count, const RankOptions& options, float* rank,
                      float* density, Scratch& scratch) {
  const Plan plan = plan_row<R>(x, count, options, scratch);
  if (density != nullptr && plan.way != Way::grid) fill(density, count, 0.0f);
  if (plan.way == Way::undefined) return fill(rank, count, __builtin_nanf(""));
  if (plan.way == Way::constant) return fill(rank, count, 0.5f);
  rank_sums<R>(plan, x, rank, density, scratch);
}

inline void run_row(const SoftRank& stage, int64_t i, Scratch& scratch) {
  const int64_t first = i * stage.points.count;
  const Selection selection(stage.points.present, i, stage.points.count, scratch);
  const float* const x = selection.front(stage.points.x + first, scratch.student);
  float* const rank = selection.room(stage.rank + first, scratch.teacher);
  float* const density =
      stage.density == nullptr ? nullptr : selection.room(stage.density + first, scratch.slope);
  visit(Relaxations{}, stage.options.relaxation, [&](auto relaxation) {
    soft_rank<decltype(relaxation)>(x, selection.count(), stage.options, rank, density, scratch);
  });
  selection.scatter(rank, stage.rank + first);
  if (density != nullptr) selection.scatter(density, stage.density + first);
}

template <class R>
inline void soft_rank_backward(const float* grad_rank, const float* x, const float* density,
                               int64_t count, const RankOptions& options, float* grad_x,
                               Scratch& scratch) {
  const Plan plan = plan_row<R>(x, count, options, scratch);
  if (plan.way == Way::undefined) return fill(grad_x, count, __builtin_nanf(""));
  if (plan.way == Way::constant) return fill(grad_x, count, 0.0f);
  rank_gradient<R>(plan, x, grad_rank, density, plan.rank_unit(), options.scale_std, grad_x, scratch);
}

inline void run_row(const SoftRankBackward& stage, int64_t i, Scratch& scratch) {
  const int64_t first = i * stage.points.count;
  const Selection selection(stage.points.present, i, stage.points.count, scratch);
  const float* const x = selection.front(stage.points.x + first, scratch.student);
  const float* const grad_rank = selection.front(stage.grad_rank + first, scratch.slope);
  const float* const density = selection.front(stage.density + first, scratch.density);
  float* const grad_x = selection.room(stage.grad_x + first, scratch.teacher);
  visit(Relaxations{}, stage.options.relaxation, [&](auto relaxation) {
    soft_rank_backward<decltype(relaxation)>(grad_rank, x, density, selection.count(), stage.options,
                                             grad_x, scratch);
  });
  selection.scatter(grad_x, stage.grad_x + first);
}
