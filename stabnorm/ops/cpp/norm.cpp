// The backward of LayerNorm and RMSNorm in one read. It computes dx, and the sums over rows of dy n and of dy, which are
// the gradients of gain and bias. n = (x - m) r with each token's own m and r; m = 0 for RMSNorm.
#include "vectors.h"

namespace {

constexpr int TILE = 16;  // rows that fit the innermost caches; their column sums are float32, and tiles accumulate in float64

template <class T, bool rms>
void gradient_of(const T* dy, const T* x, int64_t C, int64_t first, int64_t last, const float* means, const float* scales,
                 const float* gain, T* dx, double* sums) {
  for (int64_t begin = first; begin < last; begin += TILE) {
    const int64_t end = std::min<int64_t>(last, begin + TILE);
    for (int64_t row = begin; row < end; row++) {
      const T *up = dy + row * C, *in = x + row * C;
      T* out = dx + row * C;
      const float m = rms ? 0.f : means[row], r = scales[row];
      auto at = [&](int64_t c, int n, auto whole, vf& g, vf& normal) {
        g = take<whole>(up + c, n), normal = (take<whole>(in + c, n) - m) * r;
        if (!whole) normal = mask(normal, n);
        if (gain) g *= take<whole>(gain + c, n);
      };
      vf plain = splat(0), along = splat(0), g, normal;
      for_columns(C, [&](int64_t c, int n, auto whole) { at(c, n, whole, g, normal); plain += g, along += g * normal; });
      const float a = rms ? 0.f : sum(plain) / C, b = sum(along) / C;
      for_columns(C, [&](int64_t c, int n, auto whole) {
        at(c, n, whole, g, normal);
        put<whole>(out + c, (g - a - normal * b) * r, n);
      });
    }
    for_columns(C, [&](int64_t c, int n, auto whole) {
      vf through = splat(0), plain = splat(0);
      for (int64_t row = begin; row < end; row++) {
        vf g = take<whole>(dy + row * C + c, n), v = take<whole>(x + row * C + c, n);
        plain += g, through += g * ((v - (rms ? 0.f : means[row])) * scales[row]);
      }
      for (int j = 0; j < n; j++) sums[c + j] += through[j], sums[C + c + j] += plain[j];
    });
  }
}

}  // namespace

// `out [2][C]` gets the sums of dy n and of dy.
extern "C" void stabnorm_norm_gradient(const void* dy, const void* x, int type, int64_t R, int64_t C, int rms,
                                       const float* means, const float* scales, const float* gain, int threads, void* dx,
                                       float* out) {
  const int parts = parts_of(R, C, threads);
  Array<Array<double>> sums(parts, Array<double>(2 * C));
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    in_parallel(parts, [&](int part) {
      auto run = rms ? gradient_of<T, true> : gradient_of<T, false>;
      run((const T*)dy, (const T*)x, C, R * part / parts, R * (part + 1) / parts, means, scales, gain, (T*)dx,
          sums[part].data());
    });
  });
  for (int64_t c = 0; c < 2 * C; c++) {
    double total = 0;
    for (auto& part : sums) total += part[c];
    out[c] = float(total);
  }
}
