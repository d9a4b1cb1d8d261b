// `one_pass` computes a map over the rows [R, C], and column sums of its input, in one read. Threads are added in order.
#include "columns.h"

extern "C" {

// y = scale x + shift; a null y is left out. `out [C]` gets the sum of x^2 over the valid rows. Return the number of valid rows.
int64_t stabnorm_affine_square(const void* x, int type, int64_t R, int64_t C, const uint8_t* valid, const float* scale,
                               const float* shift, int threads, void* y, float* out) {
  const int parts = parts_of(R, C, threads);
  Array<ColumnSums<1>> squares(parts, ColumnSums<1>(C));
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    in_parallel(parts, [&](int part) {
      ColumnSums<1> sums(C);
      for (int64_t r = R * part / parts; r < R * (part + 1) / parts; r++) {
        const bool counts = !valid || valid[r];
        const T* in = (const T*)x + r * C;
        auto map = [&](int64_t c, int n, auto whole) {
          const vf v = take<whole>(in + c, n), b = shift ? take<whole>(shift + c, n) : splat(0);
          if (y) put<whole>((T*)y + r * C + c, v * take<whole>(scale + c, n) + b, n);
          return v;
        };
        if (counts) {
          sums.add_row([&](int64_t c, int n, auto whole, vf* terms) {
            const vf v = map(c, n, whole);
            terms[0] = v * v;
          });
        } else if (y) {
          for_columns(C, map);
        }
      }
      sums.end_tile();
      squares[part] = std::move(sums);
    });
  });
  for (int64_t c = 0; c < C; c++) out[c] = float(total(squares, 0, c));
  int64_t count = R;
  if (valid) count = std::count_if(valid, valid + R, [](uint8_t v) { return v != 0; });
  return count;
}

// dx = scale dy - [valid] slope x. `out [4][C]` gets the sums of dy and dy x, over all rows and over the valid ones.
void stabnorm_gradient_sums(const void* dy, const void* x, int type, int64_t R, int64_t C, const uint8_t* valid,
                            const float* scale, const float* slope, int threads, void* dx, float* out) {
  const int parts = parts_of(R, C, threads);
  Array<ColumnSums<2>> of_valid(parts, ColumnSums<2>(C)), of_others(valid ? parts : 0, ColumnSums<2>(C));
  with_type(type, [&](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    in_parallel(parts, [&](int part) {
      ColumnSums<2> valid_rows(C), other_rows(valid ? C : 0);
      for (int64_t r = R * part / parts; r < R * (part + 1) / parts; r++) {
        const bool counts = !valid || valid[r];
        const T *up = (const T*)dy + r * C, *in = (const T*)x + r * C;
        (counts ? valid_rows : other_rows).add_row([&](int64_t c, int n, auto whole, vf* terms) {
          const vf g = take<whole>(up + c, n), v = take<whole>(in + c, n), scaled = g * take<whole>(scale + c, n), p = g * v;
          terms[0] = g, terms[1] = valid ? (g == splat(0) ? splat(0) : p) : p;  // padding may hold NaN
          put<whole>((T*)dx + r * C + c, counts ? scaled - v * take<whole>(slope + c, n) : scaled, n);
        });
      }
      valid_rows.end_tile(), other_rows.end_tile();
      of_valid[part] = std::move(valid_rows);
      if (valid) of_others[part] = std::move(other_rows);
    });
  });
  for (int i = 0; i < 2; i++) for (int64_t c = 0; c < C; c++) {
    const double sum = total(of_valid, i, c);
    out[i * C + c] = float(sum + total(of_others, i, c)), out[(2 + i) * C + c] = float(sum);
  }
}

}  // extern "C"
