// Stages `contrast_columns` and `contrast_rows`: the logits of one anchor, log-sum-exp -> loss ->
// slope. The formulas are in pc_kernels/backends/contrast_rows.py. Included inside the namespace of one
// instruction set.

// In place of a logit that is absent, or of the positive among the negatives: its exponential is 0.
constexpr float kAbsent = -__FLT_MAX__;

inline void drop_absent(float* row, const bool* keep, int64_t count, float absent) {
  if (keep == nullptr) return;
  for (int64_t j = 0; j < count; ++j) row[j] = keep[j] ? row[j] : absent;
}

inline void fill_present(float* row, const bool* keep, int64_t count, float value) {
  for (int64_t j = 0; j < count; ++j) row[j] = keep == nullptr || keep[j] ? value : 0.0f;
}

// The largest of a row, kAbsent if nothing is there; `finite` is false if there is a NaN or an
// infinity.
struct Top {
  float value;
  bool finite;
  bool empty() const { return value == kAbsent; }
};

inline Top top_of(const float* row, int64_t count) {
  Wide high = Wide{} + kAbsent, poison = {};  // poison: 0 for finite values, NaN otherwise
  for_parts(count, [&](Part part) PCK_INLINED {
    const Wide v = part.load(row, kAbsent);
    high = larger(v, high);
    poison += v - v;
  });
  Top top{kAbsent, is_zero(poison)};
  for (int l = 0; l < kWide; ++l) top.value = high[l] > top.value ? high[l] : top.value;
  return top;
}

// An anchor's loss; not `finite`, it is not defined, and all that are there are to be NaN.
struct Contrasted {
  double loss;
  bool finite;
};

// The positive's logit; its place among the negatives is empty. Infinity where it is absent.
inline double take_positive(const Logits& logits, int64_t i, float* row) {
  const int64_t self = logits.start + i;
  const double positive = logits.is_there(i, self) ? row[self] : __builtin_inf();
  row[self] = kAbsent;
  return positive;
}

// `columns`: whether these have a share in the slopes; z is then needed to the end, and the
// exponentials go to `apart` [count].
template <bool columns>
inline Contrasted softmax_row(const ContrastRows& stage, int64_t i, float* row, float* apart,
                              double positive) {
  const int64_t count = stage.logits.count;
  float* const terms = columns ? apart : row;
  const Top top = top_of(row, count);
  SumOfPositives sum;
  for_parts(count, [&](Part part) PCK_INLINED {
    const Wide e = exp_negative(part.load(row, kAbsent) - top.value);
    sum.add(e);
    if (stage.with_grad) part.store(terms, e);
  });
  const double total = top.empty() ? 0.0 : sum.total();
  const double margin = top.value - positive + __builtin_log(total);
  if (!stage.with_grad) return {softplus(margin), top.finite};
  const double pull = stage.weights[i] * softplus_slope(margin);
  const float rate = total > 0.0 ? static_cast<float>(pull / total) : 0.0f;
  const int64_t shared = columns ? stage.columns : 0;
  for_parts(shared, [&](Part part) PCK_INLINED {
    __builtin_prefetch(row + count + part.first);  // the next row: kept logits are not in the cache
    const Wide down = exp_negative(part.load(row, kAbsent) - part.load(stage.shift, 0.0f));
    part.store(row, part.load(terms, 0.0f) * rate + down * part.load(stage.factor, 0.0f));
  });
  for_parts(count - shared, [&](Part part) PCK_INLINED {
    part.store(row + shared, part.load(terms + shared, 0.0f) * rate);
  });
  row[stage.logits.start + i] = static_cast<float>(-pull) + (columns ? stage.own[i] : 0.0f);
  return {softplus(margin), top.finite};
}

inline Contrasted sigmoid_row(const ContrastRows& stage, int64_t i, float* row, double positive) {
  const float weight = stage.weights[i];
  const Wide one = Wide{} + 1.0f;
  SumOfPositives sum;
  Wide poison = {};
  for_parts(stage.logits.count, [&](Part part) PCK_INLINED {
    const Wide v = part.load(row, kAbsent);
    const Wide e = exp_negative(-magnitude(v));
    poison += v - v;
    sum.add(larger(v, Wide{}) + log1p_unit(e));
    if (stage.with_grad) part.store(row, (v > 0.0f ? one : e) * weight / (e + 1.0f));
  });
  if (stage.with_grad)
    row[stage.logits.start + i] = static_cast<float>(-weight * softplus_slope(-positive));
  return {sum.total() + softplus(-positive), is_zero(poison)};
}

// KL(softmax(target) || softmax(row)).
inline Contrasted distillation_row(const ContrastRows& stage, int64_t i, float* row, float* target) {
  const int64_t count = stage.logits.count;
  const Top top = top_of(row, count), target_top = top_of(target, count);
  const bool finite = top.finite && target_top.finite;
  SumOfPositives sum, target_sum;
  LongSum<1> ahead;
  for_parts(count, [&](Part part) PCK_INLINED {
    const Wide z = part.load(row, kAbsent) - top.value;
    const Wide y = part.load(target, kAbsent) - target_top.value;
    const Wide e = exp_negative(z), t = exp_negative(y);
    sum.add(e);
    target_sum.add(t);
    ahead.add(t > 0.0f ? t * (y - z) : Wide{});
    if (!stage.with_grad) return;
    part.store(row, e);
    part.store(target, t);
  });
  if (top.empty()) {
    fill_present(row, nullptr, count, 0.0f);
    return {0.0, finite};
  }
  if (stage.with_grad) {
    const float rate = static_cast<float>(stage.weights[i] / sum.total());
    const float target_rate = static_cast<float>(stage.weights[i] / target_sum.total());
    for_parts(count, [&](Part part) PCK_INLINED {
      part.store(row, part.load(row, 0.0f) * rate - part.load(target, 0.0f) * target_rate);
    });
  }
  const double loss =
      ahead.total() / target_sum.total() + __builtin_log(sum.total() / target_sum.total());
  return {loss > 0.0 ? loss : 0.0, finite};
}

