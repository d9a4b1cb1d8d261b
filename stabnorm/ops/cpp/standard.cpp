// `standard_step` computes the statistics of the preset "standard" for the layers of a band, and adds the step to their
// past, in two passes over the channels: the first finds what must be known of a layer as a whole. The formulas are those
// in stabnorm/monitor/catalogue, in float64, and a NaN goes through them as it does there. Eight channels are computed at
// once.
#include "layout.h"
#include "vectors.h"

// Newer releases of glibc have a newer version of this symbol, with which a library from here would not load on an older
// system.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver log, log@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver log, log@GLIBC_2.17");
#endif

namespace {

// These are the rows of `Past.channel` and `Past.layer`, and the columns of the result; tests/ops/test_layout.py compares
// them with stabnorm/monitor/past.py and stabnorm/monitor/statistics.py.
enum { MEAN, VAR, MEAN_VAR, LOG_VAR, LOG_ABSMAX, WINDOW_0, WINDOW_1, WINDOW_2, WINDOW_3, GRADIENT, PAST_ROWS };
enum { LOG_SCALE, GRADIENT_POWER, LAYER_ROWS };
enum {
  RUNNING_MEAN_DISTANCE, RUNNING_VAR_DISTANCE, MEAN_DISCREPANCY, VAR_DISCREPANCY, MEAN_FLUCTUATION, VAR_FLUCTUATION,
  ABSMAX_FLUCTUATION, SCALE_JUMP, AM_GM_RATIO, RANK_SHARE, TOKEN_STD_MEAN, TOKEN_STD_MIN, TOKEN_STD_MAX, TOKEN_MEAN_MEAN,
  TOKEN_MEAN_MIN, TOKEN_MEAN_MAX, SHARE_BELOW_EPS, AMAX, CREST, FEATURE_KURTOSIS, AFFINE_RESIDUAL, GRAD_GAIN, GRAD_SHIFT,
  GRAD_FLUCTUATION, STATISTICS
};
enum { TOKENS, NONFINITE, TOP_ID, TOP_VALUE = TOP_ID + 3, BESIDE = TOP_VALUE + 3 };

constexpr double MOMENTUM = 0.1, TINY = std::numeric_limits<float>::min(), EPS32 = std::numeric_limits<float>::epsilon();
constexpr double NOTHING = std::numeric_limits<double>::quiet_NaN();

constexpr int LANES = 8;  // channels that are computed at once
typedef double vd __attribute__((vector_size(8 * LANES)));
typedef int64_t vl __attribute__((vector_size(8 * LANES)));  // also what a comparison gives: -1 where it holds, or else 0

double larger(double a, double b) { return a > b || std::isnan(a) ? a : b; }  // a NaN stays, as in torch.maximum
double square(double a) { return a * a; }
double average(double old, double now) { return std::isnan(old) ? now : old + MOMENTUM * (now - old); }

vd larger(vd a, vd b) { return (a > b) | (a != a) ? a : b; }
vd square(vd a) { return a * a; }
vd average(vd old, vd now) { return old != old ? now : old + MOMENTUM * (now - old); }
vd size_of(vd a) { return a < 0 ? -a : a; }
vl is_finite(vd a) { return a - a == 0; }
vd root(vd a) {
  double parts[LANES]; std::memcpy(parts, &a, sizeof a);
  for (double& part : parts) part = std::sqrt(part);
  std::memcpy(&a, parts, sizeof a);
  return a;
}
vd geometric_mean(const vd* roots) { return root(roots[0] * roots[1]) * root(roots[2] * roots[3]); }

// The natural logarithm to the last digit or so, by the method of fdlibm: x = 2^k (1 + f), and with s = f / (2 + f),
// log(1 + f) = f - s (f - r(s^2)), where r is a polynomial.
vd logarithm(vd x) {
  const vl bits = (vl)x, up = (bits & 0x000fffffffffffff) > 0x6a09e667f3bcd;  // the fraction is above the root of 2
  const vd k = __builtin_convertvector((bits >> 52) - 1023 - up, vd);
  const vd f = (vd)((bits & 0x000fffffffffffff) | (up ? (vl)(vd{} + 0.5) : (vl)(vd{} + 1.0))) - 1;
  const vd s = f / (2 + f), z = s * s, half = 0.5 * f * f;
  const vd r = z * (6.666666666666735130e-01 + z * (3.999999999940941908e-01 + z * (2.857142874366239149e-01 +
               z * (2.222219843214978396e-01 + z * (1.818357216161805012e-01 + z * (1.531383769920937332e-01 +
               z * 1.479819860511658591e-01))))));
  const vd result = k * 6.93147180369123816490e-01 - ((half - (s * (half + r) + k * 1.90821492927058770002e-10)) - f);
  const double inf = std::numeric_limits<double>::infinity();
  const vd odd = x == 0 ? vd{} - inf : x < 0 ? vd{} + NOTHING : x;  // infinity and NaN stay
  return (x > 0) & is_finite(x) ? result : odd;
}

// Load n <= LANES numbers; the others are 0.
template <class T> vd take(const T* p, int n) {
  T parts[LANES] = {};
  if (n == LANES) std::memcpy(parts, p, sizeof parts); else std::memcpy(parts, p, n * sizeof(T));
  vd v;
  for (int j = 0; j < LANES; j++) v[j] = parts[j];
  return v;
}
double total(vd v) { double sum = 0; for (int j = 0; j < LANES; j++) sum += v[j]; return sum; }

struct Channels { vd mean, var, absmax, second; };

struct Layer {
  int64_t width, C;  // its channels, and those of the widest layer of the band
  double count, eps;
  bool per_channel;
  const float *channel, *token, *gradient;  // [CHANNEL_ROWS][C], [TOKEN_ROWS], [2][C]
  const double *between, *own;              // [C] or null; [2][C] or null: its own running mean and variance
  double *past, *past_layer;                // [PAST_ROWS][C], [LAYER_ROWS]
  float* out;                               // [STATISTICS + BESIDE]

