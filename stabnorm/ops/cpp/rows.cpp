// The passes of a norm over its rows [R, C], see `stabnorm.functional`: moments of the batch, affine map, column sums of
// the backward, gradient of the input; the same for PRepBN's blend of two norms; and GroupScaling. Column sums of a tile
// of rows are float32 in registers. Tiles accumulate in float64, and threads are added in order.
#include "vectors.h"

namespace {

constexpr int TILE = 64;
constexpr int64_t BLOCK = 16 * TILE;  // rows with a common shift, see moments.cpp

template <int K, bool whole> struct Columns {  // K vectors of columns that start at c; the last one has n columns
  static constexpr int vectors = K;
  int64_t c;
  int n;
  template <class T> vf get(const T* row, int k) const { return take<whole>(row + c + k * W, n); }
  template <class T> void set(T* row, int k, vf v) const { put<whole>(row + c + k * W, v, n); }
};

// Call f(Columns) for all columns, four vectors at a time: their sums fit the registers, and they are whole cache lines.
template <class F> inline void for_blocks(int64_t C, F f) {
  int64_t c = 0;
  for (; c + 4 * W <= C; c += 4 * W) f(Columns<4, true>{c, W});
  for (; c + W <= C; c += W) f(Columns<1, true>{c, W});
  if (c < C) f(Columns<1, false>{c, int(C - c)});
}

inline void add(double* into, vf v) {
  for (int j = 0; j < W; j++) into[j] += v[j];
}

// Call f(first, last) for each tile of rows.
template <class F> inline void for_tiles(int64_t first, int64_t last, F f) {
  for (int64_t r = first; r < last; r += TILE) f(r, std::min<int64_t>(last, r + TILE));
}

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

template <class T>
void moments_of(Moments& into, const T* x, int64_t C, int64_t first, int64_t last, const uint8_t* valid, bool center) {
  const int64_t width = padded(C);
  Array<float> shift(width);
  Array<double> sums(width), squares(width);
  const T* rows[TILE];
  int size = 0;
  int64_t block = 0;
  auto end_block = [&] {
    if (block == 0) return;
    for (int64_t c = 0; c < C; c++) {
      double s = sums[c];
      sums[c] = shift[c] + s / block;
      if (center) squares[c] -= s * s / block;
    }
    if (!center) std::fill(sums.begin(), sums.end(), 0.0);
    into.merge(block, sums.data(), squares.data(), C);
    std::fill(sums.begin(), sums.end(), 0.0), std::fill(squares.begin(), squares.end(), 0.0);
    block = 0;
  };
  auto end_tile = [&] {
    if (size == 0) return;
    for_blocks(C, [&](auto columns) {
      constexpr int K = decltype(columns)::vectors;
      vf s[K], q[K], m[K];
      for (int k = 0; k < K; k++) s[k] = q[k] = splat(0);
      if (center && block == 0) {
        for (int r = 0; r < size; r++) for (int k = 0; k < K; k++) s[k] += columns.get(rows[r], k);
        for (int k = 0; k < K; k++) store(&shift[columns.c + k * W], s[k] / float(size)), s[k] = splat(0);
      }
      for (int k = 0; k < K; k++) m[k] = load(&shift[columns.c + k * W]);
      for (int r = 0; r < size; r++) for (int k = 0; k < K; k++) {
        vf d = columns.get(rows[r], k) - m[k];
        s[k] += d, q[k] += d * d;
      }
      for (int k = 0; k < K; k++) add(&sums[columns.c + k * W], s[k]), add(&squares[columns.c + k * W], q[k]);
    });
    block += size;
    size = 0;
    if (block >= BLOCK) end_block();
  };
  for (int64_t r = first; r < last; r++) {
    if (valid && !valid[r]) continue;
    rows[size++] = x + r * C;
    fetch(x + r * C, C);
    if (size == TILE) end_tile();
  }
  end_tile();
  end_block();
}

// Add the sums over some rows of dy, and of dy times each of `count` factors, which f(row, columns, k, factor) gives.
template <class T, int count, class F>
void add_products(double* into, int64_t width, const T* dy, int64_t C, const int64_t* rows, int size, bool guard, F f) {
  for_blocks(C, [&](auto columns) {
    constexpr int K = decltype(columns)::vectors;
    vf plain[K], product[count][K];
    for (int k = 0; k < K; k++) {
      plain[k] = splat(0);
      for (int i = 0; i < count; i++) product[i][k] = splat(0);
    }
    for (int r = 0; r < size; r++) for (int k = 0; k < K; k++) {
      vf g = columns.get(dy + rows[r] * C, k);
      plain[k] += g;
      for (int i = 0; i < count; i++) {
        vf p = g * f(rows[r], columns, k, i);
        product[i][k] += guard ? (g == splat(0) ? splat(0) : p) : p;  // padding may hold NaN
      }
    }
    for (int k = 0; k < K; k++) {
      add(into + columns.c + k * W, plain[k]);
      for (int i = 0; i < count; i++) add(into + (i + 1) * width + columns.c + k * W, product[i][k]);
    }
  });
}

// `out [2][1 + count][C]` gets these sums over all rows and over the valid ones.
template <class T, int count, class F>
void column_sums(const T* dy, const T* x, int64_t R, int64_t C, const uint8_t* valid, int threads, float* out, F f) {
  const int64_t width = padded(C), size = (1 + count) * width;
  const int parts = parts_of(R, C, threads);
  Array<double> sums(parts * 2 * size);  // each part has sums over valid rows and over the others
  in_parallel(parts, [&](int part) {
    double* mine = &sums[part * 2 * size];
    for_tiles(R * part / parts, R * (part + 1) / parts, [&](int64_t first, int64_t last) {
      int64_t rows[2][TILE];
      int sizes[2] = {0, 0};
      for (int64_t r = first; r < last; r++) {
        int kind = valid && !valid[r];
        rows[kind][sizes[kind]++] = r;
        fetch(dy + r * C, C), fetch(x + r * C, C);
      }
      for (int kind = 0; kind < 2; kind++)
        if (sizes[kind]) add_products<T, count>(mine + kind * size, width, dy, C, rows[kind], sizes[kind], valid, f);
    });
  });
  for (int i = 0; i <= count; i++) for (int64_t c = 0; c < C; c++) {
    double of_valid = 0, of_others = 0;
    for (int part = 0; part < parts; part++) {
      of_valid += sums[part * 2 * size + i * width + c];
      of_others += sums[part * 2 * size + size + i * width + c];
    }
    out[i * C + c] = float(of_valid + of_others);
    out[(1 + count + i) * C + c] = float(of_valid);
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
  Array<Moments> found(parts_of(R, C, threads), Moments(padded(C)));
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
    column_sums<T, 1>((const T*)dy, (const T*)x, R, C, valid, threads, out, [&](int64_t r, auto columns, int k, int) {
      return columns.get((const T*)x + r * C, k) - columns.get(mean, k);
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
    column_sums<T, 2>((const T*)dy, (const T*)x, R, C, valid, threads, out, [&](int64_t r, auto columns, int k, int factor) {
      vf v = columns.get((const T*)x + r * C, k);
      return factor == 0 ? v - columns.get(mean, k) : (v - means[r]) * scales[r];
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
