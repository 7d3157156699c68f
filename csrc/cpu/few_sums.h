// Stage `kernel_sums` where a row has few queries or few sources: all pairs, which cost less than a
// grid. The values are those of the grid and more exact. Included inside the namespace of one
// instruction set.
//
// The logistic step is a quotient, 1/(1 + e^((x-y)/tau)) = Y/(X + Y) with X = e^((x-c)/tau) and
// Y = e^((y-c)/tau): one exponential a point, and not one a pair. The few go in groups of neighbours
// around a c of their own; of the many, what is too far from c to share a term with the group stands
// where its exponential is still a number.

// Of one row and channel, at the queries; null: not wanted.
struct KernelSumsOut {
  float* density;
  float* cdf;
  float* integral;
};

// A pair costs about as much as a sixteenth of a point on a grid (docs/method.md, "Few queries").
constexpr int64_t kPairsPerPoint = 16;
constexpr int64_t kBlock = 8 * kWide;  // of sources whose terms are added in float, as SumOfPositives
constexpr int kMostTogether = 4;
constexpr double kGroupWidth = 40.0;    // in tau: how far apart the points of a group are, at most
constexpr double kFarFromGroup = 80.0;  // in tau, from c: e^-60 and less is left out

// Whether sums of a relaxation over pairs are known here.
template <class R>
constexpr bool kSumsPairs = false;
template <>
constexpr bool kSumsPairs<Logistic> = true;

// A row's points as they are given.
struct PairRow {
  const float* sources;
  const float* queries;
  int64_t source_count;
  int64_t query_count;
  double inverse_tau;  // negative for the upper tail
};

inline bool all_finite(const float* x, int64_t count) {
  Wide poison = {};  // 0 for finite values, NaN otherwise
  for_parts(count, [&](Part part) PCK_INLINED { poison += part.load(x, 0.0f) * 0.0f; });
  return is_zero(poison);
}

// Whether a row goes by its pairs: 1/tau must be in float32. One that is not finite has nothing to sum.
template <class R>
inline bool few_pairs(const PairRow& row) {
  const int64_t m = row.source_count, n = row.query_count;
  return kSumsPairs<R> && m > 0 && m * n <= kPairsPerPoint * (m + n) &&
         2.0 * __builtin_fabs(row.inverse_tau) < kLargestInverse && all_finite(row.sources, m) &&
         all_finite(row.queries, n);
}

// x with its last 12 bits 0: products of two such numbers are exact.
inline Wide head_of(Wide x) {
  WideMask bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits &= ~0xfff;
  __builtin_memcpy(&x, &bits, sizeof(bits));
  return x;
}

// e^((x - c)/tau) for a c, in which (x - c)/tau has more digits than a float.
struct Exponential {
  float centre, far;
  float highest;         // where it is largest
  Wide rate, rate_rest;  // log2(e)/tau

  Exponential(float centre_, double inverse_tau)
      : centre(centre_),
        far(static_cast<float>(
            __builtin_fmin(kFarFromGroup / __builtin_fabs(inverse_tau), __FLT_MAX__))),
        highest(inverse_tau > 0.0 ? __builtin_inff() : -__builtin_inff()) {
    const double whole = 1.44269504088896341 * inverse_tau;
    rate = head_of(Wide{} + static_cast<float>(whole));
    rate_rest = Wide{} + static_cast<float>(whole - static_cast<double>(rate[0]));
  }
  Wide at(Wide x) const {
    Wide d = x - centre;
    d = d < -far ? Wide{} - far : d;
    d = d > far ? Wide{} + far : d;
    const Wide head = head_of(d);
    const Wide exact = head * rate, rest = (d - head) * rate + d * rate_rest;
    const Wide shifted = exact + kToInteger;
    return exp_reduced(((exact - (shifted - kToInteger)) + rest) * 0.693147180559945309f) *
           power_of_two(shifted);
  }
  // Of up to kBlock numbers, and in the last vector's other lanes the largest.
  void of_block(const float* x, int64_t count, float* result) const {
    for_parts(count,
              [&](Part part) PCK_INLINED { store(result + part.first, at(part.load(x, highest))); });
  }
};

// Up to kMostTogether points next to each other, and their exponentials.
template <int members>
struct Group {
  Exponential exponential;
  float own[members];

  Group(const float* points, float centre, double inverse_tau) : exponential(centre, inverse_tau) {
    for (int g = 0; g < members; ++g)
      own[g] =
          static_cast<float>(__builtin_exp((static_cast<double>(points[g]) - centre) * inverse_tau));
  }
};

