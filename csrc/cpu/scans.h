// The sums of the `laplace` relaxation, exact: two scans of the row in order. Included inside the
// namespace of one instruction set.
//
// With places x_0 <= x_1 <= ... in units of tau and decays d_k = exp(x_{k-1} - x_k),
//
//     L_k = w_k + d_k L_{k-1}    and    U_{k-1} = d_k (w_k + U_k)
//
// are the exponentials of what lies below a point, itself included, and above it. With W_k the weights
// up to k and R_k = R_{k-1} + W_{k-1} (x_k - x_{k-1}) these times their distances, the sums of phi, Phi
// and its integral are (L + U)/2, W - L/2 + U/2 and R + (L + U)/2. W >= L for weights >= 0: no digits
// are lost however small a sum is. All of it is in double, as the decays of a million points are
// multiplied.

// exp(x) for x <= 0 to a few roundings: 2^n exp(r) with |r| <= log(2)/2, by its Taylor series. Below
// the normal numbers it is 0.
inline HalfDouble exp_negative(HalfDouble x) {
  constexpr double to_integer =
      6755399441055744.0;  // 1.5 * 2^52: what is added rounds to whole numbers
  const HalfDouble inside = x < -700.0 ? HalfDouble{} - 700.0 : x;
  const HalfDouble rounded = inside * 1.4426950408889634 + to_integer;
  const HalfDouble n = rounded - to_integer;
  // log(2) in two parts, the first of so few bits that n times it is exact.
  const HalfDouble r = (inside - n * 0.693145751953125) - n * 1.4286068203094173e-6;
  HalfDouble p = r * (1.0 / 479001600) + (1.0 / 39916800);
  p = p * r + (1.0 / 3628800);
  p = p * r + (1.0 / 362880);
  p = p * r + (1.0 / 40320);
  p = p * r + (1.0 / 5040);
  p = p * r + (1.0 / 720);
  p = p * r + (1.0 / 120);
  p = p * r + (1.0 / 24);
  p = p * r + (1.0 / 6);
  p = p * r + 0.5;
  p = (p * r) * r + r + 1.0;
  HalfLong bits;  // of `rounded`: n, in the lowest
  __builtin_memcpy(&bits, &rounded, sizeof(bits));
  bits = (bits + 1023) << 52;
  HalfDouble power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < -700.0 ? HalfDouble{} : p * power;
}

// Sorts the row: Scratch::order, the values in order to ::wide, and the decays to ::ramp.
inline void begin_scans(const float* x, int64_t count, double tau, Scratch& scratch) {
  sort_order(x, count, scratch.order);
  scratch.in_order = true;
  double *const y = scratch.wide, *const decay = scratch.ramp;
  for (int64_t k = 0; k < count; ++k) y[k] = x[scratch.order[k]];
  const double inverse_tau = 1.0 / tau;
  decay[0] = 0.0;
  for (int64_t k = 1; k < count; k += kHalf) {  // whatever lies past the end has room
    HalfDouble here, before;
    __builtin_memcpy(&here, y + k, sizeof(here));
    __builtin_memcpy(&before, y + k - 1, sizeof(before));
    store(decay + k, exp_negative((before - here) * inverse_tau));
  }
}

// Scratch::sum <- the sums of a kernel at the points in order. `weight` is by point; null: 1.
inline void scan_sums(Kernel kernel, int64_t count, double tau, const float* weight, Scratch& scratch) {
  const double *const y = scratch.wide, *const decay = scratch.ramp;
  double* const sum = scratch.sum;
  const auto weight_of = [&](int64_t k) {
    return weight == nullptr ? 1.0 : static_cast<double>(weight[scratch.order[k]]);
  };
  const double half = kernel == Kernel::cdf ? -0.5 : 0.5;
  double lower = 0.0, below = 0.0, ramp = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    if (kernel == Kernel::integral && k > 0) ramp += below * (y[k] - y[k - 1]);
    const double own = weight_of(k);
    lower = own + decay[k] * lower;
    below += own;
    sum[k] = half * lower;
    if (kernel == Kernel::cdf) sum[k] += below;
    if (kernel == Kernel::integral) sum[k] += ramp / tau;
  }
  double upper = 0.0;
  for (int64_t k = count - 1; k >= 0; --k) {
    sum[k] += 0.5 * upper;
    upper = decay[k] * (weight_of(k) + upper);
  }
}

// rank_sums of a row in order.
inline void scanned_rank_sums(const Plan& plan, float* rank, Scratch& scratch) {
  scan_sums(Kernel::cdf, plan.count, plan.tau, nullptr, scratch);
  const double unit = 1.0 / (static_cast<double>(plan.count) - 1.0);
  for (int64_t k = 0; k < plan.count; ++k)
    rank[scratch.order[k]] = static_cast<float>((scratch.sum[k] - 0.5) * unit);
}

// The sums of rank_gradient of a row in order: of phi with weights slope_j - slope_k.
inline void scanned_rank_gradient(int64_t count, const float* slope, float* grad, Scratch& scratch) {
  const double* const decay = scratch.ramp;
  const int32_t* const order = scratch.order;
  double *const sum = scratch.sum, *const own = scratch.below;
  double density = 0.0, weighted = 0.0;
  for (int64_t k = 0; k < count; ++k) {
    own[k] = slope[order[k]];
    density = 1.0 + decay[k] * density;
    weighted = own[k] + decay[k] * weighted;
    sum[k] = own[k] * density - weighted;
  }
  density = weighted = 0.0;
  for (int64_t k = count - 1; k >= 0; --k) {
    grad[order[k]] = static_cast<float>(0.5 * (sum[k] + own[k] * density - weighted));
    density = decay[k] * (1.0 + density);
    weighted = decay[k] * (own[k] + weighted);
  }
}