template <class Form>
inline Contrasted contrast_row(const ContrastRows& stage, int64_t i, float* row, float* apart) {
  if constexpr (Form::has_target) {
    float* const target = stage.target + i * stage.logits.count;
    drop_absent(target, stage.logits.keep_of(i), stage.logits.count, kAbsent);
    return distillation_row(stage, i, row, target);
  } else {
    const double positive = take_positive(stage.logits, i, row);
    Contrasted result;
    if constexpr (Form::code == Sigmoid::code)
      result = sigmoid_row(stage, i, row, positive);
    else if (stage.columns > 0)
      result = softmax_row<true>(stage, i, row, apart, positive);
    else
      result = softmax_row<false>(stage, i, row, apart, positive);
    // Infinity stands for a positive that is absent, where it is.
    const bool there = stage.logits.is_there(i, stage.logits.start + i);
    result.finite = result.finite && (!there || positive - positive == 0.0);
    return result;
  }
}

inline void run_row(const ContrastRows& stage, int64_t i, Scratch& scratch) {
  const int64_t count = stage.logits.count;
  const bool* const keep = stage.logits.keep_of(i);
  float* const row = stage.logits.row(i);
  drop_absent(row, keep, count, kAbsent);
  visit(ContrastForms{}, stage.form, [&](auto form) {
    const Contrasted result = contrast_row<decltype(form)>(stage, i, row, scratch.slope);
    stage.losses[i] = result.finite ? static_cast<float>(result.loss) : __builtin_nanf("");
    if (!stage.with_grad) return;
    if (!result.finite)
      fill_present(row, keep, count, __builtin_nanf(""));
    else
      drop_absent(row, keep, count, 0.0f);
  });
}

// The share of some rows, `stride` apart, in the sums of `count` columns: sum exp(z - top), as top
// grows.
template <int rows>
inline void add_rows(const float* row, int64_t stride, int64_t count, float* top, double* total) {
  for_parts(count, [&](Part part) PCK_INLINED {
    const Wide before = part.load(top, kAbsent);
    Wide z[rows], high = before, added = {};
    for (int r = 0; r < rows; ++r) {
      z[r] = part.load(row + r * stride, kAbsent);
      high = larger(z[r], high);
    }
    for (int r = 0; r < rows; ++r) added += exp_negative(z[r] - high);
    const Wide kept = exp_negative(before - high);
    part.store(top, high);
    HalfDouble sums[2] = {};
    Half factors[2], terms[2];
    __builtin_memcpy(sums, total + part.first, part.lanes * sizeof(double));
    __builtin_memcpy(factors, &kept, sizeof(kept));
    __builtin_memcpy(terms, &added, sizeof(added));
    for (int h = 0; h < 2; ++h)
      sums[h] = sums[h] * __builtin_convertvector(factors[h], HalfDouble) +
                __builtin_convertvector(terms[h], HalfDouble);
    __builtin_memcpy(total + part.first, sums, part.lanes * sizeof(double));
  });
}

// A block of columns. In the rows, -infinity takes the place of what is absent, and of positives until
// the sums are done.
inline void run_row(const ContrastColumns& stage, int64_t block, Scratch&) {
  const int64_t first = block * kColumnBlock, stride = stage.logits.count;
  const int64_t past = first + kColumnBlock < stage.columns ? first + kColumnBlock : stage.columns;
  const int64_t count = past - first;
  float* const top = stage.top + first;
  double* const total = stage.total + first;
  for (int64_t j = 0; j < count; ++j) top[j] = top[j] > kAbsent ? top[j] : kAbsent;
  const auto is_here = [=](int64_t self) { return first <= self && self < past; };
  for (int64_t i = 0; i < stage.anchors; ++i) {
    const int64_t self = stage.logits.start + i;
    float* const row = stage.logits.row(i);
    const bool* const keep = stage.logits.keep_of(i);
    if (keep != nullptr) drop_absent(row + first, keep + first, count, -__builtin_inff());
    if (!is_here(self)) continue;
    stage.positive[self] = stage.logits.is_there(i, self) ? row[self] : __builtin_inf();
    row[self] = -__builtin_inff();
  }
  constexpr int together = 8;
  int64_t i = 0;
  for (; i + together <= stage.anchors; i += together)
    add_rows<together>(stage.logits.row(i) + first, stride, count, top, total);
  for (; i < stage.anchors; ++i) add_rows<1>(stage.logits.row(i) + first, stride, count, top, total);
  for (i = 0; i < stage.anchors; ++i) {
    const int64_t self = stage.logits.start + i;
    if (is_here(self)) stage.logits.row(i)[self] = static_cast<float>(stage.positive[self]);
  }
}
