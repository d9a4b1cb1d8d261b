// The passes of a norm over its rows [R, C], see `stabnorm.functional`: moments of the batch, affine map, column sums of
// the backward, gradient of the input; the same for PRepBN's blend of two norms; and GroupScaling. Threads are added in
// order.
#include "columns.h"

namespace {

constexpr int64_t BLOCK = 16 * TILE;  // rows with a common shift, see moments.cpp

template <class F> void split_rows(int64_t rows, int64_t C, int threads, F f) {
  const int parts = parts_of(rows, C, threads);
  in_parallel(parts, [&](int part) { f(part, rows * part / parts, rows * (part + 1) / parts); });
}

struct Moments {
  int64_t count = 0;
  Array<double> mean, square;  // sum of squared deviations
  explicit Moments(int64_t width) : mean(width), square(width) {}

  void merge(int64_t n, const double* mean_b, const double* square_b, int64_t C) {
    if (n == 0) return;
    double total = double(count + n), weight = n / total, spread = double(count) * n / total;
    for (int64_t c = 0; c < C; c++) {
      double d = mean_b[c] - mean[c];
      mean[c] += weight * d;
      square[c] += square_b[c] + spread * d * d;
    }
    count += n;
  }
};

// Write the mean of the first rows, of up to TILE valid ones, as the shift of their block.
template <class T>
void shift_of(float* shift, const T* x, int64_t C, int64_t first, int64_t last, const uint8_t* valid) {
  int64_t rows = 0;
  ColumnSums<1> sums(C);
  for (int64_t r = first; r < last && rows < TILE; r++) {
    if (valid && !valid[r]) continue;
    sums.add_row([&](int64_t c, int n, auto whole, vf* terms) { terms[0] = take<whole>(x + r * C + c, n); });
    rows++;
  }
  sums.end_tile();
  for (int64_t c = 0; c < C; c++) shift[c] = float(sums[0][c] / std::max<int64_t>(rows, 1));
}

template <class T>
void moments_of(Moments& into, const T* x, int64_t C, int64_t first, int64_t last, const uint8_t* valid, bool center) {
  Array<float> shift(padded(C));
  ColumnSums<2> sums(C);
  int64_t rows = 0;  // of the block
  auto end_block = [&] {
    sums.end_tile();
    double *mean = sums[0], *square = sums[1];
    for (int64_t c = 0; c < C && rows; c++) {
      const double s = mean[c];
      mean[c] = center ? shift[c] + s / rows : 0.0;
      if (center) square[c] -= s * s / rows;
    }
    into.merge(rows, mean, square, C);
    sums.clear(), rows = 0;
  };
  for (int64_t r = first; r < last; r++) {
    if (valid && !valid[r]) continue;
    if (center && rows == 0) shift_of(shift.data(), x, C, r, last, valid);
    sums.add_row([&](int64_t c, int n, auto whole, vf* terms) {
      vf d = take<whole>(x + r * C + c, n) - load(&shift[c]);
      terms[0] = d, terms[1] = d * d;
    });
    if (++rows == BLOCK) end_block();
  }
  end_block();
}

// Get the sums of dy, and of dy times each of `count` factors, which f(row, first column, number, whether whole, factors)
// writes. `out [2][1 + count][C]` has them over all rows and over the valid ones.
template <class T, int count, class F>
void column_sums(const T* dy, int64_t R, int64_t C, const uint8_t* valid, int threads, float* out, F f) {
  const int parts = parts_of(R, C, threads);
  using Sums = ColumnSums<1 + count>;
  Array<Sums> of_valid(parts, Sums(C)), of_others(valid ? parts : 0, Sums(C));
  in_parallel(parts, [&](int part) {
    Sums valid_rows(C), other_rows(valid ? C : 0);
    for (int64_t r = R * part / parts; r < R * (part + 1) / parts; r++) {
      (valid && !valid[r] ? other_rows : valid_rows).add_row([&](int64_t c, int n, auto whole, vf* terms) {
        const vf g = take<whole>(dy + r * C + c, n);
        f(r, c, n, whole, terms + 1);
        terms[0] = g;
        for (int i = 1; i <= count; i++) {
          const vf product = g * terms[i];
          terms[i] = valid ? (g == splat(0) ? splat(0) : product) : product;  // padding may hold NaN
        }
      });
    }
    valid_rows.end_tile(), other_rows.end_tile();
    of_valid[part] = std::move(valid_rows);
    if (valid) of_others[part] = std::move(other_rows);
  });
  for (int i = 0; i <= count; i++) for (int64_t c = 0; c < C; c++) {
    const double sum = total(of_valid, i, c);
    out[i * C + c] = float(sum + total(of_others, i, c)), out[(1 + count + i) * C + c] = float(sum);
  }
}

template <class T> using element = std::remove_pointer_t<std::decay_t<T>>;

// Compute mean and 1 / sqrt(variance + eps) of a row; with `rms` there is no mean.
template <class T> void token_scale(const T* row, int64_t C, bool rms, float eps, float& mean, float& scale) {
  vf s[2] = {splat(0), splat(0)};
  float rest = 0;
  auto total = [&](auto f) {
    s[0] = s[1] = splat(0), rest = 0;
    int64_t c = 0;
    for (; c + 2 * W <= C; c += 2 * W) for (int k = 0; k < 2; k++) s[k] += f(load(row + c + k * W));
    for (; c + W <= C; c += W) s[0] += f(load(row + c));
    if (c < C) {
      float parts[W]; store(parts, f(load_some(row + c, int(C - c))));
      for (int j = 0; j < C - c; j++) rest += parts[j];
    }
    return sum(s[0] + s[1]) + rest;
  };
  mean = 0;
  if (!rms) {
    mean = total([](vf x) { return x; }) / C;
    mean += total([&](vf x) { return x - mean; }) / C;  // the rounding error of a mean far from 0
  }
  scale = 1 / std::sqrt(total([&](vf x) { vf d = x - mean; return d * d; }) / C + eps);
}

}  // namespace

