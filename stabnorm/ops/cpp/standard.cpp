// `standard_step` computes the statistics of the preset "standard" for the layers of a band, and adds the step to their
// past, in two passes over the channels: the first finds what must be known of a layer as a whole. The formulas are those
// in stabnorm/monitor/catalogue, in float64, and a NaN goes through them as it does there.
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

double larger(double a, double b) { return a > b || std::isnan(a) ? a : b; }  // a NaN stays, as in torch.maximum
double square(double a) { return a * a; }
double average(double old, double now) { return std::isnan(old) ? now : old + MOMENTUM * (now - old); }
double geometric_mean(const double* roots) { return std::sqrt(roots[0] * roots[1]) * std::sqrt(roots[2] * roots[3]); }

struct Channel { double mean, var, absmax, second; };

struct Layer {
  int64_t width, C;  // its channels, and those of the widest layer of the band
  double count, eps;
  bool per_channel;
  const float *channel, *token, *gradient;  // [CHANNEL_ROWS][C], [TOKEN_ROWS], [2][C]
  const double *between, *own;              // [C] or null; [2][C] or null: its own running mean and variance
  double *past, *past_layer;                // [PAST_ROWS][C], [LAYER_ROWS]
  float* out;                               // [STATISTICS + BESIDE]

  Channel at(int64_t c) const {
    const double mean = double(channel[SHIFT_X * C + c]) + channel[REST_X * C + c], var = channel[VAR_X * C + c];
    return {mean, var, larger(channel[MAX * C + c], -double(channel[MIN * C + c])), var + square(mean)};
  }

  // The share of the normalised input that an affine map reproduces, as `explained_share` has it.
  double explained(int64_t c) const {
    const double x = channel[VAR_X * C + c], n = channel[VAR_N * C + c], both = channel[COV_XN * C + c];
    const double mean = double(channel[SHIFT_N * C + c]) + channel[REST_N * C + c], power = x * n;
    if (n <= 1e-12 * square(mean)) return 1;
    return power > 0 ? square(both) / larger(power, std::numeric_limits<double>::min()) : power * 0;
  }

  void beside() const {
    float* to = out + STATISTICS;
    int64_t wrong = 0;
    double top[3] = {NOTHING, NOTHING, NOTHING};
    int64_t ids[3] = {-1, -1, -1};
    for (int64_t c = 0; c < width; c++) {
      double size = at(c).absmax;
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
    bool finite = count > 0;
    double amax = -std::numeric_limits<double>::infinity(), scale = amax, power = 0;
    for (int64_t c = 0; c < width; c++) {
      const Channel now = at(c);
      finite = finite && std::isfinite(now.mean) && std::isfinite(now.var) && std::isfinite(now.absmax);
      amax = larger(amax, now.absmax), scale = larger(scale, now.second);
      power += square(gradient[c] / tokens);
    }
    const bool with_gradient = finite && std::isfinite(power);

    double sum[STATISTICS] = {}, second = 0, spread = 0, squares = 0, gradients = 0, change = 0;
    for (int64_t c = 0; c < width; c++) {
      const Channel now = at(c);
      double* before[PAST_ROWS];
      for (int row = 0; row < PAST_ROWS; row++) before[row] = past + row * C + c;
      const double mean = *before[MEAN], running_mean = own ? own[c] : mean, running_var = own ? own[C + c] : *before[VAR];
      const double sigma = std::sqrt(now.var + eps), log_var = std::log(now.var + eps);
      const double log_absmax = std::log(now.absmax + root_eps), jump = now.mean - mean;
      const double mean_var = (1 - MOMENTUM) * (*before[MEAN_VAR] + MOMENTUM * square(jump));

      sum[RUNNING_MEAN_DISTANCE] += square(now.mean - running_mean);
      sum[RUNNING_VAR_DISTANCE] += square(now.var - running_var);
      sum[MEAN_DISCREPANCY] += std::abs(running_mean - now.mean) / sigma;
      sum[VAR_DISCREPANCY] += std::abs(std::sqrt(running_var + eps) / sigma - 1);
      sum[MEAN_FLUCTUATION] += std::sqrt(mean_var) / std::sqrt(*before[VAR] + eps);
      sum[VAR_FLUCTUATION] += std::abs(log_var - *before[LOG_VAR]);
      sum[ABSMAX_FLUCTUATION] += std::abs(log_absmax - *before[LOG_ABSMAX]);

      const double newest = larger(now.second, TINY);
      double roots[5] = {std::sqrt(newest)}, window = newest, usual_root = 0, of_roots = 0;
      for (int i = 0; i < 4; i++) {
        roots[i + 1] = std::sqrt(*before[WINDOW_0 + i]), usual_root += roots[i + 1] / 4;
        if (i < 3) window += *before[WINDOW_0 + i];
      }
      for (int i = 1; i < 5; i++) of_roots += square(roots[i] - usual_root) / 4;
      const double usual = geometric_mean(roots + 1);
      sum[AM_GM_RATIO] += (window / 4 - geometric_mean(roots)) / usual, spread += of_roots / usual;

      if (between) sum[RANK_SHARE] += between[c] / (now.var + eps);
      sum[TOKEN_MEAN_MEAN] += now.mean;
      sum[SHARE_BELOW_EPS] += now.var < 10 * eps;
      const double relative = now.second / scale;  // x^4 of a large activation would overflow
      second += now.second, sum[FEATURE_KURTOSIS] += square(relative), squares += relative;
      sum[AFFINE_RESIDUAL] += explained(c);

      const double of_gain = gradient[c] / tokens, of_shift = gradient[C + c];
      sum[GRAD_GAIN] += std::abs(of_gain), sum[GRAD_SHIFT] += std::abs(of_shift), gradients += square(of_shift);
      change += square(of_gain - *before[GRADIENT]);

      if (finite) {
        *before[MEAN_VAR] = std::isnan(mean) ? 0 : mean_var;
        *before[MEAN] = average(mean, now.mean), *before[VAR] = average(*before[VAR], now.var);
        *before[LOG_VAR] = log_var, *before[LOG_ABSMAX] = log_absmax;
        for (int row = WINDOW_3; row > WINDOW_0; row--) *before[row] = *before[row - 1];
        *before[WINDOW_0] = newest;
      }
      if (with_gradient) *before[GRADIENT] = average(*before[GRADIENT], of_gain);
    }

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
