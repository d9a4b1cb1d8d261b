// `add_moments_` computes the moments of a norm's input x, of the normalised input n, and of the tokens, in one read of
// memory, and adds them to the layer's accumulator. `norm_with_moments` also writes the norm's output, n gain + bias. Some
// rows at a time, a strip, stay in the inner caches: first mean and variance of each token are computed, then column sums
// of deviations from a shift, while the next strip is fetched. Column sums are float32 in a tile of rows and float64 above
// it. Blocks of rows with a common shift, threads, and what the accumulator held before, merge by Chan's rule.
#include "columns.h"
#include "layout.h"

namespace {

constexpr int TOGETHER = 4;         // tokens whose sums are computed at once, so that none waits for another one's
constexpr int STRIP = 32;           // rows at most in a strip
constexpr int64_t STRIP_BYTES = 128 << 10;  // at most, of a second cache that has 256 KiB or more
// A block has at most as many times the rows that its shift is the mean of, so that the shift is at most four standard
// deviations off.
constexpr int64_t LONGER = 16;
constexpr int64_t BLOCK = LONGER * TILE;  // rows at most in a block

enum Kind { BATCH, LAYER, RMS };
enum { S_X, S_N, M_XX, M_XN, M_NN, SUMS };

struct Accumulator {  // each thread has one
  int64_t C, width, count = 0, block = 0, tile = 0, longest = 0;  // rows in the block and in the tile
  Array<float> floats;
  Array<double> doubles;
  float *shift, *extreme, *sums;     // x, n; most, least; of the tile
  double *now, *mean, *moment;       // sums of the block; x, n; xx, xn, nn
  double token_sum[2] = {0, 0}, below = 0;
  float token_min[2], token_max[2];

  explicit Accumulator(int64_t C) : C(C), width(padded(C)), floats((4 + SUMS) * width), doubles((10 + SUMS) * width) {
    shift = floats.data(), extreme = shift + 2 * width, sums = extreme + 2 * width;
    now = doubles.data(), mean = now + SUMS * width, moment = mean + 2 * width;
    const float inf = std::numeric_limits<float>::infinity();
    std::fill_n(extreme, width, -inf);
    std::fill_n(extreme + width, width, inf);
    for (int i = 0; i < 2; i++) token_min[i] = inf, token_max[i] = -inf;
  }
  Accumulator(Accumulator&&) = default;  // the memory stays where it is

  // Add n rows with these means, and these sums of products of deviations from the means, by Chan's rule.
  void merge(int64_t n, const double* mean_b, const double* moment_b) {
    if (n == 0) return;
    double total = double(count + n), weight = n / total, spread = double(count) * n / total;
    for (int64_t c = 0; c < C; c++) {
      double dx = mean_b[c] - mean[c], dn = mean_b[width + c] - mean[width + c];
      mean[c] += weight * dx, mean[width + c] += weight * dn;
      moment[c] += moment_b[c] + spread * dx * dx;
      moment[width + c] += moment_b[width + c] + spread * dx * dn;
      moment[2 * width + c] += moment_b[2 * width + c] + spread * dn * dn;
    }
    count += n;
  }

  void end_tile() {
    for (int64_t i = 0; i < SUMS * width; i++) now[i] += sums[i], sums[i] = 0;
    tile = 0;
  }

  void end_block() {
    if (block == 0) return;
    end_tile();
    double *mean_b = moment + 3 * width, *moment_b = mean_b + 2 * width;
    for (int64_t c = 0; c < C; c++) {
      double sx = now[S_X * width + c], sn = now[S_N * width + c];
      mean_b[c] = shift[c] + sx / block, mean_b[width + c] = shift[width + c] + sn / block;
      moment_b[c] = now[M_XX * width + c] - sx * sx / block;
      moment_b[width + c] = now[M_XN * width + c] - sx * sn / block;
      moment_b[2 * width + c] = now[M_NN * width + c] - sn * sn / block;
    }
    merge(block, mean_b, moment_b);
    std::fill_n(now, SUMS * width, 0.0);
    block = 0;
  }

