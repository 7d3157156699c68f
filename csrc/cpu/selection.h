// What is there of a row, moved together. Included inside the namespace of one instruction set.

// The values that are there move to the front of a row, and results back to their places. Without a
// mask only the anchor itself has to go: the last reference takes its place, since ranks do not
// depend on the order.
class Selection {
 public:
  Selection(const Present& present, int64_t i, int64_t count, Scratch& scratch)
      : self_(present.self_of(i)), whole_(count), count_(count - (self_ >= 0)) {
    const bool* const keep = present.keep_of(i, count);
    if (keep == nullptr) return;
    int32_t* const chosen = scratch.chosen;
    chosen_ = chosen;
    count_ = 0;
    for (int64_t j = 0; j < count; ++j) {
      chosen[count_] = static_cast<int32_t>(j);
      count_ += keep[j] && j != self_;
    }
  }

  int64_t count() const { return count_; }

  // front [count] <- the values that are there; `front` may be `values`.
  void gather(const float* values, float* front) const {
    if (chosen_ != nullptr) {
      for (int64_t i = 0; i < count_; ++i) front[i] = values[chosen_[i]];
      return;
    }
    if (front != values)
      for (int64_t j = 0; j < count_; ++j) front[j] = values[j];
    if (self_ >= 0) front[self_] = values[count_];
  }

  // Where the j-th that is there has its place in a row.
  int64_t place_of(int64_t j) const {
    return chosen_ != nullptr ? chosen_[j] : j == self_ ? count_ : j;
  }

  // values <- front [count] where they are there, 0 elsewhere; `front` may be `values` without a mask.
  void scatter(const float* front, float* values) const {
    if (chosen_ != nullptr) {
      for (int64_t j = 0; j < whole_; ++j) values[j] = 0.0f;
      for (int64_t i = 0; i < count_; ++i) values[chosen_[i]] = front[i];
      return;
    }
    if (front != values)
      for (int64_t j = 0; j < count_; ++j) values[j] = front[j];
    if (self_ < 0) return;
    values[count_] = values[self_];
    values[self_] = 0.0f;
  }

  // For values that are only read, and for room to write what `scatter` takes: the row itself where all
  // of it is there, else `memory`.
  const float* front(const float* values, float* memory) const {
    if (all()) return values;
    gather(values, memory);
    return memory;
  }
  float* room(float* values, float* memory) const { return all() ? values : memory; }

 private:
  bool all() const { return chosen_ == nullptr && self_ < 0; }

  int64_t self_;
  int64_t whole_;
  int64_t count_;
  const int32_t* chosen_ = nullptr;
};
