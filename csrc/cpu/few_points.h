// Stage `soft_rank` of a row of few points, pair by pair: that costs less than a grid. Included inside
// the namespace of one instruction set.
//
// Of the logistic, with e_j = exp(x_j/tau), a pair takes one reciprocal and no exponential:
//
//     Phi((x_j - x_k)/tau) = e_j/(e_j + e_k),    phi((x_j - x_k)/tau) = e_j e_k/(e_j + e_k)^2.

// Points of a row up to which that costs less (docs/method.md, "Small batches").
constexpr int64_t kFewPoints = 128;
// A row's range in units of tau in which what a pair takes are normal numbers, multiplied by small
// slopes, too: exp(-70) = 2^-101.
constexpr double kFewRange = 70.0;

// x <- 1/x, two vectors by one reciprocal: of a product, which must be a normal number as well.
template <int vectors>
PCK_HD void invert(Wide (&x)[vectors]) {
  for (int t = 0; t + 1 < vectors; t += 2) {
    const Wide of_product = reciprocal(x[t] * x[t + 1]), first = x[t + 1] * of_product;
    x[t + 1] = x[t] * of_product;
    x[t] = first;
  }
  if constexpr (vectors % 2 != 0) x[vectors - 1] = reciprocal(x[vectors - 1]);
}

// go<vectors>(j) of every tile of so many vectors of points, from j on: less than two of them lie past
// the row's end.
template <class Go>
inline void for_tiles(int64_t count, Go go) {
  for (int64_t j = 0, vectors = 0; j < count; j += vectors * kWide) {
    const int64_t left = (count - j + kWide - 1) / kWide;
    vectors = left > 2 ? 4 : left;
    if (vectors == 4)
      go.template operator()<4>(j);
    else if (vectors == 2)
      go.template operator()<2>(j);
    else
      go.template operator()<1>(j);
  }
}

inline Part part_at(int64_t j, int64_t count) {
  const int64_t left = count - j;
  return {j, left < 0 ? 0 : left < kWide ? left : kWide};
}

// sums[t] <- sum_k term(k, t, 1/(own[t] + e_k)), of which few at a time are summed in a row: rounds by
// 24u at most.
template <int vectors, class Term>
PCK_HD void sum_pairs(const float* e, int64_t count, const Wide (&own)[vectors], Wide (&sums)[vectors],
                      Term term) {
  constexpr int64_t strip = 16;
  for (int64_t first = 0; first < count; first += strip) {
    const int64_t past = first + strip < count ? first + strip : count;
    Wide recent[vectors] = {};
    for (int64_t k = first; k < past; ++k) {
      Wide inverse[vectors];
      for (int t = 0; t < vectors; ++t) inverse[t] = own[t] + e[k];
      invert(inverse);
      for (int t = 0; t < vectors; ++t) recent[t] += term(k, t, inverse[t]);
    }
    for (int t = 0; t < vectors; ++t) sums[t] += recent[t];
  }
}

template <class R>
inline bool is_few(const Range& range, const Plan& plan) {
  return false;
}

template <>
inline bool is_few<Logistic>(const Range& range, const Plan& plan) {
  const double width = static_cast<double>(range.high) - range.low;
  return plan.count <= kFewPoints && width <= kFewRange * plan.tau;
}

// Scratch::place <- e, times a power of two that makes the middle of the largest range 1.
inline void begin_few(const float* x, const Range& range, const Plan& plan, Scratch& scratch) {
  constexpr double unit = 0x1p50;
  const double inverse_tau = 1.0 / plan.tau;
  for (int64_t j = 0; j < plan.count; j += kHalf) {
    Half part = Half{} + range.high;
    const int64_t left = plan.count - j;
    __builtin_memcpy(&part, x + j, (left < kHalf ? left : kHalf) * sizeof(float));
    const HalfDouble below =
        __builtin_convertvector(part, HalfDouble) - static_cast<double>(range.high);
    store(scratch.place + j, __builtin_convertvector(exp_negative(below * inverse_tau) * unit, Half));
  }
  for (int64_t j = plan.count; j < plan.count + 2 * kWide; ++j) scratch.place[j] = 1.0f;
}

// rank_sums.
inline void few_rank_sums(const Plan& plan, float* rank, Scratch& scratch) {
  const float* const e = scratch.place;
  const float unit = plan.rank_unit();
  for_tiles(plan.count, [&]<int vectors>(int64_t j) {
    Wide own[vectors], sums[vectors] = {};
    for (int t = 0; t < vectors; ++t) own[t] = load(e + j + t * kWide);
    sum_pairs(e, plan.count, own, sums,
              [&](int64_t, int, Wide inverse) PCK_INLINED { return inverse; });
    for (int t = 0; t < vectors; ++t)
      part_at(j + t * kWide, plan.count).store(rank, (own[t] * sums[t] - 0.5f) * unit);
  });
}

// A power of two about as large as the largest of these, in a range that has reciprocals.
inline float power_of_largest(const float* x, int64_t count) {
  Wide largest = Wide{} + 0x1p-100f;
  for_parts(count,
            [&](Part part) PCK_INLINED { largest = larger(largest, magnitude(part.load(x, 0.0f))); });
  float most = largest[0];
  for (int l = 1; l < kWide; ++l) most = largest[l] > most ? largest[l] : most;
  most = most < 0x1p100f ? most : 0x1p100f;
  uint32_t bits;
  __builtin_memcpy(&bits, &most, sizeof(bits));
  bits &= 0x7f800000;
  __builtin_memcpy(&most, &bits, sizeof(most));
  return most;
}

// The sums of rank_gradient, with slopes of any size brought to 1. Of a point j, sum_k (slope_j -
// slope_k) e_k/(e_j + e_k)^2 comes before its own e: that saves two multiplications a pair.
inline void few_rank_gradient(const Plan& plan, const float* slope, float* grad, Scratch& scratch) {
  const float* const e = scratch.place;
  float* const weighed = scratch.sorted;  // the stage hard_rank is over
  const float unit = power_of_largest(slope, plan.count), scale = 1.0f / unit;
  for (int64_t k = 0; k < plan.count; ++k) weighed[k] = slope[k] * scale * e[k];
  for_tiles(plan.count, [&]<int vectors>(int64_t j) {
    Wide own[vectors], own_slope[vectors], sums[vectors] = {};
    for (int t = 0; t < vectors; ++t) {
      own[t] = load(e + j + t * kWide);
      own_slope[t] = part_at(j + t * kWide, plan.count).load(slope, 0.0f) * scale;
    }
    sum_pairs(e, plan.count, own, sums, [&](int64_t k, int t, Wide inverse) PCK_INLINED {
      return (own_slope[t] * e[k] - weighed[k]) * (inverse * inverse);
    });
    for (int t = 0; t < vectors; ++t)
      part_at(j + t * kWide, plan.count).store(grad, own[t] * sums[t] * unit);
  });
}
