// `add_moments_` computes the moments of a norm's input x, of the normalised input n, and of the tokens, in one read of
// memory. `norm_with_moments` also writes the norm's output, n gain + bias. Every tile of rows is processed two or three
// times while it is in the innermost caches: first mean and variance of each token, then column sums of deviations from a
// shift. Tiles accumulate in float64. The shift of a block is the mean of its first tile. Blocks, and then threads, merge
// by Chan's rule.
#include "layout.h"
#include "vectors.h"

namespace {

constexpr int TILE = 64;            // rows; their column sums are float32
constexpr int TOGETHER = 4;         // tokens whose sums are computed at once, so that none waits for another one's
constexpr int64_t BLOCK = 16 * TILE;  // rows with a common shift, which is off by at most four standard deviations

enum Kind { BATCH, LAYER, RMS };
enum { S_X, S_N, M_XX, M_XN, M_NN, SUMS };

struct Accumulator {  // each thread has one
  int64_t C, width, count = 0, block = 0;  // number of rows, and of rows in the block
  Array<float> shift, extreme;       // x, n; most, least
  Array<double> now, mean, moment;   // sums of the block; x, n; xx, xn, nn
  double token_sum[2] = {0, 0}, below = 0;
  float token_min[2], token_max[2];

  explicit Accumulator(int64_t C) : C(C), width(padded(C)), shift(2 * width), extreme(2 * width), now(SUMS * width),
                                mean(2 * width), moment(3 * width) {
    const float inf = std::numeric_limits<float>::infinity();
    std::fill_n(extreme.begin(), width, -inf);
    std::fill_n(extreme.begin() + width, width, inf);
    for (int i = 0; i < 2; i++) token_min[i] = inf, token_max[i] = -inf;
  }

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

  void end_block() {
    if (block == 0) return;
    Array<double> mean_b(2 * width), moment_b(3 * width);
    for (int64_t c = 0; c < C; c++) {
      double sx = now[S_X * width + c], sn = now[S_N * width + c];
      mean_b[c] = shift[c] + sx / block, mean_b[width + c] = shift[width + c] + sn / block;
      moment_b[c] = now[M_XX * width + c] - sx * sx / block;
      moment_b[width + c] = now[M_XN * width + c] - sx * sn / block;
      moment_b[2 * width + c] = now[M_NN * width + c] - sn * sn / block;
    }
    merge(block, mean_b.data(), moment_b.data());
    std::fill(now.begin(), now.end(), 0.0);
    block = 0;
  }

