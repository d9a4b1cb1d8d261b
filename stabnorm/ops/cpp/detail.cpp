// `add_detail_` computes what the costlier statistics need of a norm's input, in one read of memory, and adds it to the
// layer's accumulator; `outliers_of_rows` counts the large entries of a norm's output. The formulas are those in
// stabnorm/functional/detail.py.
#include "columns.h"

namespace {

// The rows of `DetailMoments`, as stabnorm/functional/detail.py names them; tests/ops/test_layout.py compares them.
enum { NONFINITE, ZEROS, SEQUENCES, SQUARES, OUTPUTS };
enum { MEDIAN, MAX_TO_MEDIAN, KURTOSIS, MEANS };
enum { SHIFT, REST, VAR };

constexpr float OUTLIER = 6;

static inline vi bits_of(vf v) { vi b; std::memcpy(&b, &v, sizeof b); return b; }
static inline vf absolute(vf v) { vi b = bits_of(v) & 0x7fffffff; vf a; std::memcpy(&a, &b, sizeof a); return a; }
// Reduce a vector half by half. `sum` of vectors.h takes its address, so that the loops here would keep it in memory.
template <int N, class F> static inline float reduced(float* p, F f) {
  if constexpr (N == 1) return p[0];
  for (int j = 0; j < N / 2; j++) p[j] = f(p[j], p[j + N / 2]);
  return reduced<std::max(N / 2, 1)>(p, f);
}
template <class F> static inline float reduced(vf v, F f) { float parts[W]; store(parts, v); return reduced<W>(parts, f); }
static inline float total(vf v) { return reduced(v, [](float a, float b) { return a + b; }); }
static inline int64_t count_of(vi v) { return int64_t(total(__builtin_convertvector(v, vf))); }  // of less than 2^24
static inline float largest(vf v) { return reduced(v, [](float a, float b) { return std::max(a, b); }); }
static inline float least(vf v) { return -largest(-v); }

float between(float low, float high) {  // in the middle of the floats from low to high, of which none is negative
  uint32_t a, b;
  std::memcpy(&a, &low, 4), std::memcpy(&b, &high, 4);
  a += (b - a) / 2;
  std::memcpy(&low, &a, 4);
  return low;
}

struct Sides {  // of a pivot
  int64_t count;     // values that are not above it
  float most, next;  // the largest of these, and the least above it
};

Sides divide(const float* values, int64_t C, float pivot) {
  vi count = {};
  vf most = splat(0), next = splat(std::numeric_limits<float>::infinity());
  for (int64_t c = 0; c < C; c += W) {
    const vf v = load(values + c);
    const vi is_above = v > pivot;
    count -= is_above;
    most = max(is_above ? most : v, most), next = min(is_above ? v : next, next);
  }
  return {(C + W - 1) / W * W - count_of(count), largest(most), least(next)};
}

// Return the median of C magnitudes without a NaN, of which `top` is the largest; infinities fill the last vector. A pivot
// divides them, and each side then ends at a value that is there, so that most often three or four pivots suffice, and
// never more than some sixty. `guess` is the first.
float median(const float* values, int64_t C, float top, float guess) {
  const int64_t rank = (C - 1) / 2;
  float low = 0, high = top;     // the value of this rank is in [low, high]
  int64_t under = 0, up_to = C;  // numbers of values < low, and <= high
  for (int round = 0; low < high; round++) {
    float pivot = guess;
    if (round == 1) pivot = guess * (1 + (rank + 1 - (under ? under : up_to)) * 2.3f / C);  // as of normal numbers
    else if (round % 3 == 2) pivot = low + (high - low) * ((rank + 1 - under) / float(up_to - under));
    else if (round > 0) pivot = between(low, high);
    if (!(pivot >= low)) pivot = low;
    if (!(pivot < high)) pivot = between(low, high);
    const Sides sides = divide(values, C, pivot);
    if (sides.count <= rank) low = sides.next, under = sides.count;
    else high = sides.most, up_to = sides.count;
    if (sides.count == rank + 1) return C % 2 ? high : 0.5f * (high + sides.next);
    if (sides.count == rank) break;
  }
  const float lower = under == rank ? low : high;
  if (C % 2) return lower;
  const Sides sides = divide(values, C, lower);
  return sides.count > rank + 1 ? lower : 0.5f * (lower + sides.next);
}

struct Figures {  // of the rows of one thread
  int64_t C, width, seen = 0, nonfinite = 0, zeros = 0, num_sequences = 0;
  double squares = 0, means[MEANS] = {};
  int64_t in_sequence = 0;
  float ratio = 0.845f;  // of the last token's median to its mean magnitude; this is that of normal numbers
  Array<float> shift, magnitudes;  // the first row; those of a row
  ColumnSums<1> sequence;          // around the shift
  Array<double> mean, moment;      // over sequences, around the shift

