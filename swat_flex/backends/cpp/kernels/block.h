// The register block: the inner loop of every product.
#pragma once
#include <algorithm>

#include "vector.h"

// A long sum is a sum of sums of about so many terms: one chain of all would lose more to rounding than a matmul does.
constexpr int64_t TERMS = 64;

// sum[r][c] = Σ_t a[r·row + t·step] · b[t·width + c·VW …], 0 ≤ t < n: a number of `a` times a vector of `b`.
template <int R, int N>
static INLINE void multiply(
    V (&sum)[R * N], const float* a, int64_t row, int64_t step, const float* b, int64_t width, int64_t n) {
  V before[R * N];
  asm("" : "=m"(before));  // in memory, since only long sums use it: the registers are for `sum`
  const int64_t parts = (n + TERMS - 1) / TERMS, even = parts > 1 ? (n + parts - 1) / parts : n;
  for (int64_t left = n;; left -= even) {
    UNROLL for (int i = 0; i < R * N; i++) sum[i] = V{};
    for (int64_t t = std::min(even, left); t > 0; t--) {
      V x[N];
      UNROLL for (int c = 0; c < N; c++) {
        V y = load(b + c * VW);
        KEEP_IN_REGISTER(y);
        x[c] = y;
      }
      UNROLL for (int r = 0; r < R; r++) {
        V y = all(a[r * row]);
        UNROLL for (int c = 0; c < N; c++) sum[r * N + c] += y * x[c];
      }
      a += step;
      b += width;
    }
    if (left <= even) break;
    UNROLL for (int i = 0; i < R * N; i++) before[i] = left == n ? sum[i] : before[i] + sum[i];
  }
  if (n > TERMS) UNROLL for (int i = 0; i < R * N; i++) sum[i] += before[i];
}

template <int N>
struct Size {
  static constexpr int value = N;
};

// f(vector, Size<N>) over [first, end), in strips of at most MOST vectors as even as can be.
template <int MOST = WIDEST, class F>
static INLINE void for_strips(int first, int end, F f) {
  while (first < end) {
    const int strips = (end - first + MOST - 1) / MOST, n = (end - first + strips - 1) / strips;
    switch (n) {
      case 1: f(first, Size<1>{}); break;
      case 2: f(first, Size<2>{}); break;
      case 3: f(first, Size<(MOST < 3 ? 1 : 3)>{}); break;
      default: f(first, Size<MOST>{});
    }
    first += n;
  }
}

// f(row, Size<R>) over n rows of keys, in groups of 6, then 3, then 1: who walks the keys in groups walks the same ones.
constexpr int GROUP = 6;
template <class F>
static INLINE void for_groups(int n, F f) {
  int r = 0;
  for (; r + GROUP <= n; r += GROUP) f(r, Size<GROUP>{});
  for (; r + GROUP / 2 <= n; r += GROUP / 2) f(r, Size<GROUP / 2>{});
  for (; r < n; r++) f(r, Size<1>{});
}
