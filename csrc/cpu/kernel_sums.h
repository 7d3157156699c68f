// Stage `kernel_sums`: weighted sums of kernels at any points, by the pieces of `soft_rank`. Included
// inside the namespace of one instruction set.
//
// Sources and queries are one row of points, in which queries weigh nothing and only they are asked.
// What is absent lies where something else is, weighs nothing, and its result is set to 0.

// The integral of the rank function at the first cell's left edge, which only the masses of the first
// band reach.
template <class R>
inline double first_integral(const Plan& plan, const Scratch& scratch) {
  const int64_t nearby = kBand<R> + kNodes < plan.nodes() ? kBand<R> + kNodes : plan.nodes();
  const float* const mass = scratch.mass + kBand<R>;
  return lane_sum(nearby, [=](int64_t n) {
    return mass[n] * R::integral(static_cast<double>(kLeftNode - n) / R::inverse_step);
  });
}

// The grid of all kernels that are wanted, from sources with these weights.
template <class R>
inline void sums_on_grid(const Plan& sources, const float* weight, const KernelSumsOut& out,
                         Scratch& scratch) {
  density_on_grid<R>(sources, weight, scratch);
  if (out.cdf != nullptr || out.integral != nullptr) integrate<R>(sources, scratch);
  if (out.integral != nullptr)
    integrate_twice<R>(sources, first_integral<R>(sources, scratch), scratch);
}

// What a vector of points reads off the grid.
struct KernelValues {
  Wide density, cdf, integral;
};

template <class R>
inline KernelValues values_at(const KernelSumsOut& out, int64_t j, const Scratch& scratch) {
  constexpr float h = 1.0f / R::inverse_step;
  const Cubics cubics = gather(scratch, j);
  const Wide u = load(scratch.place + j);
  KernelValues values{cubics.at(u), {}, {}};
  if (out.cdf != nullptr) values.cdf = rank_at<R>(scratch, j, cubics);
  if (out.integral != nullptr) {
    const Wide level = gather_levels(scratch.level, scratch, j);
    values.integral =
        gather_levels(scratch.gain, scratch, j) + h * (level * u + h * cubics.twice_integral_at(u));
  }
  return values;
}

// Of a row whose points are placed, the first `sources` of them with weights.
template <class R>
inline void ordinary_sums(const Plan& plan, int64_t sources, const float* weight,
                          const KernelSumsOut& out, Scratch& scratch) {
  Plan of_sources = plan;
  of_sources.count = sources;
  sums_on_grid<R>(of_sources, weight, out, scratch);
  for_points(plan.count - sources, [&](int64_t j, auto vector) {
    const KernelValues values = values_at<R>(out, sources + j, scratch);
    if (out.density != nullptr) vector.put(out.density + j, values.density);
    if (out.cdf != nullptr) vector.put(out.cdf + j, values.cdf);
    if (out.integral != nullptr) vector.put(out.integral + j, values.integral);
  });
}