extern "C" {

// Return the number of valid rows. If there is none, `mean` and `square` are 0. If not centred, `mean` is 0.
int64_t stabnorm_batch_moments(const void* x, int type, int64_t R, int64_t C, const uint8_t* valid, int center, int threads,
                               float* mean, float* square) {
  Array<Moments> found(parts_of(R, C, threads), Moments(C));
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int part, int64_t first, int64_t last) {
      moments_of(found[part], (const T*)x, C, first, last, valid, center);
    });
  });
  Moments& all = found[0];
  for (size_t part = 1; part < found.size(); part++)
    all.merge(found[part].count, found[part].mean.data(), found[part].square.data(), C);
  double n = std::max<double>(1, double(all.count));
  for (int64_t c = 0; c < C; c++) mean[c] = float(all.mean[c]), square[c] = float(all.square[c] / n);
  return all.count;
}

void stabnorm_affine(const void* x, int type, int64_t R, int64_t C, const float* scale, const float* shift, int threads,
                     void* y) {
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) {
        const T* in = (const T*)x + r * C;
        T* out = (T*)y + r * C;
        for_columns(C, [&](int64_t c, int n, auto whole) {
          const vf a = take<whole>(scale + c, n), b = shift ? take<whole>(shift + c, n) : splat(0);
          put<whole>(out + c, take<whole>(in + c, n) * a + b, n);  // as in affine_square, to the bit: a recompute
        });
      }
    });
  });
}

// `out [4][C]` gets the sums of dy and dy (x - mean), over all rows and over the valid ones.
void stabnorm_sums(const void* dy, const void* x, int type, int64_t R, int64_t C, const uint8_t* valid, const float* mean,
                   int threads, float* out) {
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    column_sums<T, 1>((const T*)dy, R, C, valid, threads, out, [&](int64_t r, int64_t c, int n, auto whole, vf* factors) {
      factors[0] = take<whole>((const T*)x + r * C + c, n) - take<whole>(mean + c, n);
    });
  });
}

// dx = scale dy - [valid] (slope (x - mean) + offset)
void stabnorm_gradient(const void* dy, const void* x, int type, int64_t R, int64_t C, const uint8_t* valid,
                       const float* mean, const float* scale, const float* slope, const float* offset, int threads,
                       void* dx) {
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++) {
        const T *g = (const T*)dy + r * C, *in = (const T*)x + r * C;
        T* out = (T*)dx + r * C;
        const bool keep = !valid || valid[r];
        for_columns(C, [&](int64_t c, int n, auto whole) {
          vf v = take<whole>(g + c, n) * take<whole>(scale + c, n);
          if (keep) {
            vf d = take<whole>(in + c, n) - take<whole>(mean + c, n);
            v -= d * take<whole>(slope + c, n) + take<whole>(offset + c, n);
          }
          put<whole>(out + c, v, n);
        });
      }
    });
  });
}

