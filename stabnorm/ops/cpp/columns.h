// Sums over many rows, column by column. Rows are read one after another in the order of memory, because this is as fast as
// the machine can read. The terms of a row are added to float32 sums, which stay in the innermost cache. After TILE rows,
// these are added to sums in float64.
#pragma once
#include "vectors.h"

constexpr int TILE = 64;  // rows; with more of them, float32 sums would lose digits

static inline int64_t padded(int64_t C) { return (C + 4 * W - 1) / (4 * W) * (4 * W); }

// `count` sums of each of C columns. A thread keeps them on its stack until it has ended: neighbours in an array would
// write to the same cache lines.
template <int count> class ColumnSums {
  int64_t C, width;
  Array<float> tile;
  Array<double> sums;
  int rows = 0;

 public:
  explicit ColumnSums(int64_t C) : C(C), width(padded(C)), tile(count * width), sums(count * width) {}

  // Add one row. f(first column, number of columns, whether it is a whole vector, terms) writes `count` vectors of terms.
  template <class F> inline void add_row(F f) {
    float* into = tile.data();
    const int64_t width = this->width;  // a store could change the member, as far as the compiler knows
    for_columns(C, [&](int64_t c, int n, auto whole) {
      vf terms[count];
      f(c, n, whole, terms);
      for (int i = 0; i < count; i++) store(into + i * width + c, load(into + i * width + c) + terms[i]);
    });
    if (++rows == TILE) end_tile();
  }

  void end_tile() {
    if (rows == 0) return;
    for (int64_t c = 0; c < count * width; c++) sums[c] += tile[c], tile[c] = 0;
    rows = 0;
  }

  // The i-th sums [C]; `end_tile` comes before.
  double* operator[](int i) { return &sums[i * width]; }
  void clear() { std::fill(sums.begin(), sums.end(), 0.0); }
};

// The i-th sum of column c over all parts, in their order.
template <int count> static inline double total(Array<ColumnSums<count>>& parts, int i, int64_t c) {
  double sum = 0;
  for (auto& part : parts) sum += part[i][c];
  return sum;
}
