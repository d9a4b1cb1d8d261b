// `one_pass` computes a map over the rows [R, C], and column sums of its input, in one read. Column sums of a tile of rows
// are float32 in registers. Tiles accumulate in float64, and threads are added in order.
#include "vectors.h"

namespace {

constexpr int TILE = 16;

// Call f(first, last, sums) for each tile of rows, with sums [count][C] of the thread. Their total goes to `out`.
template <class F> void in_tiles(int64_t R, int64_t C, int count, int threads, float* out, F f) {
  const int parts = parts_of(R, C, threads);
  Array<Array<double>> sums(parts, Array<double>(count * C));
  in_parallel(parts, [&](int part) {
    const int64_t first = R * part / parts, last = R * (part + 1) / parts;
    for (int64_t r = first; r < last; r += TILE) f(r, std::min<int64_t>(last, r + TILE), sums[part].data());
  });
  for (int64_t c = 0; c < count * C; c++) {
    double total = 0;
    for (auto& part : sums) total += part[c];
    out[c] = float(total);
  }
}

inline void add(double* into, vf v, int n) {
  for (int j = 0; j < n; j++) into[j] += v[j];
}

}  // namespace

extern "C" {

// y = scale x + shift; a null y is left out. `out [C]` gets the sum of x^2 over the valid rows. Return the number of valid rows.
int64_t stabnorm_affine_square(const void* x, int type, int64_t R, int64_t C, const uint8_t* valid, const float* scale,
                               const float* shift, int threads, void* y, float* out) {
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    in_tiles(R, C, 1, threads, out, [&](int64_t first, int64_t last, double* sums) {
      for_columns(C, [&](int64_t c, int n, auto whole) {
        vf square = splat(0);
        const vf a = take<whole>(scale + c, n), b = shift ? take<whole>(shift + c, n) : splat(0);
        for (int64_t r = first; r < last; r++) {
          vf v = take<whole>((const T*)x + r * C + c, n);
          if (y) put<whole>((T*)y + r * C + c, v * a + b, n);
          if (!valid || valid[r]) square += v * v;
        }
        add(sums + c, square, n);
      });
    });
  });
  int64_t count = R;
  if (valid) count = std::count_if(valid, valid + R, [](uint8_t v) { return v != 0; });
  return count;
}

// dx = scale dy - [valid] slope x. `out [4][C]` gets the sums of dy and dy x, over all rows and over the valid ones.
void stabnorm_gradient_sums(const void* dy, const void* x, int type, int64_t R, int64_t C, const uint8_t* valid,
                            const float* scale, const float* slope, int threads, void* dx, float* out) {
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    in_tiles(R, C, 4, threads, out, [&](int64_t first, int64_t last, double* sums) {
      for_columns(C, [&](int64_t c, int n, auto whole) {
        vf all[2] = {splat(0), splat(0)}, some[2] = {splat(0), splat(0)};
        const vf a = take<whole>(scale + c, n), s = take<whole>(slope + c, n);
        for (int64_t r = first; r < last; r++) {
          vf g = take<whole>((const T*)dy + r * C + c, n), v = take<whole>((const T*)x + r * C + c, n), p = g * v;
          const bool keep = !valid || valid[r];
          if (valid) p = g == splat(0) ? splat(0) : p;  // padding may hold NaN
          all[0] += g, all[1] += p;
          if (valid && keep) some[0] += g, some[1] += p;
          put<whole>((T*)dx + r * C + c, keep ? g * a - v * s : g * a, n);
        }
        for (int i = 0; i < 2; i++) add(sums + i * C + c, all[i], n), add(sums + (2 + i) * C + c, valid ? some[i] : all[i], n);
      });
    });
  });
}

}  // extern "C"