  explicit Figures(int64_t C) : C(C), width(padded(C)), shift(width), magnitudes(width), sequence(C), mean(C), moment(C) {
    std::fill(magnitudes.begin(), magnitudes.end(), std::numeric_limits<float>::infinity());
  }

  void add_to_sequence(const float* row) {
    if (seen == 0) std::memcpy(shift.data(), row, C * sizeof(float));
    sequence.add_row([&](int64_t c, int n, auto whole, vf* terms) { terms[0] = take<whole>(row + c, n) - load(&shift[c]); });
    in_sequence++;
  }

  // The weight of a sequence is the square of its length.
  void end_sequence() {
    if (in_sequence == 0) return;
    sequence.end_tile();
    const double length = double(in_sequence), after = squares + length * length, weight = length * length / after;
    for (int64_t c = 0; c < C; c++) {
      const double delta = sequence[0][c] / length - mean[c];
      mean[c] += weight * delta, moment[c] += squares * weight * delta * delta;
    }
    sequence.clear();
    num_sequences++, squares = after, in_sequence = 0;
  }

  // Add the counts of a row's values, and what `token_shape` says of it.
  void add_row(const float* row, bool values, bool tokens, float eps, int64_t ahead) {
    vf all = splat(0), size = splat(0), top = splat(0);
    vi finite = {}, zero = {};
    for_columns(C, [&](int64_t c, int n, auto whole) {
      __builtin_prefetch(row + c + ahead, 0, 2);
      const vf x = take<whole>(row + c, n), m = absolute(x);
      put<whole>(&magnitudes[c], m, n);
      all += x, size += m, top = max(m, top);
      finite += (vi)(bits_of(m) < 0x7f800000) & 1, zero += (vi)(x == 0) & 1;
    });
    const int64_t rest = (C + W - 1) / W * W - C, not_finite = C + rest - count_of(finite);  // a zero for each of the rest
    if (values) nonfinite += not_finite, zeros += count_of(zero) - rest;
    if (!tokens) return;
    float figures[MEANS];
    const float whole_sum = total(all), whole_size = total(size);
    if (std::isnan(whole_size)) {
      for (float& figure : figures) figure = std::numeric_limits<float>::quiet_NaN();
    } else {
      const float most = largest(top), middle = median(magnitudes.data(), C, most, ratio * whole_size / C);
      ratio = middle > 0 && std::isfinite(whole_size) ? middle * C / whole_size : 0.845f;
      figures[MEDIAN] = middle, figures[MAX_TO_MEDIAN] = most / std::max(middle, std::sqrt(eps));
      figures[KURTOSIS] = kurtosis(row, whole_sum / C, eps);
    }
    for (int i = 0; i < MEANS; i++) means[i] += figures[i];
  }

  float kurtosis(const float* row, float about, float eps) const {
    vf first = splat(0), second = splat(0);
    for_columns(C, [&](int64_t c, int n, auto whole) {
      const vf d = whole ? load(row + c) - about : mask(load_some(row + c, n) - about, n);
      first += d, second += d * d;
    });
    const float rest = total(first) / C;  // the rounding error of a mean far from 0
    const float scale = 1 / std::max(total(second) / C - rest * rest, eps);
    vf fourth = splat(0);
    for_columns(C, [&](int64_t c, int n, auto whole) {
      vf d = whole ? load(row + c) - about - rest : mask(load_some(row + c, n) - about - rest, n);
      d = d * d * scale;  // at most C: fourth powers would overflow
      fourth += d * d;
    });
    return total(fourth) / C;
  }