// each(first, group) for all groups of some points.
template <class Each>
inline void for_groups(const float* points, int64_t count, double inverse_tau, Each each) {
  const double width = kGroupWidth / __builtin_fabs(inverse_tau);
  for (int64_t first = 0; first < count;) {
    double low = points[first], high = low;
    int members = 1;
    for (; members < kMostTogether && first + members < count; ++members) {
      const double next = points[first + members];
      const double lower = next < low ? next : low, upper = next > high ? next : high;
      if (upper - lower > width) break;
      low = lower;
      high = upper;
    }
    const float centre = static_cast<float>(0.5 * (low + high));
    const float* const here = points + first;
    static_assert(kMostTogether == 4);
    if (members == 4) each(first, Group<4>(here, centre, inverse_tau));
    if (members == 3) each(first, Group<3>(here, centre, inverse_tau));
    if (members == 2) each(first, Group<2>(here, centre, inverse_tau));
    if (members == 1) each(first, Group<1>(here, centre, inverse_tau));
    first += members;
  }
}

// The sums of a group of queries over many sources.
template <bool weighted, int members>
inline void sums_of_queries(const PairRow& row, const Group<members>& group, const float* weight,
                            const KernelSumsOut& out) {
  LongSum<1> densities[members], cdfs[members];
  for (int64_t first = 0; first < row.source_count; first += kBlock) {
    const int64_t left = row.source_count - first, count = left < kBlock ? left : kBlock;
    float exponentials[kBlock];  // of what is not there the largest: it counts nothing
    group.exponential.of_block(row.sources + first, count, exponentials);
    Wide density[members] = {}, cdf[members] = {};
    for_parts(count, [&](Part part) PCK_INLINED {
      const Wide x = load(exponentials + part.first);
      for (int g = 0; g < members; ++g) {
        const Wide quotient = reciprocal(x + group.own[g]);
        Wide step = group.own[g] * quotient;
        if constexpr (weighted) step *= part.load(weight + first, 0.0f);
        cdf[g] += step;
        density[g] += step * (x * quotient);
      }
    });
    for (int g = 0; g < members; ++g) {
      densities[g].add(density[g]);
      cdfs[g].add(cdf[g]);
    }
  }
  for (int g = 0; g < members; ++g) {
    if (out.density != nullptr) out.density[g] = static_cast<float>(densities[g].total());
    if (out.cdf != nullptr) out.cdf[g] = static_cast<float>(cdfs[g].total());
  }
}

// Adds to the sums of many queries those over a group of sources.
template <bool weighted, int members>
inline void add_sources(const PairRow& row, const Group<members>& group, const float* weight,
                        const KernelSumsOut& out) {
  float w[members];
  for (int g = 0; g < members; ++g) w[g] = weighted ? weight[g] : 1.0f;
  for (int64_t first = 0; first < row.query_count; first += kBlock) {
    const int64_t left = row.query_count - first, count = left < kBlock ? left : kBlock;
    float exponentials[kBlock];
    group.exponential.of_block(row.queries + first, count, exponentials);
    for_parts(count, [&](Part part) PCK_INLINED {
      const Wide y = load(exponentials + part.first);
      Wide density = {}, cdf = {};
      for (int g = 0; g < members; ++g) {
        const Wide quotient = reciprocal(y + group.own[g]);
        const Wide step = weighted ? w[g] * (y * quotient) : y * quotient;
        cdf += step;
        density += step * (group.own[g] * quotient);
      }
      part.first += first;
      if (out.density != nullptr) part.store(out.density, part.load(out.density, 0.0f) + density);
      if (out.cdf != nullptr) part.store(out.cdf, part.load(out.cdf, 0.0f) + cdf);
    });
  }
}

inline float* beyond(float* values, int64_t count) {
  return values == nullptr ? nullptr : values + count;
}

template <bool weighted>
inline void few_sums_weighted(const PairRow& row, const float* weight, const KernelSumsOut& out) {
  if (row.query_count < row.source_count) {
    for_groups(row.queries, row.query_count, row.inverse_tau, [&](int64_t first, const auto& group) {
      const KernelSumsOut here{beyond(out.density, first), beyond(out.cdf, first), nullptr};
      sums_of_queries<weighted>(row, group, weight, here);
    });
    return;
  }
  if (out.density != nullptr) fill(out.density, row.query_count, 0.0f);
  if (out.cdf != nullptr) fill(out.cdf, row.query_count, 0.0f);
  for_groups(row.sources, row.source_count, row.inverse_tau, [&](int64_t first, const auto& group) {
    add_sources<weighted>(row, group, weighted ? weight + first : nullptr, out);
  });
}

inline void few_sums(const PairRow& row, const float* weight, const KernelSumsOut& out) {
  if (weight == nullptr)
    few_sums_weighted<false>(row, nullptr, out);
  else
    few_sums_weighted<true>(row, weight, out);
}