  vd row(int k, int64_t c, int n) const { return take(channel + k * C + c, n); }

  Channels at(int64_t c, int n) const {
    const vd mean = row(SHIFT_X, c, n) + row(REST_X, c, n), var = row(VAR_X, c, n);
    return {mean, var, larger(row(MAX, c, n), -row(MIN, c, n)), var + square(mean)};
  }

  // The share of the normalised input that an affine map reproduces, as `explained_share` has it.
  vd explained(int64_t c, int n) const {
    const vd x = row(VAR_X, c, n), var_n = row(VAR_N, c, n), mean = row(SHIFT_N, c, n) + row(REST_N, c, n);
    const vd power = x * var_n, least = vd{} + std::numeric_limits<double>::min();
    const vd share = power > 0 ? square(row(COV_XN, c, n)) / larger(power, least) : power * 0;
    return var_n <= 1e-12 * square(mean) ? vd{} + 1.0 : share;
  }

  // Call f(first channel, number of channels, which lanes have one) for all channels.
  template <class F> void in_lanes(F f) const {
    const vl lane = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t c = 0; c < width; c += LANES) {
      const int n = int(std::min<int64_t>(LANES, width - c));
      f(c, n, lane < int64_t(n));
    }
  }

  void beside() const {
    float* to = out + STATISTICS;
    int64_t wrong = 0;
    double top[3] = {NOTHING, NOTHING, NOTHING};
    int64_t ids[3] = {-1, -1, -1};
    for (int64_t c = 0; c < width; c++) {
      double size = larger(double(channel[MAX * C + c]), -double(channel[MIN * C + c]));
      wrong += !std::isfinite(size);
      int64_t id = c;
      for (int i = 0; i < 3; i++) {  // a NaN counts as the largest
        if (ids[i] >= 0 && !(size > top[i]) && !(std::isnan(size) && !std::isnan(top[i]))) continue;
        std::swap(size, top[i]), std::swap(id, ids[i]);
        if (id < 0) break;
      }
    }
    to[TOKENS] = float(count), to[NONFINITE] = float(wrong);
    for (int i = 0; i < 3; i++) {
      const bool is_there = count > 0 && ids[i] >= 0;
      to[TOP_ID + i] = is_there ? float(ids[i]) : float(NOTHING), to[TOP_VALUE + i] = is_there ? float(top[i]) : float(NOTHING);
    }
  }