  // Add those of another thread; the means of sequences have other shifts there.
  void merge(const Figures& other) {
    seen += other.seen, nonfinite += other.nonfinite, zeros += other.zeros, num_sequences += other.num_sequences;
    for (int i = 0; i < MEANS; i++) means[i] += other.means[i];
    if (other.squares == 0) return;
    const double after = squares + other.squares, weight = other.squares / after;
    for (int64_t c = 0; c < C; c++) {
      const double delta = other.mean[c] + other.shift[c] - mean[c] - shift[c];
      mean[c] += weight * delta, moment[c] += other.moment[c] + squares * weight * delta * delta;
    }
    squares = after;
  }

  // Add all to an accumulator, whose rows of `sequences` have `stride` numbers.
  void add_to(int64_t* seen_before, int64_t* counts, float* into, float* sequences, int64_t stride) const {
    const double share = double(seen) / double(*seen_before + seen);
    for (int i = 0; i < MEANS; i++) into[i] = float(into[i] + (means[i] / seen - into[i]) * share);
    *seen_before += seen;
    const double before = double(counts[SQUARES]), after = before + squares, weight = after ? squares / after : 0;
    counts[NONFINITE] += nonfinite, counts[ZEROS] += zeros, counts[SEQUENCES] += num_sequences;
    counts[SQUARES] += int64_t(squares);
    for (int64_t c = 0; c < C && squares; c++) {
      auto at = [&](int row) -> float& { return sequences[row * stride + c]; };
      const double old = double(at(SHIFT)) + at(REST), delta = mean[c] + shift[c] - old, now = old + weight * delta;
      at(VAR) = float((at(VAR) * before + moment[c] + before * weight * delta * delta) / after);
      at(SHIFT) = float(now), at(REST) = float(now - at(SHIFT));
    }
  }
};

}  // namespace

// A sequence is `rows / batch` rows. Without a valid row nothing changes.
extern "C" void stabnorm_detail(const float* x, int64_t rows, int64_t C, int64_t batch, const uint8_t* valid, float eps,
                                int tokens, int values, int sequences, int threads, int64_t* seen, int64_t* counts,
                                float* means, float* into, int64_t stride) {
  const int parts = int(std::min<int64_t>(parts_of(rows, C, threads), batch));
  const int64_t length = rows / batch;
  Array<Figures> figures;
  figures.reserve(parts);
  for (int part = 0; part < parts; part++) figures.emplace_back(C);
  in_parallel(parts, [&](int part) {
    Figures& f = figures[part];
    for (int64_t b = batch * part / parts; b < batch * (part + 1) / parts; b++) {
      for (int64_t r = b * length; r < (b + 1) * length; r++) {
        if (valid && !valid[r]) continue;
        const float* row = x + r * C;
        if (sequences) f.add_to_sequence(row);
        if (values || tokens) f.add_row(row, values, tokens, eps, 8 * C);
        f.seen++;
      }
      f.end_sequence();
    }
  });
  for (int part = 1; part < parts; part++) figures[0].merge(figures[part]);
  if (figures[0].seen) figures[0].add_to(seen, counts, means, into, stride);
}

// Count in each channel the valid rows whose magnitude is at least OUTLIER; return the number of valid rows.
extern "C" int64_t stabnorm_outliers(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, int threads,
                                     int64_t* outliers) {
  const int parts = parts_of(rows, C, threads);
  const int64_t width = padded(C);
  Array<int32_t> counts(parts * width);  // 2^31 rows would take more memory than there is
  Array<int64_t> seen(parts);
  in_parallel(parts, [&](int part) {
    int32_t* of = counts.data() + part * width;
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; r++) {
      if (valid && !valid[r]) continue;
      seen[part]++;
      with_type(type, [&](auto* typed) {
        const auto* row = (decltype(typed))x + r * C;
        for_columns(C, [&](int64_t c, int n, auto whole) {
          __builtin_prefetch(row + c + 8 * C, 0, 2);
          vi now; std::memcpy(&now, of + c, sizeof now);
          now -= (vi)(absolute(take<whole>(row + c, n)) >= OUTLIER);
          std::memcpy(of + c, &now, sizeof now);
        });
      });
    }
  });
  int64_t tokens = 0;
  for (int part = 0; part < parts; part++) {
    tokens += seen[part];
    for (int64_t c = 0; c < C; c++) outliers[c] += counts[part * width + c];
  }
  return tokens;
}
