// Stage `hard_rank`: mid-ranks in [0, 1], O(count). Included inside the namespace of one
// instruction set.
//
// A monotone map drops the values into at least one bucket a point; a counting sort by bucket leaves
// them in order but for the few that share a bucket. Within a window as wide as the fullest bucket, a
// value's rank is then its place plus how many neighbours compare below it: no branches, no sort.

constexpr int kWidestWindow = 24;

// Ranks of keys in order but for runs no longer than window + 1; `sorted` has window pads on both ends.
inline void rank_by_window(const float* sorted, const int32_t* order, int64_t count, int window,
                           float whole, float* rank) {
  for (int64_t i = 0; i < count; i += kWide) {
    const Wide key = load(sorted + i);
    WideMask below = {}, not_above = {};  // the number of neighbours that are
    for (int o = -window; o <= window; ++o) {
      const Wide other = load(sorted + i + o);
      below = count_where(other < key, below);
      not_above = count_where(other <= key, not_above);
    }
    // Twice the rank, in whole numbers; its own place is among those not above it.
    const auto first = static_cast<int32_t>(2 * (i - window) - 1);
    const Wide twice = __builtin_convertvector(2 * lane_index() + first + below + not_above, Wide);
    float value[kWide];
    store(value, twice / whole);
    const int64_t here = count - i < kWide ? count - i : kWide;
    for (int64_t l = 0; l < here; ++l) rank[order[i + l]] = value[l];
  }
}

// Ranks of keys in order.
inline void rank_by_runs(const float* sorted, const int32_t* order, int64_t count, float whole,
                         float* rank) {
  for (int64_t first = 0; first < count;) {
    int64_t past = first + 1;
    while (past < count && sorted[past] == sorted[first]) ++past;
    const float value = static_cast<float>(first + past - 1) / whole;
    for (int64_t i = first; i < past; ++i) rank[order[i]] = value;
    first = past;
  }
}

// How numbers of 2^n buckets lie in memory: the lanes of a vector have as many consecutive buckets
// each, one after the other, so that sums over buckets are sums of vectors.
class Buckets {
 public:
  explicit Buckets(int64_t count) : count_(static_cast<int32_t>(count)), rows_(count_ / kWide) {
    while (1 << shift_ < rows_) ++shift_;
  }

  int32_t count() const { return count_; }
  int32_t position(int32_t bucket) const { return (bucket & (rows_ - 1)) * kWide + (bucket >> shift_); }

  // Sizes become the sums of those before; returns the largest.
  int sizes_to_starts(int32_t* sizes) const {
    WideMask largest = {}, sum = {};
    for (int32_t r = 0; r < rows_; ++r) {
      const auto size = load<WideMask>(sizes + r * kWide);
      largest = size > largest ? size : largest;
      sum += size;
    }
    int fullest = 0;
    for (int l = 0, before = 0; l < kWide; ++l) {
      const int all = sum[l];
      sum[l] = before;
      before += all;
      fullest = largest[l] > fullest ? largest[l] : fullest;
    }
    for (int32_t r = 0; r < rows_; ++r) {
      const auto size = load<WideMask>(sizes + r * kWide);
      store(sizes + r * kWide, sum);
      sum += size;
    }
    return fullest;
  }

 private:
  int32_t count_, rows_;
  int shift_ = 0;
};

// size[b] += how many points are in bucket b; place[i] <- how many of these came before point i, which
// is right where a bucket holds at most 256. Eight places a store: stores are what bounds this loop.
inline void count_points(const int32_t* bucket, int64_t count, int32_t* size, uint8_t* place) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t places = 0;
    for (int k = 0; k < 8; ++k)
      places |= static_cast<uint64_t>(static_cast<uint8_t>(size[bucket[i + k]]++)) << 8 * k;
    for (int k = 0; k < 8; ++k) place[i + k] = static_cast<uint8_t>(places >> 8 * k);
  }
  for (; i < count; ++i) place[i] = static_cast<uint8_t>(size[bucket[i]]++);
}

