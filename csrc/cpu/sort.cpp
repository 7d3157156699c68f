#include "sort.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>
#include <vector>

namespace pck {

void sort_keys(float* keys, int32_t* payload, int64_t count) {
  std::vector<std::pair<float, int32_t>> pairs(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) pairs[static_cast<size_t>(i)] = {keys[i], payload[i]};
  std::sort(pairs.begin(), pairs.end());
  for (int64_t i = 0; i < count; ++i) {
    keys[i] = pairs[static_cast<size_t>(i)].first;
    payload[i] = pairs[static_cast<size_t>(i)].second;
  }
}

namespace {

constexpr int kDigitBits = 8;
constexpr int kDigits = 4;
constexpr uint32_t kDigitValues = 1u << kDigitBits;

uint32_t digit_of(uint64_t item, int digit) {
  return static_cast<uint32_t>(item >> (32 + digit * kDigitBits)) % kDigitValues;
}

// A value in the upper half, as an integer of the same order (-0 as 0), and its place in the lower.
uint64_t item_of(float value, int64_t place) {
  const auto bits = std::bit_cast<uint32_t>(value + 0.0f);
  const uint32_t key = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(place);
}

}  // namespace

// By counting, the lowest digit first: O(count).
void sort_order(const float* x, int64_t count, int32_t* order) {
  std::vector<uint64_t> items(static_cast<size_t>(count)), sorted(items.size());
  uint32_t start[kDigits][kDigitValues] = {};
  for (int64_t i = 0; i < count; ++i) {
    items[static_cast<size_t>(i)] = item_of(x[i], i);
    for (int d = 0; d < kDigits; ++d) ++start[d][digit_of(items[static_cast<size_t>(i)], d)];
  }
  for (int d = 0; d < kDigits; ++d) {
    uint32_t* const next = start[d];
    std::exclusive_scan(next, next + kDigitValues, next, 0u);
    for (const uint64_t item : items) sorted[next[digit_of(item, d)]++] = item;
    items.swap(sorted);
  }
  for (int64_t i = 0; i < count; ++i)
    order[i] = static_cast<int32_t>(static_cast<uint32_t>(items[static_cast<size_t>(i)]));
}

void sort_order(const double* x, int64_t count, int32_t* order) {
  std::iota(order, order + count, 0);
  const auto before = [](double a, double b) { return a < b || (b != b && a == a); };  // NaN: last
  std::stable_sort(order, order + count, [&](int32_t a, int32_t b) { return before(x[a], x[b]); });
}

}  // namespace pck