  void step() const {
    const double root_eps = std::sqrt(eps), tokens = std::max(count, 1.0);
    vl all_finite = vl{} - 1;
    vd most = vd{} - std::numeric_limits<double>::infinity(), scales = most, powers = {};
    in_lanes([&](int64_t c, int n, vl is_there) {
      const Channels now = at(c, n);
      all_finite &= ~is_there | (is_finite(now.mean) & is_finite(now.var) & is_finite(now.absmax));
      most = is_there ? larger(most, now.absmax) : most, scales = is_there ? larger(scales, now.second) : scales;
      powers += square(take(gradient + c, n) / tokens);
    });
    bool finite = count > 0;
    double amax = most[0], scale = scales[0];
    for (int j = 0; j < LANES; j++) {
      finite = finite && all_finite[j], amax = larger(amax, most[j]), scale = larger(scale, scales[j]);
    }
    const double power = total(powers);
    const bool with_gradient = finite && std::isfinite(power);

    vd sums[STATISTICS] = {}, seconds = {}, spreads = {}, all_squares = {}, all_gradients = {}, changes = {};
    in_lanes([&](int64_t c, int n, vl is_there) {
      const auto add = [&](vd& to, vd value) { to += is_there ? value : vd{}; };
      const Channels now = at(c, n);
      vd before[PAST_ROWS];
      for (int k = 0; k < PAST_ROWS; k++) before[k] = take(past + k * C + c, n);
      const vd mean = before[MEAN], running_mean = own ? take(own + c, n) : mean;
      const vd running_var = own ? take(own + C + c, n) : before[VAR];
      const vd sigma = root(now.var + eps), log_var = logarithm(now.var + eps);
      const vd log_absmax = logarithm(now.absmax + root_eps), jump = now.mean - mean;
      const vd mean_var = (1 - MOMENTUM) * (before[MEAN_VAR] + MOMENTUM * square(jump));

      add(sums[RUNNING_MEAN_DISTANCE], square(now.mean - running_mean));
      add(sums[RUNNING_VAR_DISTANCE], square(now.var - running_var));
      add(sums[MEAN_DISCREPANCY], size_of(running_mean - now.mean) / sigma);
      add(sums[VAR_DISCREPANCY], size_of(root(running_var + eps) / sigma - 1));
      add(sums[MEAN_FLUCTUATION], root(mean_var) / root(before[VAR] + eps));
      add(sums[VAR_FLUCTUATION], size_of(log_var - before[LOG_VAR]));
      add(sums[ABSMAX_FLUCTUATION], size_of(log_absmax - before[LOG_ABSMAX]));

      const vd newest = larger(now.second, vd{} + TINY);
      vd roots[5] = {root(newest)}, window = newest, usual_root = {}, of_roots = {};
      for (int i = 0; i < 4; i++) {
        roots[i + 1] = root(before[WINDOW_0 + i]), usual_root += roots[i + 1] / 4;
        if (i < 3) window += before[WINDOW_0 + i];
      }
      for (int i = 1; i < 5; i++) of_roots += square(roots[i] - usual_root) / 4;
      const vd usual = geometric_mean(roots + 1);
      add(sums[AM_GM_RATIO], (window / 4 - geometric_mean(roots)) / usual), add(spreads, of_roots / usual);

      if (between) add(sums[RANK_SHARE], take(between + c, n) / (now.var + eps));
      add(sums[TOKEN_MEAN_MEAN], now.mean);
      add(sums[SHARE_BELOW_EPS], now.var < 10 * eps ? vd{} + 1.0 : vd{});
      const vd relative = now.second / scale;  // x^4 of a large activation would overflow
      add(seconds, now.second), add(sums[FEATURE_KURTOSIS], square(relative)), add(all_squares, relative);
      add(sums[AFFINE_RESIDUAL], explained(c, n));

      const vd of_gain = take(gradient + c, n) / tokens, of_shift = take(gradient + C + c, n);
      add(sums[GRAD_GAIN], size_of(of_gain)), add(sums[GRAD_SHIFT], size_of(of_shift));
      add(all_gradients, square(of_shift)), add(changes, square(of_gain - before[GRADIENT]));

      const auto keep = [&](int k, vd value) { std::memcpy(past + k * C + c, &value, n * sizeof(double)); };
      if (finite) {
        keep(MEAN_VAR, mean != mean ? vd{} : mean_var);
        keep(MEAN, average(mean, now.mean)), keep(VAR, average(before[VAR], now.var));
        keep(LOG_VAR, log_var), keep(LOG_ABSMAX, log_absmax), keep(WINDOW_0, newest);
        for (int k = WINDOW_0; k < WINDOW_3; k++) keep(k + 1, before[k]);
      }
      if (with_gradient) keep(GRADIENT, average(before[GRADIENT], of_gain));
    });
    double sum[STATISTICS];
    for (int i = 0; i < STATISTICS; i++) sum[i] = total(sums[i]);
    const double second = total(seconds), spread = total(spreads), squares = total(all_squares);
    const double gradients = total(all_gradients), change = total(changes);

    if (finite) {  // beyond its channels a layer has 0, so that a sum over channels is right there, too
      for (int row = 0; row < GRADIENT; row++) std::fill(past + row * C + width, past + (row + 1) * C, 0.);
    }

    const double size = double(width), log_scale = std::log(token[STD_MEAN] + root_eps);
    for (double& s : sum) s /= size;
    sum[RUNNING_MEAN_DISTANCE] = std::sqrt(sum[RUNNING_MEAN_DISTANCE] / size);
    sum[RUNNING_VAR_DISTANCE] = std::sqrt(sum[RUNNING_VAR_DISTANCE] / size);
    sum[SCALE_JUMP] = std::abs(log_scale - past_layer[LOG_SCALE]);
    sum[AM_GM_RATIO] /= larger(4 * spread / size, square(8 * EPS32));  // a smaller bound is rounding
    if (!between) sum[RANK_SHARE] = NOTHING;
    sum[TOKEN_STD_MEAN] = token[STD_MEAN], sum[TOKEN_STD_MIN] = token[STD_MIN], sum[TOKEN_STD_MAX] = token[STD_MAX];
    sum[TOKEN_MEAN_MIN] = token[MEAN_MIN], sum[TOKEN_MEAN_MAX] = token[MEAN_MAX];
    if (!per_channel) sum[SHARE_BELOW_EPS] = token[EPS_SHARE];
    sum[AMAX] = amax, sum[CREST] = amax / std::sqrt(second / size);
    sum[FEATURE_KURTOSIS] /= square(squares / size);
    sum[AFFINE_RESIDUAL] = per_channel ? 0 : larger(1 - sum[AFFINE_RESIDUAL], 0);
    sum[GRAD_SHIFT] /= tokens;
    // A sum that is zero in exact arithmetic is only rounding, in proportion to what is added up.
    const double shift = std::sqrt(gradients) / tokens, rounding = 8 * EPS32 * (std::isfinite(shift) ? shift : 0);
    const double usual = larger(std::sqrt(past_layer[GRADIENT_POWER]), rounding);
    sum[GRAD_FLUCTUATION] = usual > 0 ? std::sqrt(change) / usual : change == 0 ? 0 : NOTHING;
    for (int i = 0; i < STATISTICS; i++) out[i] = count > 0 ? float(sum[i]) : float(NOTHING);

    if (finite) past_layer[LOG_SCALE] = log_scale;
    if (with_gradient) past_layer[GRADIENT_POWER] = average(past_layer[GRADIENT_POWER], power);
  }
};

}  // namespace

extern "C" void stabnorm_standard(const int64_t* seen, const float* channel, const float* token, const float* gradient,
                                  const double* between, const double* widths, const double* eps,
                                  const uint8_t* per_channel, const uint8_t* own_buffers, const double* own,
                                  int64_t layers, int64_t C, int threads, double* past, double* past_layer, float* out) {
  const int parts = parts_of(layers, 8 * C, threads);
  in_parallel(parts, [&](int part) {
    for (int64_t l = layers * part / parts; l < layers * (part + 1) / parts; l++) {
      const Layer layer{int64_t(widths[l]), C, double(seen[l]), eps[l], per_channel[l] != 0, channel + l * CHANNEL_ROWS * C,
                        token + l * TOKEN_ROWS, gradient + l * 2 * C, between ? between + l * C : nullptr,
                        own && own_buffers[l] ? own + l * 2 * C : nullptr, past + l * PAST_ROWS * C,
                        past_layer + l * LAYER_ROWS, out + l * (STATISTICS + BESIDE)};
      layer.beside(), layer.step();
    }
  });
}
