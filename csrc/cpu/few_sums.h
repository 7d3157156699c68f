// Stage `kernel_sums` where a row has few queries or few sources: all pairs, which cost less than a
// grid. The values are those of the grid and more exact. Included inside the namespace of one
// instruction set.

// Of one row and channel, at the queries; null: not wanted.
struct KernelSumsOut {
  float* density;
  float* cdf;
  float* integral;
};

// A pair costs about as much as a sixteenth of a point on a grid (docs/method.md, "Few queries").
constexpr int64_t kPairsPerPoint = 16;

// Density and CDF of a vector of steps z, by one exponential; what has no such form goes by the grid.
template <class R>
struct PairKernel {
  static constexpr bool known = false;
};

struct PairValues {
  Wide density, cdf;
};

template <>
struct PairKernel<Logistic> {
  static constexpr bool known = true;
  static PairValues at(Wide z) {
    const Wide e = exp_negative(-magnitude(z));
    const Wide rest = 1.0f / (1.0f + e), tail = e * rest;
    return {tail * rest, z < 0.0f ? tail : rest};
  }
};

// Whether a row, sources x and then queries, goes by its pairs: their differences and 1/tau must be in
// float32. One that is not finite has nothing to sum.
template <class R>
inline bool few_pairs(const float* x, int64_t sources, int64_t queries, double tau) {
  if (!PairKernel<R>::known || sources * queries > kPairsPerPoint * (sources + queries)) return false;
  const Range range = range_of(x, sources + queries);
  return range.finite && range.high - range.low <= __FLT_MAX__ && 1.0 / tau < kLargestInverse;
}

// The sums of one query over many sources.
template <class R>
inline void sums_of_query(const float* x, const float* weight, int64_t sources, float y,
                          float inverse_tau, float* density, float* cdf) {
  SumOfPositives densities, cdfs;
  for_parts(sources, [&](Part part) PCK_INLINED {
    const PairValues values = PairKernel<R>::at((y - part.load(x, 0.0f)) * inverse_tau);
    const Wide w = weight == nullptr ? part.load_ones() : part.load(weight, 0.0f);
    densities.add(w * values.density);
    cdfs.add(w * values.cdf);
  });
  if (density != nullptr) *density = static_cast<float>(densities.total());
  if (cdf != nullptr) *cdf = static_cast<float>(cdfs.total());
}

// The sums of a part of many queries over a few sources.
template <class R>
inline void sums_of_part(Part part, const float* x, const float* weight, int64_t sources,
                         const float* queries, float inverse_tau, const KernelSumsOut& out) {
  const Wide y = part.load(queries, 0.0f);
  Wide density = {}, cdf = {};
  for (int64_t k = 0; k < sources; ++k) {
    const PairValues values = PairKernel<R>::at((y - x[k]) * inverse_tau);
    const float w = weight == nullptr ? 1.0f : weight[k];
    density += w * values.density;
    cdf += w * values.cdf;
  }
  if (out.density != nullptr) part.store(out.density, density);
  if (out.cdf != nullptr) part.store(out.cdf, cdf);
}

template <class R>
inline void few_sums(const float* x, const float* weight, int64_t sources, int64_t queries, double tau,
                     const KernelSumsOut& out) {
  const float inverse_tau = static_cast<float>(1.0 / tau);
  if (queries >= sources) {
    for_parts(queries, [&](Part part) PCK_INLINED {
      sums_of_part<R>(part, x, weight, sources, x + sources, inverse_tau, out);
    });
    return;
  }
  for (int64_t j = 0; j < queries; ++j)
    sums_of_query<R>(x, weight, sources, x[sources + j], inverse_tau,
                     out.density == nullptr ? nullptr : out.density + j,
                     out.cdf == nullptr ? nullptr : out.cdf + j);
}
