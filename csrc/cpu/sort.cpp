#include "sort.h"

#include <algorithm>
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

void sort_order(const float* x, int64_t count, int32_t* order) {
  std::iota(order, order + count, 0);
  std::sort(order, order + count,
            [x](int32_t a, int32_t b) { return x[a] < x[b] || (x[a] == x[b] && a < b); });
}

}  // namespace pck