  void merge(const Accumulator& other) {
    merge(other.count, other.mean, other.moment);
    for (int64_t c = 0; c < C; c++) {
      extreme[c] = std::max(extreme[c], other.extreme[c]);
      extreme[width + c] = std::min(extreme[width + c], other.extreme[width + c]);
    }
    below += other.below;
    for (int i = 0; i < 2; i++) {
      token_sum[i] += other.token_sum[i];
      token_min[i] = std::min(token_min[i], other.token_min[i]);
      token_max[i] = std::max(token_max[i], other.token_max[i]);
    }
  }
};

template <class T> struct Strip {
  const T* rows[STRIP];
  float origin[STRIP], scale[STRIP], offset[STRIP];  // of each token: n = (x - origin) scale + offset
  int size = 0;
};

// Compute for some tokens at once the sums of f(x, token) over their channels; a sum depends on its own token only.
template <class T, class F> void token_sums(const T* const* rows, int64_t C, float* sums, F f) {
  vf total[TOGETHER][2] = {};
  const int64_t whole = C / (2 * W) * (2 * W);
  for (int64_t c = 0; c < whole; c += 2 * W) {
    for (int i = 0; i < TOGETHER; i++) for (int k = 0; k < 2; k++) total[i][k] += f(load(rows[i] + c + k * W), i);
  }
  for (int i = 0; i < TOGETHER; i++) {
    float rest = 0;
    for_columns(C - whole, [&](int64_t at, int n, auto) {
      float parts[W]; store(parts, f(load_some(rows[i] + whole + at, n), i));
      for (int j = 0; j < n; j++) rest += parts[j];
    });
    sums[i] = sum(total[i][0] + total[i][1]) + rest;
  }
}

// Compute origin, mean - origin and variance of some tokens. One pass is exact enough where every mean is within two
// standard deviations of a common origin, `guess`. Else each token has its own origin, and so it has in any case if its
// figures must depend on no other token.
template <class T>
void token_moments(const T* const* rows, int64_t C, float guess, bool alone, float* origin, float* mean, float* var) {
  if (!alone) {
    vf total[TOGETHER] = {}, squares[TOGETHER] = {};
    const int64_t whole = C / W * W;
    for (int64_t c = 0; c < whole; c += W) {
      for (int i = 0; i < TOGETHER; i++) { vf d = load(rows[i] + c) - guess; total[i] += d, squares[i] += d * d; }
    }
    bool near = true;
    for (int i = 0; i < TOGETHER; i++) {
      if (whole < C) {
        vf d = mask(load_some(rows[i] + whole, C - whole) - guess, C - whole);
        total[i] += d, squares[i] += d * d;
      }
      origin[i] = guess, mean[i] = sum(total[i]) / C, var[i] = sum(squares[i]) / C - mean[i] * mean[i];
      near = near && mean[i] * mean[i] <= 4 * var[i];
    }
    if (near) return;
  }
  token_sums(rows, C, origin, [](vf x, int) { return x; });
  for (int i = 0; i < TOGETHER; i++) origin[i] /= C;
  token_sums(rows, C, mean, [&](vf x, int i) { return x - origin[i]; });
  for (int i = 0; i < TOGETHER; i++) mean[i] /= C;
  token_sums(rows, C, var, [&](vf x, int i) { vf d = x - origin[i] - mean[i]; return d * d; });
  for (int i = 0; i < TOGETHER; i++) var[i] /= C;
}

// Normalise some columns of a row.
template <int kind> inline vf normalised(vf x, float origin, float scale, float offset) {
  if (kind == LAYER) return (x - origin) * scale + offset;
  return x * scale;
}

// Begin a block: its shift is the mean of all rows before it, or else that of its first strip.
template <class T, int kind> void set_shift(Accumulator& a, const Strip<T>& s) {
  a.longest = std::min(BLOCK, LONGER * (a.count ? a.count : s.size));
  if (a.count) {
    for (int64_t c = 0; c < 2 * a.width; c++) a.shift[c] = float(a.mean[c]);
    return;
  }
  for_columns(a.C, [&](int64_t c, int n, auto whole) {
    vf of_x = splat(0), of_n = splat(0);
    for (int r = 0; r < s.size; r++) {
      vf x = take<whole>(s.rows[r] + c, n);
      of_x += x;
      if (kind != BATCH) of_n += normalised<kind>(x, s.origin[r], s.scale[r], s.offset[r]);
    }
    store(&a.shift[c], of_x / float(s.size));
    store(&a.shift[a.width + c], of_n / float(s.size));
  });
}

// Add a strip to the column sums. The next strip begins `ahead` numbers after this one; without a prefetch, memory waits
// while this one is computed.
template <class T, int kind> void add_strip(Accumulator& a, const Strip<T>& s, int64_t ahead) {
  if (a.block == 0) set_shift<T, kind>(a, s);
  for_columns(a.C, [&](int64_t c, int n, auto whole) {
    float* at[SUMS];
    for (int k = 0; k < SUMS; k++) at[k] = a.sums + k * a.width + c;
    vf sum_x = load(at[S_X]), xx = load(at[M_XX]), sum_n, xn, nn;
    if (kind != BATCH) sum_n = load(at[S_N]), xn = load(at[M_XN]), nn = load(at[M_NN]);
    vf most = load(a.extreme + c), least = load(a.extreme + a.width + c);
    const vf shift_x = load(a.shift + c), shift_n = load(a.shift + a.width + c);
    for (int r = 0; r < s.size; r++) {
      __builtin_prefetch(s.rows[r] + c + ahead, 0, 2);
      vf x = take<whole>(s.rows[r] + c, n);
      most = max(most, x), least = min(least, x);
      vf d = x - shift_x;
      sum_x += d, xx += d * d;
      if (kind != BATCH) {
        vf e = normalised<kind>(x, s.origin[r], s.scale[r], s.offset[r]) - shift_n;
        sum_n += e, xn += d * e, nn += e * e;
      }
    }
    store(a.extreme + c, most), store(a.extreme + a.width + c, least);
    store(at[S_X], sum_x), store(at[M_XX], xx);
    if (kind != BATCH) store(at[S_N], sum_n), store(at[M_XN], xn), store(at[M_NN], nn);
  });
  a.tile += s.size, a.block += s.size;
  if (a.tile >= TILE) a.end_tile();
  if (a.block >= a.longest) a.end_block();
}

struct Output {  // y [R][C], and mean and scale of each token; null if only moments are computed
  void* y;
  float *means, *scales;
  const float *gain, *bias;
};

template <class T, int kind>
void write_row(const Output& out, int64_t r, const T* row, int64_t C, float origin, float scale, float offset) {
  T* y = (T*)out.y + r * C;
  for_columns(C, [&](int64_t c, int n, auto whole) {
    vf v = normalised<kind>(take<whole>(row + c, n), origin, scale, offset);
    if (out.gain) v *= take<whole>(out.gain + c, n);
    if (out.bias) v += take<whole>(out.bias + c, n);
    put<whole>(y + c, v, n);
  });
}

struct Asked {  // what of a norm's input is computed
  int kind;      // which variance the layer divides by
  bool tokens, moments;  // whether their figures are; whether anything beside the output is
  float eps;
};

// `kind` says how the columns are normalised. Rows that are not valid have an output, too.
template <class T, int kind>
void add_rows(Accumulator& a, const T* x, int64_t first, int64_t last, const uint8_t* valid, const Asked& asked,
              const Output& out) {
  const bool by_token = kind != BATCH || asked.tokens;
  const int64_t fitting = STRIP_BYTES / int64_t(a.C * sizeof(T)) / TOGETHER * TOGETHER;
  const int size = int(std::min<int64_t>(std::max<int64_t>(fitting, TOGETHER), STRIP));
  const int64_t ahead = size * a.C;
  Strip<T> s;
  float mean[STRIP], var[STRIP], deviation[STRIP], guess = 0;
  double whole[STRIP], square[STRIP];
  bool begun = false;
  for (int64_t next = first; next < last;) {
    int64_t places[STRIP];
    bool counts[STRIP];
    int found = 0;
    for (; next < last && found < size; next++) {
      counts[found] = asked.moments && !(valid && !valid[next]);
      if (counts[found] || out.y) s.rows[found] = x + next * a.C, places[found++] = next;
    }
    if (found == 0) break;
    if (!by_token) {
      s.size = found;
      add_strip<T, kind>(a, s, ahead);
      continue;
    }
    for (int i = found; i % TOGETHER; i++) s.rows[i] = s.rows[0];
    for (int i = 0; i < found; i += TOGETHER) {
      // A token's output must not depend on other tokens.
      token_moments(s.rows + i, a.C, guess, out.y || !begun, s.origin + i, mean + i, var + i);
      if (!begun) guess = s.origin[0] + mean[0], begun = true;
    }
    for (int i = 0; i < found; i++) {
      whole[i] = double(s.origin[i]) + mean[i];
      square[i] = asked.kind == RMS ? var[i] + whole[i] * whole[i] : var[i];
      s.scale[i] = float(1 / std::sqrt(square[i] + asked.eps));
      s.offset[i] = -mean[i] * s.scale[i], deviation[i] = std::sqrt(var[i]);
    }
    s.size = 0;
    for (int i = 0; i < found; i++) {
      if (out.y) {
        write_row<T, kind>(out, places[i], s.rows[i], a.C, s.origin[i], s.scale[i], s.offset[i]);
        out.means[places[i]] = float(whole[i]), out.scales[places[i]] = s.scale[i];
        if (!counts[i]) continue;
      }
      const int at = s.size++;
      s.rows[at] = s.rows[i], s.origin[at] = s.origin[i], s.scale[at] = s.scale[i], s.offset[at] = s.offset[i];
      a.below += square[i] < 10.0 * asked.eps;
      const float of_token[2] = {deviation[i], float(whole[i])};
      for (int k = 0; k < 2; k++) {
        a.token_sum[k] += k ? whole[i] : of_token[0];
        a.token_min[k] = std::min(a.token_min[k], of_token[k]);
        a.token_max[k] = std::max(a.token_max[k], of_token[k]);
      }
    }
    if (s.size) add_strip<T, kind>(a, s, ahead);
  }
  a.end_block();
}

float with_nan(float a, float b, bool less) {  // the less or the greater of two; a NaN stays
  return std::isnan(a) || std::isnan(b) ? a + b : less ? std::min(a, b) : std::max(a, b);
}

struct Row {  // one layer's accumulator, as functional.RawMoments; a row of `channel` has `stride` numbers
  int64_t* seen;
  float* channel;
  int64_t stride;
  float* token;