// Scratch::sorted and ::order <- x in order, bucket by bucket, of points at Scratch::cell.
inline void sort_crowded(const float* x, int64_t count, const Buckets& all, Scratch& scratch) {
  float* const sorted = scratch.sorted + kSortedPad;
  int32_t *const order = scratch.order, *const start = scratch.buckets;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t slot = start[scratch.cell[i]]++;
    sorted[slot] = x[i];
    order[slot] = static_cast<int32_t>(i);
  }
  for (int32_t b = 0, first = 0; b < all.count(); ++b) {
    const int32_t past = start[all.position(b)];
    if (past - first > 1) sort_keys(sorted + first, order + first, past - first);
    first = past;
  }
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline void hard_rank(const float* x, int64_t count, float* rank, Scratch& scratch) {
  if (count < 2) {
    for (int64_t i = 0; i < count; ++i) rank[i] = x[i] == x[i] ? 0.5f : x[i];
    return;
  }
  const float whole =
      static_cast<float>(2 * (count - 1));  // dividing by it gives exactly 0 and 1 at the ends
  float* const sorted = scratch.sorted + kSortedPad;
  int32_t* const order = scratch.order;
  const Range range = range_of(x, count);
  const float width = range.high - range.low;
  const int64_t buckets = hard_rank_buckets(count);
  const float scale = static_cast<float>(buckets - 1) / width;
  if (!range.finite || !(width > 0.0f) || !(scale - scale == 0.0f) || !(scale > 0.0f)) {
    for (int64_t i = 0; i < count; ++i) {
      if (!(x[i] == x[i])) {  // a NaN has no rank, and neither has anything beside it
        for (int64_t j = 0; j < count; ++j) rank[j] = x[i];
        return;
      }
      sorted[i] = x[i];
      order[i] = static_cast<int32_t>(i);
    }
    sort_keys(sorted, order, count);
    rank_by_runs(sorted, order, count, whole, rank);
    return;
  }

  int32_t *const bucket = scratch.cell, *const start = scratch.buckets;
  const Buckets all(buckets);
  for (int64_t i = 0; i < count; ++i)
    bucket[i] = all.position(static_cast<int32_t>((x[i] - range.low) * scale));
  for (int64_t b = 0; b < buckets; ++b) start[b] = 0;
  uint8_t* const place = scratch.place_in_bucket;
  count_points(bucket, count, start, place);
  const int window = all.sizes_to_starts(start) - 1;
  if (window > kWidestWindow) {
    sort_crowded(x, count, all, scratch);
    rank_by_runs(sorted, order, count, whole, rank);
    return;
  }
  uint64_t* const items = scratch.items;  // keys, and where they come from: one store for both
  for (int64_t i = 0; i < count; ++i)
    items[start[bucket[i]] + place[i]] = static_cast<uint64_t>(i) << 32 | bits_of(x[i]);
  for (int64_t i = 0; i < count; ++i) {
    const auto key = static_cast<uint32_t>(items[i]);
    __builtin_memcpy(sorted + i, &key, sizeof(key));
    order[i] = static_cast<int32_t>(items[i] >> 32);
  }
  for (int p = 1; p <= kSortedPad; ++p) sorted[-p] = -__builtin_inff();
  for (int p = 0; p < kSortedPad; ++p) sorted[count + p] = __builtin_inff();
  rank_by_window(sorted, order, count, window, whole, rank);
}

inline void run_row(const HardRank& stage, int64_t i, Scratch& scratch) {
  const int64_t whole = stage.points.count;
  const Selection selection(stage.points.present, i, whole, scratch);
  const float* const x = selection.front(stage.points.x + i * whole, scratch.student);
  float* const rank = selection.room(stage.rank + i * whole, scratch.teacher);
  hard_rank(x, selection.count(), rank, scratch);
  selection.scatter(rank, stage.rank + i * whole);
}
