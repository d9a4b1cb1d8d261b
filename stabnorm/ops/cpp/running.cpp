// The running statistics of the norms and the decisions about a batch, see `stabnorm.ops.running`. A few vectors [C] are
// little work, so one thread does it. A decision needs all channels, so it comes before any state changes.
#include "vectors.h"

namespace {

constexpr float TINY = std::numeric_limits<float>::min();

// What is counted, in the tensors `step`, `skips` and `progress [3]` of a norm.
struct Counters {
  int64_t *step, *skips, *progress;

  void add(bool accepted, bool restart, bool counting) {
    if (counting) ++*step;
    if (!accepted) ++*skips;
    if (!accepted) return;
    progress[0]++, progress[1] = *skips, progress[2] = (restart ? 0 : progress[2]) + 1;
  }
};

struct Decision { bool accepted, restart; };

bool finite(const float* values, int64_t C) {
  bool all = true;
  for (int64_t c = 0; c < C; c++) all &= std::isfinite(values[c]);
  return all;
}

float lerp(float from, float to, float weight) {  // as torch does it, so that a weight of 1 gives `to` exactly
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1 - weight);
}

void move(float* state, const float* to, int64_t C, float weight) {
  for (int64_t c = 0; c < C; c++) state[c] = lerp(state[c], to[c], weight);
}

// Write for each channel the geometric mean of a window [M, C], in which `batch` stands at the place `slot`, and no value
// counts as less than `least`.
void geometric_mean(double* out, const float* window, int64_t M, int64_t C, const float* batch, int64_t slot, float least) {
  const bool fits = M <= 8;  // the product of more values could leave the range of float64
  least = std::max(least, TINY);
  std::fill_n(out, C, fits ? 1.0 : 0.0);
  for (int64_t m = 0; m < M; m++) {
    const float* values = m == slot ? batch : window + m * C;
    if (fits) for (int64_t c = 0; c < C; c++) out[c] *= std::max(values[c], least);
    else for (int64_t c = 0; c < C; c++) out[c] += std::log(double(std::max(values[c], least)));
  }
  for (int64_t c = 0; c < C; c++)
    out[c] = M == 4 ? std::sqrt(std::sqrt(out[c])) : fits ? std::pow(out[c], 1.0 / M) : std::exp(out[c] / M);
}

// `functional.is_burst` for the window before, and after `batch` has taken the place `slot`.
bool is_burst(const float* window, int64_t M, int64_t C, const float* batch, int64_t slot, float eps) {
  Array<double> before(C), after(C);
  geometric_mean(before.data(), window, M, C, nullptr, -1, eps);
  geometric_mean(after.data(), window, M, C, batch, slot, eps);
  double gaps = 0, spreads = 0;
  for (int64_t c = 0; c < C; c++) {
    double sum = 0, roots = 0, squares = 0;
    for (int64_t m = 0; m < M; m++) {
      const double old = std::max(window[m * C + c], eps);
      sum += m == slot ? std::max(batch[c], eps) : old;
      roots += std::sqrt(old);
    }
    for (int64_t m = 0; m < M; m++) {
      const double d = std::sqrt(double(std::max(window[m * C + c], eps))) - roots / M;
      squares += d * d;
    }
    gaps += (sum / M - after[c]) / before[c], spreads += squares / M / before[c];
  }
  return gaps / C > M * (spreads / C) + 1e-5;
}

// Decide about a batch with these second moments; without a filter every sound batch is accepted.
Decision judge(const float* square, bool sound, const float* window, int64_t M, int64_t C, Counters& counters, bool past,
               int64_t patience, float eps, bool filtered) {
  if (!filtered) return {sound, false};
  if (!sound) counters.progress[1]++;  // such a batch is skipped, too, but patience counts bursts only
  const bool burst = sound && past && is_burst(window, M, C, square, counters.progress[2] % M, eps);
  const bool restart = burst && *counters.skips - counters.progress[1] + 1 >= patience;
  return {sound && (!burst || restart), restart};
}

// Store an accepted batch before the others; see `_recall` in `stabnorm.ops.running`.
void remember(float* recent, int64_t K, int64_t C, const float* square, const float* divisor, bool smooth) {
  const int64_t size = 2 * C + 1;
  std::memmove(recent + size, recent, (K - 1) * size * sizeof(float));
  std::copy_n(square, C, recent), std::copy_n(divisor, C, recent + C);
  recent[2 * C] = smooth;
}

}  // namespace