  float& at(int row, int64_t c) const { return channel[row * stride + c]; }

  // Add what was computed. Without a valid row nothing changes.
  void add(Accumulator& a, bool normalized, bool tokens, bool has_eps) const {
    if (a.count == 0) return;
    const int64_t now = a.count, before = *seen;
    if (before) {
      double *mean = a.moment + 3 * a.width, *moment = mean + 2 * a.width, n = double(before);
      for (int64_t c = 0; c < a.C; c++) {
        mean[c] = double(at(SHIFT_X, c)) + at(REST_X, c), mean[a.width + c] = double(at(SHIFT_N, c)) + at(REST_N, c);
        moment[c] = n * at(VAR_X, c), moment[a.width + c] = n * at(COV_XN, c), moment[2 * a.width + c] = n * at(VAR_N, c);
      }
      a.merge(before, mean, moment);
    }
    const double n = double(a.count);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int64_t c = 0; c < a.C; c++) {
      float most = a.extreme[c], least = a.extreme[a.width + c];
      if (std::isnan(a.mean[c]) && std::isfinite(most) && std::isfinite(least)) most = least = nan;  // they ignore a NaN
      at(MAX, c) = before ? with_nan(at(MAX, c), most, false) : most;
      at(MIN, c) = before ? with_nan(at(MIN, c), least, true) : least;
      at(SHIFT_X, c) = float(a.mean[c]), at(REST_X, c) = float(a.mean[c] - at(SHIFT_X, c));
      at(VAR_X, c) = float(a.moment[c] / n);
      if (!normalized) continue;
      at(SHIFT_N, c) = float(a.mean[a.width + c]), at(REST_N, c) = float(a.mean[a.width + c] - at(SHIFT_N, c));
      at(COV_XN, c) = float(a.moment[a.width + c] / n), at(VAR_N, c) = float(a.moment[2 * a.width + c] / n);
    }
    *seen = a.count;
    if (!normalized && !tokens) return;
    const double means[3] = {a.token_sum[0] / now, a.token_sum[1] / now, has_eps ? a.below / now : 0};
    for (int i = 0; i < 3; i++) {
      float& old = token[STD_MEAN + i];
      old = before ? float(old + (means[i] - old) * (now / n)) : float(means[i]);
    }
    for (int i = 0; i < 2; i++) {
      const bool spoilt = std::isnan(a.token_sum[i]);
      token[STD_MIN + i] = with_nan(token[STD_MIN + i], spoilt ? nan : a.token_min[i], true);
      token[STD_MAX + i] = with_nan(token[STD_MAX + i], spoilt ? nan : a.token_max[i], false);
    }
  }
};

