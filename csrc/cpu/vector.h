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
using HalfLong = int64_t __attribute__((vector_size(PCK_VECTOR_BYTES)));

constexpr int kWide = PCK_VECTOR_BYTES / 4;
constexpr int kHalf = PCK_VECTOR_BYTES / 8;

// From and to any address: compilers make one unaligned instruction of these copies.
template <class V = Wide, class T>
inline V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  static_assert(sizeof(V) > sizeof(T));
  __builtin_memcpy(p, &v, sizeof(V));
}

// As doubles. Compilers would convert halves and join them.
inline HalfDouble widen(Half v) {
#if PCK_VECTOR_BYTES == 64
  return _mm512_maskz_cvtps_pd(0xff, v);
#elif PCK_VECTOR_BYTES == 32
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, HalfDouble);
#endif
}
inline HalfDouble widen(HalfIndex v) {
#if PCK_VECTOR_BYTES == 64
  return _mm512_maskz_cvtepi32_pd(0xff, reinterpret_cast<__m256i>(v));
#elif PCK_VECTOR_BYTES == 32
  return _mm256_cvtepi32_pd(reinterpret_cast<__m128i>(v));
#else
  return __builtin_convertvector(v, HalfDouble);
#endif
}

inline HalfDouble load_double(const float* p) {
  return widen(load<Half>(p));
}

// Four doubles as floats, and four floats added to four doubles.
inline Quad load_quad(const double* p) {
  QuadDouble v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, Quad);
}

inline void add_quad(double* p, const float* term) {
  QuadDouble v;
  __builtin_memcpy(&v, p, sizeof(v));
  v += QuadDouble{term[0], term[1], term[2], term[3]};
  __builtin_memcpy(p, &v, sizeof(v));
}

// 0, 1, 2, ...
inline WideMask lane_index() {
  WideMask index;
  for (int l = 0; l < kWide; ++l) index[l] = l;
  return index;
}

// count, one more where the comparison holds: in AVX-512 a masked addition, which compilers do not make
// of a difference.
inline WideMask count_where(WideMask holds, WideMask count) {
#if PCK_VECTOR_BYTES == 64
  return holds ? count + 1 : count;
#else
  return count - holds;
#endif
}

// The numbers 0 ... n - 1, as a type to deduce them from.
template <int... l>
struct Lanes {};
template <int n, int... l>
struct MakeLanes : MakeLanes<n - 1, n - 1, l...> {};
template <int... l>
struct MakeLanes<0, l...> {
  using type = Lanes<l...>;
};

// In every quad: its elements i, j, k and l of a, or of b from 4 on.
template <int i, int j, int k, int l, class V, int... lane>
inline V shuffle_lanes(V a, V b, Lanes<lane...>) {
  constexpr int pick[] = {i, j, k, l};
  constexpr int beyond = static_cast<int>(sizeof(V) / sizeof(float)) - 4;
#define PCK_FROM(lane) (lane / 4 * 4 + pick[lane % 4] + (pick[lane % 4] < 4 ? 0 : beyond))
#if defined(__clang__)
  return __builtin_shufflevector(a, b, PCK_FROM(lane)...);
#else
  using Index = decltype(a < b);  // as many int32_t
  return __builtin_shuffle(a, b, Index{PCK_FROM(lane)...});
#endif
#undef PCK_FROM
}

template <int i, int j, int k, int l, class V>
inline V shuffle(V a, V b) {
  return shuffle_lanes<i, j, k, l>(a, b, typename MakeLanes<sizeof(V) / sizeof(float)>::type{});
}

// 4x4 transposes, one in every quad of the vectors: rows in, columns out.
template <class V>
inline void transpose(V& a, V& b, V& c, V& d) {
  const V ab_low = shuffle<0, 4, 1, 5>(a, b);
  const V ab_high = shuffle<2, 6, 3, 7>(a, b);
  const V cd_low = shuffle<0, 4, 1, 5>(c, d);
  const V cd_high = shuffle<2, 6, 3, 7>(c, d);
  a = shuffle<0, 1, 4, 5>(ab_low, cd_low);
  b = shuffle<2, 3, 6, 7>(ab_low, cd_low);
  c = shuffle<0, 1, 4, 5>(ab_high, cd_high);
  d = shuffle<2, 3, 6, 7>(ab_high, cd_high);
}

// Lanes move up by so many; zeros follow them.
template <int by, int... lane>
inline Wide lanes_up(Wide v, Lanes<lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, Wide{}, (lane < by ? kWide : lane - by)...);
#else
  return __builtin_shuffle(v, Wide{}, WideMask{(lane < by ? kWide : lane - by)...});
#endif
}

template <int by>
inline Wide lanes_up(Wide v) {
  return lanes_up<by>(v, typename MakeLanes<kWide>::type{});
}

// Of every lane the sum of those up to it.
inline Wide running_sums(Wide v) {
  v += lanes_up<1>(v);
  v += lanes_up<2>(v);
  if constexpr (kWide > 4) v += lanes_up<4>(v);
  if constexpr (kWide > 8) v += lanes_up<8>(v);
  return v;
}

// The quads that quad(0), quad(1) ... return, side by side. Compilers would go through memory.
template <class Each>
inline Wide join(Each quad) {
#if PCK_VECTOR_BYTES == 64
  __m512 v = _mm512_castps128_ps512(quad(0));
  v = _mm512_insertf32x4(v, quad(1), 1);
  v = _mm512_insertf32x4(v, quad(2), 2);
  return _mm512_insertf32x4(v, quad(3), 3);
#elif PCK_VECTOR_BYTES == 32
  return _mm256_insertf128_ps(_mm256_castps128_ps256(quad(0)), quad(1), 1);
#else
  return quad(0);
#endif
}

// 1/v to 2^-23 of it, for normal v whose inverse is normal. A division of 16 takes 16 cycles, this 4.
inline Wide reciprocal(Wide v) {
#if PCK_VECTOR_BYTES == 64
  const Wide near = reinterpret_cast<Wide>(_mm512_maskz_rcp14_ps(-1, reinterpret_cast<__m512>(v)));
  return near + near * (1.0f - v * near);
#else
  return 1.0f / v;
#endif
}

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

struct Sums {
  double first, second;
};

// The sums of x_i - origin and of their squares, in double.
inline Sums sums_about(const float* x, int64_t count, double origin) {
  HalfDouble first[2] = {}, second[2] = {};
  int64_t i = 0;
  for (; i + kWide <= count; i += kWide)
    for (int h = 0; h < 2; ++h) {
      const HalfDouble term = load_double(x + i + h * kHalf) - origin;
      first[h] += term;
      second[h] += term * term;
    }
  Sums sums{};
  for (int l = 0; l < kHalf; ++l) {
    sums.first += first[0][l] + first[1][l];
    sums.second += second[0][l] + second[1][l];
  }
  for (; i < count; ++i) {
    const double term = x[i] - origin;
    sums.first += term;
    sums.second += term * term;
  }
  return sums;
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