// Of a nearly hard row; `weight` is of all points.
template <class R>
__attribute__((noinline)) void nearly_hard_sums(const Plan& whole, int64_t sources, const float* weight,
                                                const KernelSumsOut& out, Scratch& scratch) {
  const int64_t count = whole.count;
  const int32_t* const order = scratch.order;
  sum_below(count, weight, out.integral != nullptr, scratch);
  const auto by_pairs = [&](Kernel kernel, float* values) {
    if (values == nullptr) return;
    pairs_sums(kernel, kStep<R>, count, weight, sources, scratch);
    for (int64_t k = 0; k < count; ++k)
      if (order[k] >= sources) values[order[k] - sources] = static_cast<float>(scratch.sum[k]);
  };
  by_pairs(Kernel::density, out.density);
  by_pairs(Kernel::cdf, out.cdf);
  by_pairs(Kernel::integral, out.integral);
  float* const on_grid = scratch.sorted;
  for_pieces<R>(count, scratch, [&](const Piece& piece, const Plan& plan) {
    const int64_t first = piece.first_on_grid;
    for (int64_t j = 0; j < plan.count; ++j) on_grid[j] = weight[order[first + j]];
    sums_on_grid<R>(plan, on_grid, out, scratch);
    for_points_of(piece, [&](int64_t i, int64_t j) {
      const KernelValues values = values_at<R>(out, j, scratch);
      for (int64_t l = 0; l < kWide && i + l < piece.past; ++l) {
        const int64_t query = order[i + l] - sources;
        if (query < 0) continue;
        const double below = scratch.below[first];
        const double distance = scratch.wide[i + l] - scratch.wide[first];
        if (out.density != nullptr) out.density[query] = values.density[l];
        if (out.cdf != nullptr) out.cdf[query] = static_cast<float>(below + values.cdf[l]);
        if (out.integral != nullptr)
          out.integral[query] =
              static_cast<float>(scratch.ramp[first] + below * distance + values.integral[l]);
      }
    });
  });
}

// By scans; `weight` is of all points.
inline void scanned_sums(const Plan& plan, int64_t sources, const float* weight,
                         const KernelSumsOut& out, Scratch& scratch) {
  const auto by_scans = [&](Kernel kernel, float* values) {
    if (values == nullptr) return;
    scan_sums(kernel, plan.count, plan.tau, weight, scratch);
    for (int64_t k = 0; k < plan.count; ++k)
      if (scratch.order[k] >= sources)
        values[scratch.order[k] - sources] = static_cast<float>(scratch.sum[k]);
  };
  by_scans(Kernel::density, out.density);
  by_scans(Kernel::cdf, out.cdf);
  by_scans(Kernel::integral, out.integral);
}

// A row's points, to Scratch::student: the sources, then the queries; mirrored for the upper tail,
// whose mirror image is the lower.
inline void place_together(const KernelSums& stage, int64_t i, Scratch& scratch) {
  const Lists &sources = stage.sources, &queries = stage.queries;
  float* const x = scratch.student;
  const int64_t m = sources.count_of(i), n = queries.count_of(i);
  const float sign = stage.upper ? -1.0f : 1.0f;
  for (int64_t j = 0; j < m; ++j) x[j] = sign * sources.x[sources.first(i) + j];
  for (int64_t j = 0; j < n; ++j) x[m + j] = sign * queries.x[queries.first(i) + j];
  if (sources.keep == nullptr && queries.keep == nullptr) return;
  const auto is_there = [&](int64_t j) {
    const Lists& side = j < m ? sources : queries;
    return side.keep == nullptr || side.keep[side.first(i) + (j < m ? j : j - m)];
  };
  int64_t present = 0;
  while (present < m + n && !is_there(present)) ++present;
  const float somewhere = present < m + n ? x[present] : 0.0f;
  for (int64_t j = 0; j < m + n; ++j)
    if (!is_there(j)) x[j] = somewhere;
}

inline PairRow given_pairs(const KernelSums& stage, int64_t i) {
  const Lists &sources = stage.sources, &queries = stage.queries;
  return {sources.x + sources.first(i), queries.x + queries.first(i), sources.count_of(i),
          queries.count_of(i), (stage.upper ? -1.0 : 1.0) / stage.options.temperature};
}

// Of points that `place_together` has placed.
inline PairRow placed_pairs(const KernelSums& stage, int64_t sources, int64_t queries,
                            const Scratch& scratch) {
  return {scratch.student, scratch.student + sources, sources, queries,
          1.0 / stage.options.temperature};
}

