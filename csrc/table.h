// Tables of formulas: a row is a struct with a `name`, a `code` and static functions, a table a list of
// such structs. A row that is added to its list is at once known everywhere that visits the list.
#pragma once

#include <cstdio>
#include <cstdlib>

#if defined(__CUDACC__)
#define PCK_HD __host__ __device__ __forceinline__
// Before a function that calls whatever it is given: on the device what is of the device, and so on.
#define PCK_CALLS_ANY _Pragma("nv_exec_check_disable")
#else
#define PCK_HD inline __attribute__((always_inline))
#define PCK_CALLS_ANY
#endif

namespace pck {

template <class... Rows>
struct List {};

[[noreturn]] PCK_HD void fail_unknown_code(int code) {
#if !defined(__CUDA_ARCH__)
  std::fprintf(stderr, "pc_kernels: a table of csrc/formulas.h has no row with code %d\n", code);
  std::abort();
#endif
  __builtin_unreachable();
}

// Whether a row has this code.
template <class... Rows>
PCK_HD bool has_code(List<Rows...>, int code) {
  return ((code == Rows::code) || ...);
}

// f(row) of the row with this code. There is no default: a code that no row has ends the program, and
// on the device the kernel, once for all calls (check_codes in cuda/launch.cuh: to trap here, in the
// middle of loops, would cost registers).
PCK_CALLS_ANY
template <class First, class... Rest, class F>
PCK_HD auto visit(List<First, Rest...>, int code, F f) {
  if constexpr (sizeof...(Rest) > 0) {
    if (code != First::code) return visit(List<Rest...>{}, code, f);
  } else {
    if (code != First::code) fail_unknown_code(code);
  }
  return f(First{});
}

// Whether the codes are 0, 1, 2 ... in the table's order.
template <class... Rows>
constexpr bool is_numbered(List<Rows...>) {
  int next = 0;
  return ((Rows::code == next++) && ...);
}

// f(row) of every row.
template <class... Rows, class F>
void for_each(List<Rows...>, F f) {
  (f(Rows{}), ...);
}

// The largest of f(row).
template <class... Rows, class F>
constexpr int largest(List<Rows...>, F f) {
  int most = 0;
  ((most = f(Rows{}) > most ? f(Rows{}) : most), ...);
  return most;
}

}  // namespace pck