extern "C" {

// `mean` is null if the norm is not centred, `running_mean` if it keeps none, `window` if there is no filter.
void stabnorm_track_batch(const float* mean, const float* square, const float* count, int64_t C, float* running_mean,
                          float* running_var, float* window, int64_t M, int64_t* step, int64_t* skips, int64_t* progress,
                          int64_t patience, float momentum, float eps, int counting) {
  Counters counters{step, skips, progress};
  const bool moves_mean = mean && running_mean;
  Array<float> about(square, square + C), variance(square, square + C);
  if (moves_mean) for (int64_t c = 0; c < C; c++) about[c] += (mean[c] - running_mean[c]) * (mean[c] - running_mean[c]);
  const bool sound = finite(about.data(), C) && *count - (mean ? 1 : 0) > 0;  // one row has no variance
  const bool past = progress[2] >= M;
  const auto [accepted, restart] = judge(about.data(), sound, window, M, C, counters, past, patience, eps, window);
  if (accepted) {
    const float weight = momentum < 0 ? 1.f / float(progress[0] + 1) : momentum;
    if (window) std::copy_n(about.data(), C, window + (restart ? 0 : progress[2] % M) * C);
    if (moves_mean) {
      const float unbiased = *count / std::max(*count - 1, 1.f);
      for (float& value : variance) value *= unbiased;
      move(running_mean, mean, C, weight);
    }
    move(running_var, variance.data(), C, weight);
  }
  counters.add(accepted, restart, counting);
}

void stabnorm_smooth_square(const float* square, const float* count, int64_t C, float* window, int64_t M, float* running,
                            float* recent, int64_t K, int64_t* step, int64_t* skips, int64_t* progress, int64_t warmup,
                            int64_t patience, float momentum, float eps, int filtered, int counting, float* divisor,
                            uint8_t* gate) {
  Counters counters{step, skips, progress};
  const bool past = *step >= warmup && progress[2] >= M, sound = finite(square, C) && *count > 0;
  const auto [accepted, restart] = judge(square, sound, window, M, C, counters, past, patience, eps, filtered);
  const bool smooth = past && accepted && !restart;
  std::copy_n(square, C, divisor);
  if (smooth) {
    Array<double> mean(C);
    geometric_mean(mean.data(), window, M, C, square, progress[2] % M, 0);
    std::copy(mean.begin(), mean.end(), divisor);
  }
  gate[0] = accepted, gate[1] = smooth;
  if (accepted) {
    std::copy_n(square, C, window + (restart ? 0 : progress[2] % M) * C);
    move(running, divisor, C, progress[0] == 0 ? 1 : momentum);  // the first batch replaces the buffer's initial value
    remember(recent, K, C, square, divisor, smooth);
  }
  counters.add(accepted, restart, counting);
}

void stabnorm_smooth_gradient(const float* gradient, const uint8_t* gate, int64_t C, float* window, int64_t M,
                              float* average, int64_t* filled, float momentum, float* psi) {
  const bool accepted = gate[0] && finite(gradient, C), smooth = accepted && gate[1];
  std::copy_n(gradient, C, psi);
  if (!accepted) return;
  std::copy_n(gradient, C, window + *filled % M * C);
  if (smooth) {
    std::fill_n(psi, C, 0.f);
    for (int64_t m = 0; m < M; m++) for (int64_t c = 0; c < C; c++) psi[c] += window[m * C + c];  // empty slots hold 0
    for (int64_t c = 0; c < C; c++) psi[c] /= float(std::min(*filled + 1, M));
  }
  move(average, psi, C, momentum);
  if (smooth) std::copy_n(average, C, psi);
  ++*filled;
}

void stabnorm_track_quadratic(const float* square, const float* count, int64_t C, float* running, float* recent, int64_t K,
                              int64_t* step, int64_t* skips, int64_t* progress, int64_t warmup, float alpha, int counting,
                              float* divisor, uint8_t* gate) {
  Counters counters{step, skips, progress};
  const bool accepted = finite(square, C) && *count > 0, past = *step >= warmup;
  std::copy_n(past ? running : square, C, divisor);
  gate[0] = accepted, gate[1] = past;
  if (accepted) {
    move(running, square, C, past ? 1 - alpha : 1.f / float(progress[2] + 1));
    remember(recent, K, C, square, divisor, past);
  }
  counters.add(accepted, false, counting);
}

void stabnorm_quadratic_gradient(const float* gradient, const float* power, const uint8_t* gate, int64_t C, float* nu,
                                 float alpha, float* psi) {
  const bool accepted = gate[0] && finite(gradient, C);
  std::copy_n(gate[1] ? nu : gradient, C, psi);
  if (!accepted) return;
  for (int64_t c = 0; c < C; c++) nu[c] = nu[c] * std::max(1 - (1 - alpha) * power[c], -1.f) + (1 - alpha) * gradient[c];
}

}  // extern "C"
