// Vectors of floats as wide as the machine's registers, which are loaded from and stored to float, bfloat16 and half; and
// loops over rows. This is C++17 with GCC's vector extensions, which clang has, too. Without torch it builds in seconds.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vs __attribute__((vector_size(2 * W)));

struct bf16 { uint16_t bits; };
struct half { uint16_t bits; };

static inline vf splat(float a) { return vf{} + a; }

static inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

static inline vf load(const bf16* p) {
  vs s; std::memcpy(&s, p, sizeof s);
  vu u = __builtin_convertvector(s, vu) << 16;
  vf v; std::memcpy(&v, &u, sizeof v); return v;
}
static inline void store(bf16* p, vf v) {
  vu u; std::memcpy(&u, &v, sizeof u);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  vu quiet = (u >> 16) | 0x40;                        // rounding could turn a NaN into infinity
  vu is_nan = (vu)(v != v);
  vs s = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), vs);
  std::memcpy(p, &s, sizeof s);
}

#if defined(__AVX512F__)
static inline vf load(const half* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
static inline void store(half* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__)
static inline vf load(const half* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
static inline void store(half* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else  // other machines convert the bits
static inline vf load(const half* p) {
  vs s; std::memcpy(&s, p, sizeof s);
  vu u = __builtin_convertvector(s, vu), rest = (u & 0x7fff) << 13;
  vf f; std::memcpy(&f, &rest, sizeof f);
  f *= 0x1p112f;  // the exponents' biases differ by 112; small numbers become normal ones
  vu bits; std::memcpy(&bits, &f, sizeof bits);
  bits |= ((u & 0x8000) << 16) | ((vu)(rest >= 0x0f800000u) & 0x7f800000u);  // the largest exponent means inf or NaN
  vf v; std::memcpy(&v, &bits, sizeof v); return v;
}
static inline void store(half* p, vf v) {  // to nearest, ties to even
  vu u; std::memcpy(&u, &v, sizeof u);
  const vu sign = (u >> 16) & 0x8000, twice = u + u, magnitude = u & 0x7fffffff;
  vf size; std::memcpy(&size, &magnitude, sizeof size);
  vf scaled = (size * 0x1p112f) * 0x1p-110f;  // too large a number becomes inf
  vu bias = twice & 0xff000000u;
  const vu small = (vu)(bias < 0x71000000u);
  bias = (small & 0x71000000u) | (~small & bias);
  bias = (bias >> 1) + 0x07800000u;
  vf added; std::memcpy(&added, &bias, sizeof added);
  added += scaled;  // this rounds to the digits of half
  vu bits; std::memcpy(&bits, &added, sizeof bits);
  const vu number = ((bits >> 13) & 0x7c00) + (bits & 0x0fff), is_nan = (vu)(twice > 0xff000000u);
  vs s = __builtin_convertvector(sign | (is_nan & 0x7e00) | (~is_nan & number), vs);
  std::memcpy(p, &s, sizeof s);
}
#endif

// Load the first n < W numbers; the others are 0.
template <class T> static inline vf load_some(const T* p, int n) {
  T padded[W]; std::memset(padded, 0, sizeof padded);
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}
template <class T> static inline void store_some(T* p, vf v, int n) {
  T padded[W]; store(padded, v);
  std::memcpy(p, padded, n * sizeof(T));
}
template <bool whole, class T> static inline vf take(const T* p, int n) { return whole ? load(p) : load_some(p, n); }
template <bool whole, class T> static inline void put(T* p, vf v, int n) { if (whole) store(p, v); else store_some(p, v, n); }

static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }
static inline vf mask(vf v, int n) {  // set the n-th and later numbers to 0
  for (int j = n; j < W; j++) v[j] = 0;
  return v;
}
template <int N> struct Floats { typedef float type __attribute__((vector_size(4 * N))); };
// Add the numbers of a vector, half to half, in registers: memory would make each half wait for the one before.
template <int N> static inline float sum_of(typename Floats<N>::type v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typename Floats<N / 2>::type low, high;
    std::memcpy(&low, &v, sizeof low), std::memcpy(&high, (const char*)&v + sizeof low, sizeof high);
    return sum_of<N / 2>(low + high);
  }
}
static inline float sum(vf v) { return sum_of<W>(v); }

// Call f(first column, number of columns, whether it is a whole vector) for every vector of a row of C columns.
template <class F> static inline void for_columns(int64_t C, F f) {
  int64_t c = 0;
  for (; c + W <= C; c += W) f(c, W, std::true_type{});
  if (c < C) f(c, (int)(C - c), std::false_type{});
}

// A vector whose memory comes from the C library. What std::allocator calls differs from one release of the C++ library to
// the next, so that a library that was built here would not load on an older system.
template <class T> struct Memory {
  using value_type = T;
  Memory() = default;
  template <class U> Memory(const Memory<U>&) {}
  T* allocate(size_t n) {
    void* p = std::malloc(n * sizeof(T));
    if (!p && n) std::abort();
    return (T*)p;
  }
  void deallocate(T* p, size_t) { std::free(p); }
  template <class U> bool operator==(const Memory<U>&) const { return true; }
  template <class U> bool operator!=(const Memory<U>&) const { return false; }
};
template <class T> using Array = std::vector<T, Memory<T>>;

#if !defined(_OPENMP) && defined(__linux__)
// The threads are those of the OpenMP runtime that torch has loaded, under whichever name; without one they are null. To
// link it would load a second copy beside torch's, with threads of its own.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}
#endif

// Call f(part) for every part, on a thread each. The split depends only on their number, so sums are the same every time.
template <class F> static void in_parallel(int parts, F f) {
  struct Job {
    F& f;
    int parts;
    __attribute__((noinline)) void run(int first, int step) { for (int part = first; part < parts; part += step) f(part); }
  } job{f, parts};
#if defined(_OPENMP)
  if (parts > 1) {
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; part++) job.run(part, parts);
    return;
  }
#elif defined(__linux__)
  if (parts > 1 && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
    auto run = [](void* job) { ((Job*)job)->run(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(run, &job, parts, 0);
    return;
  }
#endif
  job.run(0, 1);
}

static inline int parts_of(int64_t rows, int64_t C, int threads) {
  int64_t worth = std::max<int64_t>(1, rows * C / 16384);  // with less work, another thread costs more than it saves
  return (int)std::min<int64_t>(std::max(threads, 1), std::min(worth, rows));
}

enum Type { FLOAT, BFLOAT16, HALF };

// Call f with a pointer of the type that is known only at run time.
template <class F> static inline void with_type(int type, F f) {
  if (type == FLOAT) f((float*)nullptr);
  else if (type == BFLOAT16) f((bf16*)nullptr);
  else f((half*)nullptr);
}
