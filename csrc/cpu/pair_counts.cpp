// How two scores order the items of a list: counts of pairs, exact, by sorting and merging (Knight,
// "A computer method for calculating Kendall's tau with ungrouped data", JASA 1966). O(m log m) a list.
#include <algorithm>
#include <limits>
#include <vector>

#include "../arguments.h"
#include "sort.h"

namespace pck {
namespace {

enum Count { kTiedX, kTiedY, kTiedBoth, kDiscordant, kCounts };

// The pairs among runs of equal items, `equal(i)`: whether item i equals the one before it.
template <class Equal>
int64_t tied_pairs(int64_t count, Equal equal) {
  int64_t pairs = 0, before = 0;
  for (int64_t i = 1; i < count; ++i) {
    before = equal(i) ? before + 1 : 0;
    pairs += before;
  }
  return pairs;
}

// Pairs i < j with v_i > v_j. Sorts v by merging runs of twice the width each time.
int64_t inversions(std::vector<int32_t>& v) {
  const auto count = static_cast<int64_t>(v.size());
  std::vector<int32_t> merged(v.size());
  int64_t total = 0;
  for (int64_t width = 1; width < count; width *= 2) {
    for (int64_t low = 0; low < count; low += 2 * width) {
      const int64_t middle = std::min(low + width, count), high = std::min(low + 2 * width, count);
      int64_t left = low, right = middle, out = low;
      while (left < middle && right < high) {  // no branch on the values
        const bool inverted = v[right] < v[left];
        merged[out++] = inverted ? v[right] : v[left];
        total += inverted ? middle - left : 0;
        right += inverted;
        left += !inverted;
      }
      std::copy(v.begin() + left, v.begin() + middle, merged.begin() + out);
      std::copy(v.begin() + right, v.begin() + high, merged.begin() + out + (middle - left));
    }
    v.swap(merged);
  }
  return total;
}

template <class T>
void count_pairs(const T* x, const T* y, int64_t count, int64_t* counts) {
  std::vector<int32_t> by_x(static_cast<size_t>(count)), by_y(by_x.size()), rank(by_x.size());
  sort_order(x, count, by_x.data());
  const auto same_x = [&](int64_t i) { return x[by_x[i]] == x[by_x[i - 1]]; };
  for (int64_t i = 1; i < count; ++i) rank[i] = rank[i - 1] + !same_x(i);
  std::vector<T> ordered(by_x.size());
  for (int64_t i = 0; i < count; ++i) ordered[i] = y[by_x[i]];
  sort_order(ordered.data(), count, by_y.data());  // stable: by y, then by x
  std::vector<int32_t> v(by_x.size());
  for (int64_t i = 0; i < count; ++i) v[i] = rank[by_y[i]];
  const auto same_y = [&](int64_t i) { return ordered[by_y[i]] == ordered[by_y[i - 1]]; };
  counts[kTiedX] = tied_pairs(count, same_x);
  counts[kTiedY] = tied_pairs(count, same_y);
  counts[kTiedBoth] = tied_pairs(count, [&](int64_t i) { return same_y(i) && v[i] == v[i - 1]; });
  counts[kDiscordant] = inversions(v);
}

// For every list of x and y [N], items offsets[l] to offsets[l + 1] - 1: how many of its pairs are tied
// in x, tied in y, tied in both, and ordered the other way round by y than by x: int64 [L, 4].
Tensor pair_counts(const Tensor& x, const Tensor& y, const Tensor& offsets) {
  PCK_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
            "x must be float32 or float64, got ", x.scalar_type());
  PCK_CHECK(x.is_contiguous(), "x must be contiguous");
  check_list("y", y, x, x.numel(), x.scalar_type());
  PCK_CHECK(offsets.numel() > 0, "offsets must have at least one element");
  check_list("offsets", offsets, x, offsets.numel(), ScalarType::Long);
  const int64_t lists = offsets.numel() - 1;
  const int64_t* const start = offsets.const_data_ptr<int64_t>();
  for (int64_t l = 0; l < lists; ++l)
    PCK_CHECK(start[l] <= start[l + 1] && start[l + 1] - start[l] < std::numeric_limits<int32_t>::max(),
              "offsets must ascend by less than 2^31, got ", start[l], " and ", start[l + 1]);
  PCK_CHECK(start[0] == 0 && start[lists] == x.numel(), "offsets must go from 0 to ", x.numel(),
            ", got ", start[0], " and ", start[lists]);
  Tensor counts = empty<int64_t>(offsets, {lists, kCounts});
  int64_t* const found = counts.mutable_data_ptr<int64_t>();
  const int64_t grain = 1 + 4096 * lists / (x.numel() + 1);  // a thread should get 4096 items
  const auto run = [&](const auto* a, const auto* b) {
    parallel_for(lists, grain, [&](int64_t first, int64_t past) {
      for (int64_t l = first; l < past; ++l)
        count_pairs(a + start[l], b + start[l], start[l + 1] - start[l], found + l * kCounts);
    });
  };
  if (x.scalar_type() == ScalarType::Float)
    run(x.const_data_ptr<float>(), y.const_data_ptr<float>());
  else
    run(x.const_data_ptr<double>(), y.const_data_ptr<double>());
  return counts;
}

template <class Add>
void visit_operators(Add add) {
  add("cpu_pair_counts(Tensor x, Tensor y, Tensor offsets) -> Tensor", Operator<&pair_counts>::boxed);
}

PCK_OPERATORS(CPU, visit_operators)

}  // namespace
}  // namespace pck
