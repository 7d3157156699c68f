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

  int32_t* const bucket = scratch.cell;
  for (int64_t i = 0; i < count; ++i) bucket[i] = static_cast<int32_t>((x[i] - range.low) * scale);
  uint32_t* const start = scratch.buckets;
  for (int64_t b = 0; b <= buckets; ++b) start[b] = 0;
  for (int64_t i = 0; i < count; ++i) ++start[bucket[i]];
  uint32_t fullest = 0;
  for (int64_t b = 0; b < buckets; ++b) fullest = start[b] > fullest ? start[b] : fullest;
  uint32_t below = 0;
  for (int64_t b = 0; b < buckets; ++b) {
    const uint32_t here = start[b];
    start[b] = below;
    below += here;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t slot = start[bucket[i]]++;
    sorted[slot] = x[i];
    order[slot] = static_cast<int32_t>(i);
  }
  const int window = static_cast<int>(fullest) - 1;
  if (window <= kWidestWindow) {
    for (int p = 1; p <= kSortedPad; ++p) sorted[-p] = -__builtin_inff();
    for (int p = 0; p < kSortedPad; ++p) sorted[count + p] = __builtin_inff();
    rank_by_window(sorted, order, count, window, whole, rank);
    return;
  }
  for (int64_t b = 0, first = 0; b < buckets; ++b) {  // start[b] is now where bucket b ends
    const int64_t size = static_cast<int64_t>(start[b]) - first;
    if (size > 1) sort_keys(sorted + first, order + first, size);
    first += size;
  }
  rank_by_runs(sorted, order, count, whole, rank);
}

inline void run_row(const HardRank& stage, int64_t i, Scratch& scratch) {
  const int64_t whole = stage.points.count;
  const Selection selection(stage.points.present, i, whole, scratch);
  const float* const x = selection.front(stage.points.x + i * whole, scratch.student);
  float* const rank = selection.room(stage.rank + i * whole, scratch.teacher);
  hard_rank(x, selection.count(), rank, scratch);
  selection.scatter(rank, stage.rank + i * whole);
}
