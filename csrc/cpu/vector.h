// Small vectors for the row kernels, by the compiler's vector extensions: one source serves SSE2,
// AVX2, AVX-512 and NEON. Included inside the namespace of one instruction set.

using Quad = float __attribute__((vector_size(16)));
using QuadDouble = double __attribute__((vector_size(32)));
using Wide = float __attribute__((vector_size(PCK_VECTOR_BYTES)));
using WideMask = int32_t __attribute__((vector_size(PCK_VECTOR_BYTES)));  // -1 where true

// Half as many floats, and as many doubles as there are of them.
using Half = float __attribute__((vector_size(PCK_VECTOR_BYTES / 2)));
using HalfIndex = int32_t __attribute__((vector_size(PCK_VECTOR_BYTES / 2)));
using HalfDouble = double __attribute__((vector_size(PCK_VECTOR_BYTES)));

constexpr int kWide = PCK_VECTOR_BYTES / 4;
constexpr int kHalf = PCK_VECTOR_BYTES / 8;

// Any address will do: compilers make one unaligned instruction of these copies.
template <class V = Wide>
inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  static_assert(sizeof(V) > sizeof(T));
  __builtin_memcpy(p, &v, sizeof(V));
}

inline HalfDouble load_double(const float* p) {
  return __builtin_convertvector(load<Half>(p), HalfDouble);
}

// Four doubles as floats, and four floats added to four doubles.
inline Quad load_quad(const double* p) {
  QuadDouble v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Quad);
}

inline void add_quad(double* p, Quad term) {
  QuadDouble v;
  __builtin_memcpy(&v, p, sizeof(v));
  v += __builtin_convertvector(term, QuadDouble);
  __builtin_memcpy(p, &v, sizeof(v));
}

// 0, 1, 2, ...
inline WideMask lane_index() {
  WideMask index;
  for (int l = 0; l < kWide; ++l) index[l] = l;
  return index;
}

#if defined(__clang__)
#define PCK_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
using QuadIndex = int32_t __attribute__((vector_size(16)));
#define PCK_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, QuadIndex{i, j, k, l})
#endif

// 4x4 transpose: rows in, columns out.
inline void transpose(Quad& a, Quad& b, Quad& c, Quad& d) {
  const Quad ab_low = PCK_SHUFFLE(a, b, 0, 4, 1, 5);
  const Quad ab_high = PCK_SHUFFLE(a, b, 2, 6, 3, 7);
  const Quad cd_low = PCK_SHUFFLE(c, d, 0, 4, 1, 5);
  const Quad cd_high = PCK_SHUFFLE(c, d, 2, 6, 3, 7);
  a = PCK_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  b = PCK_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  c = PCK_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  d = PCK_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}
#undef PCK_SHUFFLE

// sum_i term(i) for i < count, in double, in 16 interleaved partial sums.
template <class Term>
inline double lane_sum(int64_t count, Term term) {
  constexpr int lanes = 16;
  double partial[lanes] = {};
  const int64_t whole = count - count % lanes;
  for (int64_t i = 0; i < whole; i += lanes)
    for (int l = 0; l < lanes; ++l) partial[l] += static_cast<double>(term(i + l));
  for (int64_t i = whole; i < count; ++i) partial[i - whole] += static_cast<double>(term(i));
  double total = 0.0;
  for (int l = 0; l < lanes; ++l) total += partial[l];
  return total;
}

// sum_i term(x_i) in double; `term` takes a double or a vector of them.
template <class Term>
inline double sum_over(const float* x, int64_t count, Term term) {
  HalfDouble even = {}, odd = {};
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    even += term(load_double(x + i));
    odd += term(load_double(x + i + kHalf));
  }
  even += odd;
  double total = 0.0;
  for (int l = 0; l < kHalf; ++l) total += even[l];
  for (; i < count; ++i) total += term(static_cast<double>(x[i]));
  return total;
}

// Smallest and largest of x; a NaN or an infinity anywhere makes `finite` false.
struct Range {
  float low, high;
  bool finite;
};

inline Range range_of(const float* x, int64_t count) {
  Wide low = {}, high = {}, poison = {};  // poison: 0 for a finite value, NaN otherwise
  low += x[0];
  high += x[0];
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide) {
    const Wide v = load(x + i);
    low = v < low ? v : low;
    high = v > high ? v : high;
    poison += v - v;
  }
  Range range{x[0], x[0], true};
  float total = 0.0f;
  for (int l = 0; l < kWide; ++l) {
    range.low = low[l] < range.low ? low[l] : range.low;
    range.high = high[l] > range.high ? high[l] : range.high;
    total += poison[l];
  }
  for (; i < count; ++i) {
    range.low = x[i] < range.low ? x[i] : range.low;
    range.high = x[i] > range.high ? x[i] : range.high;
    total += x[i] - x[i];
  }
  range.finite = total == 0.0f;
  return range;
}
