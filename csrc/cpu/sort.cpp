#include "sort.h"

#include <algorithm>
#include <bit>
#include <memory>
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

// An integer of the same order as the value, -0 as 0.
uint32_t key_of(float value) {
  const auto bits = std::bit_cast<uint32_t>(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// By counting, the lowest digit first: O(count). A key and its place go together.
template <int kBits>
void sort_by_digits(const float* x, int64_t count, int32_t* order) {
  constexpr int kDigits = (32 + kBits - 1) / kBits;
  constexpr uint32_t kValues = 1u << kBits;
  const auto digit_of = [](uint32_t key, int digit) { return (key >> (digit * kBits)) % kValues; };
  const auto memory = std::make_unique_for_overwrite<uint64_t[]>(static_cast<size_t>(2 * count));
  uint64_t *items = memory.get(), *sorted = items + count;
  uint32_t next[kDigits][kValues] = {};  // where the next item with this digit goes
  for (int64_t i = 0; i < count; ++i)
    for (int d = 0; d < kDigits; ++d) ++next[d][digit_of(key_of(x[i]), d)];
  for (auto& digit : next) std::exclusive_scan(digit, digit + kValues, digit, 0u);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = key_of(x[i]);
    sorted[next[0][digit_of(key, 0)]++] = static_cast<uint64_t>(key) << 32 | static_cast<uint32_t>(i);
  }
  for (int d = 1; d < kDigits; ++d) {
    std::swap(items, sorted);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t to = next[d][digit_of(static_cast<uint32_t>(items[i] >> 32), d)]++;
      if (d + 1 < kDigits)
        sorted[to] = items[i];
      else
        order[to] = static_cast<int32_t>(static_cast<uint32_t>(items[i]));
    }
  }
}

// From here on three passes over the values cost less than four over fewer counters.
constexpr int64_t kManyValues = 2048;

}  // namespace

void sort_order(const float* x, int64_t count, int32_t* order) {
  if (count < kManyValues)
    sort_by_digits<8>(x, count, order);
  else
    sort_by_digits<11>(x, count, order);
}

void sort_order(const double* x, int64_t count, int32_t* order) {
  std::iota(order, order + count, 0);
  const auto before = [](double a, double b) { return a < b || (b != b && a == a); };  // NaN: last
  std::stable_sort(order, order + count, [&](int32_t a, int32_t b) { return before(x[a], x[b]); });
}

}  // namespace pck