  void merge(const Accumulator& other) {
    merge(other.count, other.mean.data(), other.moment.data());
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

template <class T> struct Tile {
  const T* rows[TILE];
  float origin[TILE], mean[TILE], scale[TILE];  // of each token: n = (x - origin - mean) scale
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
template <int kind> inline vf normalised(vf x, float origin, float mean, float scale) {
  if (kind == LAYER) return (x - origin - mean) * scale;
  return x * scale;
}

// Use the mean of the tile's columns as the shift of a new block.
template <class T, int kind> void set_shift(Accumulator& a, const Tile<T>& t) {
  for_columns(a.C, [&](int64_t c, int n, auto whole) {
    vf of_x = splat(0), of_n = splat(0);
    for (int r = 0; r < t.size; r++) {
      vf x = take<whole>(t.rows[r] + c, n);
      of_x += x;
      if (kind != BATCH) of_n += normalised<kind>(x, t.origin[r], t.mean[r], t.scale[r]);
    }
    store(&a.shift[c], of_x / float(t.size));
    store(&a.shift[a.width + c], of_n / float(t.size));
  });
}

template <class T, int kind> void add_tile(Accumulator& a, const Tile<T>& t) {
  for_columns(a.C, [&](int64_t c, int n, auto whole) {
    vf sum_x = splat(0), sum_n = splat(0), xx = splat(0), xn = splat(0), nn = splat(0);
    vf most = load(&a.extreme[c]), least = load(&a.extreme[a.width + c]);
    const vf shift_x = load(&a.shift[c]), shift_n = load(&a.shift[a.width + c]);
    for (int r = 0; r < t.size; r++) {
      vf x = take<whole>(t.rows[r] + c, n);
      most = max(most, x), least = min(least, x);
      vf d = x - shift_x;
      sum_x += d, xx += d * d;
      if (kind != BATCH) {
        vf e = normalised<kind>(x, t.origin[r], t.mean[r], t.scale[r]) - shift_n;
        sum_n += e, xn += d * e, nn += e * e;
      }
    }
    store(&a.extreme[c], most), store(&a.extreme[a.width + c], least);
    const vf sums[SUMS] = {sum_x, sum_n, xx, xn, nn};
    for (int k = 0; k < SUMS; k++) {
      double* into = &a.now[k * a.width + c];
      for (int j = 0; j < W; j++) into[j] += sums[k][j];
    }
  });
}

struct Output {  // y [R][C], and mean and scale of each token; null if only moments are computed
  void* y;
  float *means, *scales;
  const float *gain, *bias;
};

template <class T, int kind>
void write_row(const Output& out, int64_t r, const T* row, int64_t C, float origin, float mean, float scale) {
  T* y = (T*)out.y + r * C;
  for_columns(C, [&](int64_t c, int n, auto whole) {
    vf v = normalised<kind>(take<whole>(row + c, n), origin, mean, scale);
    if (out.gain) v *= take<whole>(out.gain + c, n);
    if (out.bias) v += take<whole>(out.bias + c, n);
    put<whole>(y + c, v, n);
  });
}

// `kind` says how the columns are normalised, `of_tokens` which variance the layer divides by. If `moments` is false, only
// the output is written. Rows that are not valid have an output, too.
template <class T, int kind>
void add_rows(Accumulator& a, const T* x, int64_t first, int64_t last, const uint8_t* valid, int of_tokens, bool tokens,
              float eps, const Output& out, bool moments) {
  Tile<T> t;
  float origin[TOGETHER], mean[TOGETHER], var[TOGETHER], scale[TOGETHER], deviation[TOGETHER];
  double whole[TOGETHER], square[TOGETHER];
  float guess = 0;
  bool begun = false;
  auto finish = [&] {
    if (t.size == 0) return;
    if (a.block == 0) set_shift<T, kind>(a, t);
    add_tile<T, kind>(a, t);
    a.block += t.size;
    if (a.block >= BLOCK) a.end_block();
    t.size = 0;
  };
  for (int64_t next = first; next < last;) {
    const T* rows[TOGETHER];
    int64_t places[TOGETHER];
    bool counts[TOGETHER];
    int found = 0;
    for (; next < last && found < TOGETHER; next++) {
      counts[found] = moments && !(valid && !valid[next]);
      if (counts[found] || out.y) rows[found] = x + next * a.C, places[found++] = next;
    }
    if (found == 0) break;
    if (kind != BATCH || tokens) {
      for (int i = found; i < TOGETHER; i++) rows[i] = rows[0];
      // A token's output must not depend on other tokens.
      token_moments(rows, a.C, guess, out.y || !begun, origin, mean, var);
      if (!begun) guess = origin[0] + mean[0], begun = true;
      for (int i = 0; i < TOGETHER; i++) {
        whole[i] = double(origin[i]) + mean[i], square[i] = of_tokens == RMS ? var[i] + whole[i] * whole[i] : var[i];
        scale[i] = float(1 / std::sqrt(square[i] + eps)), deviation[i] = std::sqrt(var[i]);
      }
    }
    for (int i = 0; i < found; i++) {
      if (kind != BATCH || tokens) {
        if (out.y) {
          write_row<T, kind>(out, places[i], rows[i], a.C, origin[i], mean[i], scale[i]);
          out.means[places[i]] = float(whole[i]), out.scales[places[i]] = scale[i];
          if (!counts[i]) continue;
        }
        t.origin[t.size] = origin[i], t.mean[t.size] = mean[i], t.scale[t.size] = scale[i];
        a.below += square[i] < 10.0 * eps;
        const float of_token[2] = {deviation[i], float(whole[i])};
        for (int k = 0; k < 2; k++) {
          a.token_sum[k] += k ? whole[i] : of_token[0];
          a.token_min[k] = std::min(a.token_min[k], of_token[k]);
          a.token_max[k] = std::max(a.token_max[k], of_token[k]);
        }
      } else {
        fetch(rows[i], a.C);
      }
      t.rows[t.size++] = rows[i];
      if (t.size == TILE) finish();
    }
  }
  finish();
  a.end_block();
}

}  // namespace

// Return the number of valid rows. If there is none, the accumulator does not change. A row of `channel` has `stride` numbers.
static int64_t moments(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, int kind, bool tokens,
                       bool normalized, float eps, int threads, float* channel, int64_t stride, float* token,
                       const Output& out, bool add) {
  const int parts = parts_of(rows, C, threads), columns = normalized || out.y ? kind : BATCH;
  Array<Accumulator> accumulators(parts, Accumulator(C));
  in_parallel(parts, [&](int part) {
    int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
    with_type(type, [&](auto* typed) {
      using T = std::remove_pointer_t<decltype(typed)>;
      auto add_them = columns == LAYER ? add_rows<T, LAYER> : columns == RMS ? add_rows<T, RMS> : add_rows<T, BATCH>;
      add_them(accumulators[part], (const T*)x, first, last, valid, kind, tokens, eps, out, add);
    });
  });
  if (!add) return 0;
  Accumulator& a = accumulators[0];
  for (int part = 1; part < parts; part++) a.merge(accumulators[part]);
  if (a.count == 0) return 0;
  const double n = double(a.count);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t c = 0; c < C; c++) {
    auto out = [&](int row) -> float& { return channel[row * stride + c]; };
    float most = a.extreme[c], least = a.extreme[a.width + c];
    if (std::isnan(a.mean[c]) && std::isfinite(most) && std::isfinite(least)) most = least = nan;  // a maximum ignores NaN
    out(MAX) = most, out(MIN) = least;
    out(SHIFT_X) = float(a.mean[c]), out(REST_X) = float(a.mean[c] - out(SHIFT_X));
    out(VAR_X) = float(a.moment[c] / n);
    if (columns == BATCH) continue;
    out(SHIFT_N) = float(a.mean[a.width + c]), out(REST_N) = float(a.mean[a.width + c] - out(SHIFT_N));
    out(COV_XN) = float(a.moment[a.width + c] / n), out(VAR_N) = float(a.moment[2 * a.width + c] / n);
  }
  if (columns == BATCH && !tokens) return a.count;
  token[STD_MEAN] = float(a.token_sum[0] / n), token[MEAN_MEAN] = float(a.token_sum[1] / n);
  token[EPS_SHARE] = kind == BATCH ? 0.f : float(a.below / n);
  for (int i = 0; i < 2; i++) {
    bool spoilt = std::isnan(a.token_sum[i]);
    token[STD_MIN + i] = spoilt ? nan : a.token_min[i], token[STD_MAX + i] = spoilt ? nan : a.token_max[i];
  }
  return a.count;
}

extern "C" int64_t stabnorm_moments(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, int kind,
                                    int tokens, int normalized, float eps, int threads, float* channel, int64_t stride,
                                    float* token) {
  return moments(x, type, rows, C, valid, kind, tokens, normalized, eps, threads, channel, stride, token, Output{}, true);
}

// Compute the norm, and the same moments unless `add` is false. `kind` is LAYER or RMS; gain and bias may be null.
extern "C" int64_t stabnorm_observed(const void* x, int type, int64_t rows, int64_t C, const uint8_t* valid, int kind,
                                     float eps, int add, int threads, float* channel, int64_t stride, float* token,
                                     const float* gain, const float* bias, void* y, float* means, float* scales) {
  const Output out{y, means, scales, gain, bias};
  return moments(x, type, rows, C, valid, kind, true, true, eps, threads, channel, stride, token, out, add);
}
