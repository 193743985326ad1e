// A tile: a block of queries, which are the lanes of the vectors, times a run of keys, which are the rows.
#pragma once
#include "ahead.h"
#include "block.h"
#include "call.h"

// The queries of a tile and what their logits need.
struct Queries {
  int64_t first;    // position of the first; positions count keys
  int rows, width;  // queries, and the same rounded up to the width of a tile's rows
  const float* transposed;  // [D, width], times scale
  float slope, bias;        // of the head
  const int32_t* ids;       // [width], −1 for padding, or null
  int32_t lowest, highest;  // of the ids
};

struct Tile {
  const Queries& q;
  int64_t first;  // position of the first key
  int keys;
  int left, right;
  const int32_t* ids;  // of the keys, where some pair of the tile is hidden by its documents; else null

  // Queries [first, second) that any of R keys from row r sees.
  INLINE std::pair<int, int> queries(int r, int R) const {
    const int64_t j = first + r - q.first;
    return {(int)std::max<int64_t>(0, j - right), (int)std::min<int64_t>(q.rows, j + R + left)};
  }
  // Keys [first, second) that any of R queries from column i sees.
  INLINE std::pair<int, int> visible_keys(int i, int R) const {
    const int64_t p = q.first + i - first, end = p + std::max(0, std::min(R, q.rows - i));
    return {(int)std::max<int64_t>(0, p - left), (int)std::min<int64_t>(keys, end + right)};
  }
  // Whether a strip of N vectors from vector c holds a hidden pair in the R rows from r.
  INLINE bool is_cut(int r, int R, int c, int N) const {
    const int64_t d = q.first + c * VW - first - r;
    return ids || d + N * VW - 1 > left || d - (R - 1) < -right;
  }
  INLINE I distance(int c) const { return all((int32_t)(q.first - first) + c * VW) + lanes(); }
  INLINE I sees(int r, int c) const {
    I d = distance(c) - all(r);
    I m = (d <= all(left)) & (d >= all(-right));
    if (ids) m &= *(const I*)(q.ids + c * VW) == all(ids[r] < 0 ? -2 : ids[r]);
    return m;
  }
};

// f(r, Size<R>, c, Size<N>) over the pieces of a tile that hold a visible pair.
template <class F>
static INLINE void for_pieces(const Tile& t, F f) {
  for_groups(t.keys, [&](int r, auto R) {
    auto [first, end] = t.queries(r, R.value);
    if (first < end) for_strips(first / VW, (end - 1) / VW + 1, [&](int c, auto N) { f(r, R, c, N); });
  });
}

// w[key][query] = σ(logit), 0 where hidden.
static void weights(const Tile& t, Rows k, int64_t dim, float* w, Ahead& ahead) {
  const int64_t width = t.q.width;
  for_pieces(t, [&](int r, auto R, int c, auto N) {
    constexpr int rows = R.value, strip = N.value;
    ahead.ask();
    V x[rows * strip];
    multiply<rows, strip>(x, k.at + r * k.width, k.width, 1, t.q.transposed + c * VW, width, dim);
    float* to = w + r * width + c * VW;
    UNROLL for (int i = 0; i < rows * strip; i++) store(to + i / strip * width + i % strip * VW, x[i]);
    V d = __builtin_convertvector(t.distance(c) - all(r), V);
    const bool cut = t.is_cut(r, rows, c, strip);
    ROLLED for (int i = 0; i < rows; i++, to += width, d -= all(1.f))  // σ's constants find no room beside all of x
      UNROLL for (int n = 0; n < strip; n++) {
        V s = load(to + n * VW) + (absolute(d + all((float)(n * VW))) * all(t.q.slope) + all(t.q.bias));
        s = sigmoid(s);
        if (cut) s = t.sees(r + i, c + n) ? s : V{};
        store(to + n * VW, s);
      }
  });
}

// Query rows that share a pass over x: they divide a vector's lanes, so that one vector holds all their weights. And the
// vectors of their register block, as wide as the registers allow.
constexpr int QUERY_ROWS = 4, QUERY_STRIP = WIDEST < 4 ? 3 : 4;

// to[query] += factor · Σ over visible keys of w[key][query] · x[key], or = where `to` is new: the output, q's gradient.
static __attribute__((noinline)) void add_to_queries(
    const Tile& t, const float* w, Rows x, int64_t dim, float factor, bool is_new, float* to) {
  const int64_t width = t.q.width, to_width = padded(dim);
  for_strips<QUERY_STRIP>(0, (int)(to_width / VW), [&](int c, auto N) {
    constexpr int strip = N.value, R = QUERY_ROWS;
    for (int i = 0; i < t.q.width; i += R) {
      auto [first, end] = t.visible_keys(i, R);
      float* p = to + i * to_width + c * VW;
      V sum[R * strip];  // of this tile alone: a sum of sums loses less to rounding than one long one
      multiply<R, strip>(sum, w + first * width + i, 1, width, x.at + first * x.width + c * VW, x.width, end - first);
      UNROLL for (int n = 0; n < R * strip; n++) {
        float* total = p + n / strip * to_width + n % strip * VW;
        store(total, is_new ? sum[n] * all(factor) : load(total) + sum[n] * all(factor));
      }
    }
  });
}

// The part of a call's block of queries that does not depend on the tile; false where all of them are padding.
static bool set_ids(const Call& c, int64_t batch, Queries& q, int32_t* ids) {
  if (!c.ids) return true;
  const int32_t* from = c.ids + batch * c.ids_stride + q.first;
  q.ids = ids;
  q.lowest = q.highest = -1;
  for (int i = 0; i < q.width; i++) {
    ids[i] = i < q.rows && from[i] >= 0 ? from[i] : -1;
    q.highest = std::max(q.highest, ids[i]);
  }
  q.lowest = *std::min_element(ids, ids + q.rows);
  return q.highest >= 0;
}

// Sets a tile's ids where they matter; false where no id of its keys meets one of its queries.
static bool meets(const Call& c, int64_t batch, Tile& t) {
  if (!c.ids) return true;
  const int32_t* ids = c.ids + batch * c.ids_stride + t.first;
  auto [lowest, highest] = std::minmax_element(ids, ids + t.keys);
  if (*highest < std::max(t.q.lowest, 0) || *lowest > t.q.highest) return false;
  if (*lowest != *highest || t.q.lowest != t.q.highest) t.ids = ids;
  return true;
}

static Queries block_of(const Call& c, int64_t head, int64_t row) {
  const int rows = (int)std::min(c.block, c.q_len - row);
  const float slope = c.slopes ? c.slopes[head] : 0, bias = c.logit_bias ? c.logit_bias[head] : 0;
  return {c.kv_len - c.q_len + row, rows, (int)padded(rows), nullptr, slope, bias, nullptr, 0, 0};
}

// Positions [first, second) of the keys that so many queries from a position see.
static INLINE std::pair<int64_t, int64_t> keys_of(const Call& c, int64_t first, int64_t rows) {
  return {std::max<int64_t>(0, first - c.left), std::min(c.kv_len, first + rows + c.right)};
}
