// Rows by parts of a vector's size, long sums of them, and the exponential. Included inside the
// namespace of one instruction set.

// A vector's worth of a row: kWide values, or as many as are left.
struct Part {
  int64_t first, lanes;

  Wide load(const float* p, float fill) const {
    if (lanes == kWide) return pck::PCK_ISA::load(p + first);
    Wide v = Wide{} + fill;
    __builtin_memcpy(&v, p + first, lanes * sizeof(float));
    return v;
  }
  Wide load_ones() const {
    const WideMask beyond = lane_index() >= static_cast<int32_t>(lanes);
    return beyond ? Wide{} : Wide{} + 1.0f;
  }
  void store(float* p, Wide v) const { __builtin_memcpy(p + first, &v, lanes * sizeof(float)); }
};

// For a lambda that is called in two places, and whose variables had better stay in registers.
#define PCK_INLINED __attribute__((always_inline))

// each(part) of every part of `count` values.
template <class Each>
inline void for_parts(int64_t count, Each each) {
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide) each(Part{j, kWide});
  if (j < count) each(Part{j, count - j});
}

// A sum of vectors, in double; of terms of one sign, a few `together` in float, which rounds by 7u at
// most.
template <int together>
class LongSum {
 public:
  void add(Wide v) {
    recent_ += v;
    if (++terms_ == together) flush();
  }
  double total() {
    flush();
    const HalfDouble both = even_ + odd_;
    double sum = 0.0;
    for (int l = 0; l < kHalf; ++l) sum += both[l];
    return sum;
  }

 private:
  void flush() {
    Half half[2];
    __builtin_memcpy(half, &recent_, sizeof(recent_));
    even_ += __builtin_convertvector(half[0], HalfDouble);
    odd_ += __builtin_convertvector(half[1], HalfDouble);
    recent_ = Wide{};
    terms_ = 0;
  }

  Wide recent_ = {};
  int terms_ = 0;
  HalfDouble even_ = {}, odd_ = {};
};

using SumOfPositives = LongSum<8>;

inline Wide larger(Wide a, Wide b) {
  return a > b ? a : b;
}
inline Wide magnitude(Wide x) {
  return x < 0.0f ? -x : x;
}

inline bool is_zero(Wide v) {
  float total = 0.0f;
  for (int l = 0; l < kWide; ++l) total += v[l];
  return total == 0.0f;
}

// exp(r) to rounding for |r| <= log(2)/2, by the polynomial of the Cephes library (S. Moshier,
// netlib.org/cephes).
PCK_HD Wide exp_reduced(Wide r) {
  Wide p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r) * r + r + 1.0f;
}

// What is added rounds to a whole number n, and leaves n and the exponent's bias in the lowest bits.
constexpr float kToInteger = 12582912.0f + 127.0f;

// 2^n of n + kToInteger.
PCK_HD Wide power_of_two(Wide shifted) {
  WideMask bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  Wide power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return power;
}

// exp(x) to rounding for x <= 0. Below the normal numbers it is 0.
PCK_HD Wide exp_negative(Wide x) {
  const Wide inside = x < -88.0f ? Wide{} - 88.0f : x;  // n = -127: 2^n becomes 0. A NaN stays
  const Wide shifted = inside * 1.44269504088896341f + kToInteger;
  const Wide n = shifted - kToInteger;
  const Wide r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  return exp_reduced(r) * power_of_two(shifted);
}

// log(1 + e) for 0 <= e <= 1: e + e^2 Q(e), a fit whose relative error, rounding and all, is 1.6e-7.
PCK_HD Wide log1p_unit(Wide e) {
  Wide q = e * 5.3648184985e-3f - 3.0065769330e-2f;
  q = q * e + 7.9204499722e-2f;
  q = q * e - 1.3753798604e-1f;
  q = q * e + 1.9153653085e-1f;
  q = q * e - 2.4857163429e-1f;
  q = q * e + 3.3321323991e-1f;
  q = q * e - 4.9999648333e-1f;
  return (q * e) * e + e;
}