void moments(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, bool normalized, const Asked& asked,
             int threads, const Row& into, const Output& out) {
  const int parts = parts_of(rows, C, threads), columns = normalized || out.y ? asked.kind : BATCH;
  Array<Accumulator> accumulators;
  accumulators.reserve(parts);
  for (int part = 0; part < parts; part++) accumulators.emplace_back(C);
  in_parallel(parts, [&](int part) {
    int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    with_type(type, [&](auto* typed) {
      using T = std::remove_pointer_t<decltype(typed)>;
      auto add_them = columns == LAYER ? add_rows<T, LAYER> : columns == RMS ? add_rows<T, RMS> : add_rows<T, BATCH>;
      add_them(accumulators[part], (const T*)x, first, last, valid, asked, out);
    });
  });
  if (!asked.moments) return;
  for (int part = 1; part < parts; part++) accumulators[0].merge(accumulators[part]);
  into.add(accumulators[0], columns != BATCH, asked.tokens, asked.kind != BATCH);
}

}  // namespace

extern "C" void stabnorm_moments(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, int kind,
                                 int tokens, int normalized, float eps, int threads, int64_t* seen, float* channel,
                                 int64_t stride, float* token) {
  const Asked asked{kind, tokens != 0, true, eps};
  moments(x, type, rows, C, valid, normalized, asked, threads, Row{seen, channel, stride, token}, Output{});
}

// What is the same at each forward of a layer. stabnorm/ops/cpp/moments.py has the same fields in the same order.
struct Prepared {
  int64_t type, rows, C, kind, tokens, stride;
  int64_t* seen;
  float *channel, *token;
  double eps;
};

extern "C" void stabnorm_prepared_moments(const void* x, const void* prepared, int normalized, int threads) {
  const Prepared& p = *(const Prepared*)prepared;
  const Asked asked{int(p.kind), p.tokens != 0, true, float(p.eps)};
  const Row into{p.seen, p.channel, p.stride, p.token};
  moments(x, int(p.type), p.rows, p.C, nullptr, normalized != 0, asked, threads, into, Output{});
}

// Compute the norm, and the same moments unless `add` is false. `kind` is LAYER or RMS; gain and bias may be null.
extern "C" void stabnorm_observed(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, int kind,
                                  float eps, int add, int threads, int64_t* seen, float* channel, int64_t stride,
                                  float* token, const float* gain, const float* bias, void* y, float* means,
                                  float* scales) {
  const Output out{y, means, scales, gain, bias};
  moments(x, type, rows, C, valid, true, Asked{kind, true, add != 0, eps}, threads, Row{seen, channel, stride, token}, out);
}
