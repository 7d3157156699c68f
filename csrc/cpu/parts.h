// Rows by parts of a vector's size, sums of them in double, and the exponential. Included inside the
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

// each(part) of every part of `count` values.
template <class Each>
inline void for_parts(int64_t count, Each each) {
  int64_t j = 0;
  for (; j + kWide <= count; j += kWide) each(Part{j, kWide});
  if (j < count) each(Part{j, count - j});
}

// A sum of vectors, in double.
class DoubleSum {
 public:
  void add(Wide v) {
    Half half[2];
    __builtin_memcpy(half, &v, sizeof(v));
    even_ += __builtin_convertvector(half[0], HalfDouble);
    odd_ += __builtin_convertvector(half[1], HalfDouble);
  }
  double total() const {
    const HalfDouble both = even_ + odd_;
    double sum = 0.0;
    for (int l = 0; l < kHalf; ++l) sum += both[l];
    return sum;
  }

 private:
  HalfDouble even_ = {}, odd_ = {};
};

inline Wide larger(Wide a, Wide b) {
  return a > b ? a : b;
}
inline Wide magnitude(Wide x) {
  return x < 0.0f ? -x : x;
}

// exp(x) to rounding for x <= 0: 2^n exp(r) with |r| <= log(2)/2, by the polynomial of the Cephes
// library (S. Moshier, netlib.org/cephes). Below the normal numbers it is 0.
inline Wide exp_negative(Wide x) {
  constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: what is added rounds to whole numbers
  const Wide inside = x < -88.0f ? Wide{} - 88.0f : x;  // a NaN stays
  const Wide n = (inside * 1.44269504088896341f + to_integer) - to_integer;
  const Wide r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  Wide p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  WideMask bits = (__builtin_convertvector(n, WideMask) + 127) << 23;
  Wide power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? Wide{} : p * power;
}

// log(1 + e) for 0 <= e <= 1: 2 artanh(s) of s = e/(2 + e).
inline Wide log1p_of(Wide s) {
  const Wide t = s * s;
  Wide series = t * (1.0f / 15) + (1.0f / 13);
  series = series * t + (1.0f / 11);
  series = series * t + (1.0f / 9);
  series = series * t + (1.0f / 7);
  series = series * t + (1.0f / 5);
  series = series * t + (1.0f / 3);
  return 2.0f * (s + s * (series * t));
}
