// Passes over points, of points.cpp: the sums of a block of them, and what pulls at one. Included
// inside the namespace of one instruction set.

inline void run_row(const PointSums& stage, int64_t block, Scratch&) {
  const int64_t width = stage.width, first = block * kPointBlock;
  const int64_t past = first + kPointBlock < stage.rows ? first + kPointBlock : stage.rows;
  float* const sums = stage.sums + block * width;
  float* const powers = stage.powers + block * width;
  for (int64_t c = 0; c < width; ++c) sums[c] = powers[c] = 0.0f;
  Wide largest = {};
  for (int64_t i = first; i < past; ++i) {
    const float* const row = stage.x + i * width;
    SumOfPositives square;
    for_parts(width, [&](Part part) PCK_INLINED {
      const Wide value = part.load(row, 0.0f), power = value * value;
      largest = larger(largest, magnitude(value));
      square.add(power);
      part.store(sums, part.load(sums, 0.0f) + value);
      part.store(powers, part.load(powers, 0.0f) + power);
    });
    stage.squares[i] = static_cast<float>(square.total());
  }
  float most = 0.0f;
  for (int l = 0; l < kWide; ++l) most = largest[l] > most ? largest[l] : most;
  stage.largest[block] = most;
}

inline void run_row(const PullRows& stage, int64_t i, Scratch&) {
  constexpr int64_t strip = 16, side_by_side = 4;  // summed in float, and not one after the other
  const float* const v = stage.v + i * stage.row;
  for_parts(stage.width, [&](Part part) PCK_INLINED {
    const Wide own = part.load(stage.x + i * stage.width, 0.0f);
    const auto term = [&](int64_t j) PCK_INLINED {
      return v[j * stage.column] * (own - part.load(stage.y + j * stage.width, 0.0f));
    };
    HalfDouble low = {}, high = {};
    for (int64_t first = 0; first < stage.count; first += strip) {
      const int64_t past = first + strip < stage.count ? first + strip : stage.count;
      Wide recent[side_by_side] = {};
      int64_t j = first;
      for (; j + side_by_side <= past; j += side_by_side)
        for (int l = 0; l < side_by_side; ++l) recent[l] += term(j + l);
      for (; j < past; ++j) recent[0] += term(j);
      Half half[2];
      const Wide sum = (recent[0] + recent[1]) + (recent[2] + recent[3]);
      __builtin_memcpy(half, &sum, sizeof(sum));
      low += __builtin_convertvector(half[0], HalfDouble);
      high += __builtin_convertvector(half[1], HalfDouble);
    }
    const Half half[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
    Wide total;
    __builtin_memcpy(&total, half, sizeof(total));
    part.store(stage.target + i * stage.width, total);
  });
}
