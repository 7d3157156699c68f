// Small vectors for the row kernels, by the compiler's vector extensions: one source serves SSE2,
// AVX2, AVX-512 and NEON. Included inside the namespace of one instruction set.

using Quad = float __attribute__((vector_size(16)));
using QuadDouble = double __attribute__((vector_size(32)));
using Wide = float __attribute__((vector_size(PCK_VECTOR_BYTES)));
using WideMask = int32_t __attribute__((vector_size(PCK_VECTOR_BYTES)));  // -1 where true

constexpr int kWide = PCK_VECTOR_BYTES / 4;

// Any address will do: compilers make one unaligned instruction of these copies.
template <class V = Wide>
inline V load(const float* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store(float* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
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
inline Wide lane_index() {
  Wide index;
  for (int l = 0; l < kWide; ++l) index[l] = static_cast<float>(l);
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

// sum_i term(i) for i < count, in double and in a fixed order (16 interleaved partial sums) on every
// instruction set, so that a result depends on the input alone.
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

// Smallest and largest of x; a NaN anywhere makes `finite` false, and so does an infinity.
struct Range {
  float low, high;
  bool finite;
};

inline Range range_of(const float* x, int64_t count) {
  constexpr int lanes = 16;
  float low[lanes], high[lanes], poison[lanes] = {};
  for (int l = 0; l < lanes; ++l) low[l] = high[l] = x[0];
  const int64_t whole = count - count % lanes;
  for (int64_t i = 0; i < whole; i += lanes)
    for (int l = 0; l < lanes; ++l) {
      const float v = x[i + l];
      low[l] = v < low[l] ? v : low[l];
      high[l] = v > high[l] ? v : high[l];
      poison[l] += v - v;  // 0 for a finite value, NaN otherwise
    }
  for (int64_t i = whole; i < count; ++i) {
    const float v = x[i];
    low[0] = v < low[0] ? v : low[0];
    high[0] = v > high[0] ? v : high[0];
    poison[0] += v - v;
  }
  float total = poison[0];
  for (int l = 1; l < lanes; ++l) {
    low[0] = low[l] < low[0] ? low[l] : low[0];
    high[0] = high[l] > high[0] ? high[l] : high[0];
    total += poison[l];
  }
  return {low[0], high[0], total == 0.0f};
}