// y = n gain + x scale + shift with n = (x - m) r. The m and r of each token are stored.
void stabnorm_blend(const void* x, int type, int64_t R, int64_t C, float eps, const float* gain, const float* scale,
                    const float* shift, int threads, void* y, float* means, float* scales) {
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        const T* in = (const T*)x + row * C;
        T* out = (T*)y + row * C;
        token_scale(in, C, false, eps, means[row], scales[row]);
        const float m = means[row], r = scales[row];
        for_columns(C, [&](int64_t c, int n, auto whole) {
          vf v = take<whole>(in + c, n);
          vf u = (v - m) * r * take<whole>(gain + c, n) + (v * take<whole>(scale + c, n) + take<whole>(shift + c, n));
          put<whole>(out + c, u, n);
        });
      }
    });
  });
}

// `out [6][C]` gets the sums of dy, dy (x - mean) and dy n, over all rows and over the valid ones.
void stabnorm_blend_sums(const void* dy, const void* x, int type, int64_t R, int64_t C, const uint8_t* valid,
                         const float* mean, const float* means, const float* scales, int threads, float* out) {
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    column_sums<T, 2>((const T*)dy, R, C, valid, threads, out, [&](int64_t r, int64_t c, int n, auto whole, vf* factors) {
      const vf v = take<whole>((const T*)x + r * C + c, n);
      factors[0] = v - take<whole>(mean + c, n), factors[1] = (v - means[r]) * scales[r];
    });
  });
}

// dx = r (g - mean(g) - n mean(g n)) + scale dy - [valid] (slope (x - mean) + offset) with g = gain dy.
void stabnorm_blend_gradient(const void* dy, const void* x, int type, int64_t R, int64_t C, const uint8_t* valid,
                             const float* mean, const float* means, const float* scales, const float* gain,
                             const float* scale, const float* slope, const float* offset, int threads, void* dx) {
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t row = first; row < last; row++) {
        const T *up = (const T*)dy + row * C, *in = (const T*)x + row * C;
        T* out = (T*)dx + row * C;
        const float m = means[row], r = scales[row];
        const bool keep = !valid || valid[row];
        vf plain = splat(0), along = splat(0);
        for_columns(C, [&](int64_t c, int n, auto whole) {
          vf g = take<whole>(up + c, n) * take<whole>(gain + c, n);
          vf p = g * ((take<whole>(in + c, n) - m) * r);
          plain += g, along += valid ? (g == splat(0) ? splat(0) : p) : p;
        });
        const float a = sum(plain) / C, b = sum(along) / C;
        for_columns(C, [&](int64_t c, int n, auto whole) {
          vf g = take<whole>(up + c, n), v = take<whole>(in + c, n);
          vf u = (g * take<whole>(gain + c, n) - a - (v - m) * (r * b)) * r + g * take<whole>(scale + c, n);
          if (keep) u -= (v - take<whole>(mean + c, n)) * take<whole>(slope + c, n) + take<whole>(offset + c, n);
          put<whole>(out + c, u, n);
        });
      }
    });
  });
}

// y = x r, so that every group of a token's channels has rms 1. `r [R][G]` is stored.
void stabnorm_scale_groups(const void* x, int type, int64_t R, int64_t C, int64_t G, float eps, int threads, void* y,
                           float* scales) {
  const int64_t size = C / G;
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t i = first * G; i < last * G; i++) {
        const T* in = (const T*)x + i * size;
        T* out = (T*)y + i * size;
        float none;
        token_scale(in, size, true, eps, none, scales[i]);
        const float r = scales[i];
        for_columns(size, [&](int64_t c, int n, auto whole) { put<whole>(out + c, take<whole>(in + c, n) * r, n); });
      }
    });
  });
}

// dx = (dy - y mean(dy y)) r. If all of dy is 0, so is dx.
void stabnorm_scale_groups_gradient(const void* dy, const void* y, int type, int64_t R, int64_t C, int64_t G,
                                    const float* scales, int threads, void* dx) {
  const int64_t size = C / G;
  with_type(type, [&](auto* typed) {
    using T = element<decltype(typed)>;
    split_rows(R, C, threads, [&](int, int64_t first, int64_t last) {
      for (int64_t i = first * G; i < last * G; i++) {
        const T *g = (const T*)dy + i * size, *v = (const T*)y + i * size;
        T* out = (T*)dx + i * size;
        vf along = splat(0), any = splat(0);
        for_columns(size, [&](int64_t c, int n, auto whole) {
          vf upstream = take<whole>(g + c, n);
          along += upstream * take<whole>(v + c, n);
          any = upstream != splat(0) ? splat(1) : any;
        });
        const float b = sum(along) / size, r = scales[i];
        const bool some = sum(any) > 0;
        for_columns(size, [&](int64_t c, int n, auto whole) {
          vf u = (take<whole>(g + c, n) - take<whole>(v + c, n) * b) * r;
          put<whole>(out + c, some ? u : splat(0), n);
        });
      }
    });
  });
}

}  // extern "C"
