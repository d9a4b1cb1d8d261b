// The backward of LayerNorm and RMSNorm in one read. It computes dx, and the sums over rows of dy n and of dy, which are
// the gradients of gain and bias. n = (x - m) r with each token's own m and r; m = 0 for RMSNorm.
#include "columns.h"

namespace {

template <class T, bool rms>
void gradient_of(const T* dy, const T* x, int64_t C, int64_t first, int64_t last, const float* means, const float* scales,
                 const float* gain, T* dx, ColumnSums<2>& sums) {
  for (int64_t row = first; row < last; row++) {
    const T *up = dy + row * C, *in = x + row * C;
    T* out = dx + row * C;
    const float m = rms ? 0.f : means[row], r = scales[row];
    vf plain = splat(0), along = splat(0);
    sums.add_row([&](int64_t c, int n, auto whole, vf* terms) {
      vf g = take<whole>(up + c, n), normal = (take<whole>(in + c, n) - m) * r;
      if (!whole) normal = mask(normal, n);
      terms[0] = g * normal, terms[1] = g;
      if (gain) g *= take<whole>(gain + c, n);
      plain += g, along += g * normal;
    });
    const float a = rms ? 0.f : sum(plain) / C, b = sum(along) / C;
    for_columns(C, [&](int64_t c, int n, auto whole) {
      vf g = take<whole>(up + c, n), normal = (take<whole>(in + c, n) - m) * r;
      if (gain) g *= take<whole>(gain + c, n);
      put<whole>(out + c, (g - a - normal * b) * r, n);
    });
  }
  sums.end_tile();
}

}  // namespace

// `out [2][C]` gets the sums of dy n and of dy.
extern "C" void stabnorm_norm_gradient(const void* dy, const void* x, int type, int64_t R, int64_t C, int rms,
                                       const float* means, const float* scales, const float* gain, int threads, void* dx,
                                       float* out) {
  const int parts = parts_of(R, C, threads);
  Array<ColumnSums<2>> sums(parts, ColumnSums<2>(C));
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    in_parallel(parts, [&](int part) {
      auto run = rms ? gradient_of<T, true> : gradient_of<T, false>;
      ColumnSums<2> own(C);
      run((const T*)dy, (const T*)x, C, R * part / parts, R * (part + 1) / parts, means, scales, gain, (T*)dx, own);
      sums[part] = std::move(own);
    });
  });
  for (int i = 0; i < 2; i++) for (int64_t c = 0; c < C; c++) out[i * C + c] = float(total(sums, i, c));
}