// A channel's weights of a row's points: to Scratch::slope, unless they lie ready. A row that is nearly
// hard needs them of the queries, too, which weigh nothing.
inline const float* weigh(const KernelSums& stage, int64_t i, int64_t channel, bool whole,
                          Scratch& scratch) {
  const Lists& sources = stage.sources;
  const int64_t first = sources.first(i), m = sources.count_of(i);
  const float* const given =
      stage.weights == nullptr ? nullptr : stage.weights + channel * stage.all_sources + first;
  if (sources.keep == nullptr && !whole) return given;
  float* const weight = scratch.slope;
  for (int64_t j = 0; j < m; ++j) weight[j] = given == nullptr ? 1.0f : given[j];
  if (sources.keep != nullptr)
    for (int64_t j = 0; j < m; ++j) weight[j] = sources.keep[first + j] ? weight[j] : 0.0f;
  fill(weight + m, stage.queries.count_of(i), 0.0f);
  return weight;
}

inline bool weights_are_finite(const KernelSums& stage, int64_t i, Scratch& scratch) {
  double poison = 0.0;  // 0 for finite weights, NaN otherwise
  for (int64_t c = 0; stage.weights != nullptr && c < stage.channels; ++c) {
    const float* const weight = weigh(stage, i, c, false, scratch);
    poison += sum_over(weight, stage.sources.count_of(i), [](auto w) { return w - w; });
  }
  return poison == 0.0;
}

template <class R>
inline void channel_sums(const Plan& plan, int64_t sources, const float* weight,
                         const KernelSumsOut& out, Scratch& scratch) {
  if constexpr (R::method == Method::scans) {
    scanned_sums(plan, sources, weight, out, scratch);
  } else {
    if (plan.way == Way::grid)
      ordinary_sums<R>(plan, sources, weight, out, scratch);
    else
      nearly_hard_sums<R>(plan, sources, weight, out, scratch);
    if (out.integral != nullptr && scratch.in_order)
      add_closed_gaps(scratch.student, plan.count, plan.tau, kStep<R>, weight, sources, out.integral,
                      scratch);
  }
}

inline void run_row(const KernelSums& stage, int64_t i, Scratch& scratch) {
  const int64_t m = stage.sources.count_of(i), n = stage.queries.count_of(i);
  if (n == 0) return;
  const int64_t first = stage.queries.first(i);
  const bool* const asked = stage.queries.keep == nullptr ? nullptr : stage.queries.keep + first;
  const bool masked = stage.sources.keep != nullptr || asked != nullptr;
  if (masked) place_together(stage, i, scratch);
  const PairRow pairs = masked ? placed_pairs(stage, m, n, scratch) : given_pairs(stage, i);
  visit(SmoothSteps{}, stage.options.relaxation, [&](auto relaxation) {
    using Own = decltype(relaxation);
    using R = Far<Own>;
    const bool few = stage.integral == nullptr && few_pairs<Own>(pairs);
    if (!few && !masked) place_together(stage, i, scratch);
    const Plan plan = few ? Plan{} : plan_row<R, false>(scratch.student, m + n, stage.options, scratch);
    const bool finite = (few || plan.way != Way::undefined) && weights_are_finite(stage, i, scratch);
    for (int64_t c = 0; c < stage.channels; ++c) {
      const int64_t start = c * stage.all_queries + first;
      const auto part = [&](float* sums) { return sums == nullptr ? nullptr : sums + start; };
      const KernelSumsOut out{part(stage.density), part(stage.cdf), part(stage.integral)};
      const bool defined = finite && m > 0;
      const float* const weight =
          defined ? weigh(stage, i, c, !few && scratch.in_order, scratch) : nullptr;
      if (defined && few) few_sums(pairs, weight, out);
      if (defined && !few) channel_sums<R>(plan, m, weight, out, scratch);
      float* const wanted[] = {out.density, out.cdf, out.integral};
      for (float* const sums : wanted) {
        if (sums == nullptr) continue;
        if (!defined) fill(sums, n, finite ? 0.0f : __builtin_nanf(""));
        for (int64_t j = 0; asked != nullptr && j < n; ++j) sums[j] = asked[j] ? sums[j] : 0.0f;
      }
    }
  });
}
