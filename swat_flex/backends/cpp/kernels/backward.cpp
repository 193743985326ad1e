// Gradients of forward.cpp in one pass over the tiles, five products a tile, nothing kept from the forward:
//
//   w = σ(x)                dv_j += Σ_i w_ij g_i          dq_i = scale · Σ_j dx_ij k_j
//   dx = w (1 − w) ⟨g, v⟩   dk_j += scale · Σ_i dx_ij q_i  dslope = Σ dx |i − j|,  dbias = Σ dx
//
// A task is a chunk of query rows with all query heads of a key head. It owns the keys at its queries' positions and adds
// the other keys its windows reach to a margin of its own; who finishes a key head last adds the margins to their
// owners, in the order of the chunks. So the sums are the same to the bit whoever does which task when.
#include "tile.h"

constexpr int64_t TASKS = 64;  // wanted in a call: enough for many threads, few enough that margins stay small

struct Sums {
  V bias, slope;
};

// dx[key][query] = w (1 − w) · ⟨v_key, g_query⟩, 0 where hidden; `grads` is g transposed, [Dv, width].
static void logit_gradients(
    const Tile& t, Rows v, const float* grads, int64_t dim, const float* w, float* dx, Sums* sums) {
  const int64_t width = t.q.width;
  for_pieces(t, [&](int r, auto R, int c, auto N) {
    constexpr int rows = R.value, strip = N.value;
    V x[rows * strip];
    multiply<rows, strip>(x, v.at + r * v.width, v.width, 1, grads + c * VW, width, dim);
    UNROLL for (int i = 0; i < rows * strip; i++) {
      V s = load(w + (r + i / strip) * width + (c + i % strip) * VW);
      x[i] *= s * (all(1.f) - s);
    }
    if (t.is_cut(r, rows, c, strip))
      UNROLL for (int i = 0; i < rows * strip; i++)
        x[i] = t.sees(r + i / strip, c + i % strip) ? x[i] : V{};
    UNROLL for (int i = 0; i < rows * strip; i++) store(dx + (r + i / strip) * width + (c + i % strip) * VW, x[i]);
    if (sums) {
      V d = __builtin_convertvector(t.distance(c) - all(r), V);
      Sums piece{};  // of its own, for the same reason as a product's parts
      UNROLL for (int i = 0; i < rows * strip; i++) {
        piece.bias += x[i];
        piece.slope += x[i] * absolute(d + all((float)(i % strip * VW - i / strip)));
      }
      sums->bias += piece.bias, sums->slope += piece.slope;
    }
  });
}

// to[key] += factor · Σ over visible queries of w[key][query] · x[query]
static void add_to_keys(const Tile& t, const float* w, Rows x, int64_t dim, float factor, float* to) {
  const int64_t width = t.q.width, to_width = padded(dim);
  for_groups(t.keys, [&](int r, auto R) {
    auto [first, end] = t.queries(r, R.value);
    if (first >= end) return;
    for_strips(0, (int)(to_width / VW), [&, first = first, end = end](int c, auto N) {
      constexpr int rows = R.value, strip = N.value;
      V sum[rows * strip];
      multiply<rows, strip>(sum, w + r * width + first, width, 1, x.at + first * x.width + c * VW, x.width, end - first);
      UNROLL for (int i = 0; i < rows * strip; i++) {
        float* p = to + (r + i / strip) * to_width + (c + i % strip) * VW;
        store(p, load(p) + sum[i] * all(factor));
      }
    });
  });
}

// How a call is cut into tasks, and where the parts of the workspace lie; all of it follows from the sizes alone.
struct Plan {
  int64_t chunks, rows;  // of one key head; query rows in a chunk
  int64_t d, dv;         // padded
  int64_t before, after;  // rows of a margin
  bool k_in_place, v_in_place;
  int64_t space, margin, owned;  // floats: of a thread, of a task's margins, of a key head's sums not made in place

  explicit Plan(const Call& c) {
    const int64_t heads = c.batch * c.kv_heads, blocks = (c.q_len + c.block - 1) / c.block;
    const int64_t least = std::max((c.left + c.right) / 2, 4 * c.block);  // margins cost less than the rows' own work
    const int64_t most = std::max<int64_t>(1, c.q_len / least);
    const int64_t wanted = std::min(most, std::max<int64_t>(1, TASKS / heads));
    rows = (blocks + wanted - 1) / wanted * c.block;
    chunks = (c.q_len + rows - 1) / rows;
    d = padded(c.head_dim), dv = padded(c.value_dim);
    k_in_place = in_place(c.dk, c.type, c.head_dim), v_in_place = in_place(c.dv, c.type, c.value_dim);
    before = chunks == 1 ? 0 : std::min(c.left, c.kv_len), after = chunks == 1 ? 0 : std::min(c.right, c.kv_len);
    margin = (before + after) * (d + dv);
    owned = c.kv_len * ((k_in_place ? 0 : d) + (v_in_place ? 0 : dv));
    space = ((c.block * 2 + c.tile) * (d + dv) + c.block * (d + 2 * c.tile + 1) + 16 * 12) / 16 * 16;
  }
  int64_t tasks(const Call& c) const { return c.batch * c.kv_heads * chunks; }
};

// The keys' gradients of one key head.
struct KeyGradients {
  const Call& c;
  const Plan& p;
  float *dk, *dv, *margins;  // owned rows [kv_len, ·]; margins of chunk 0, then of chunk 1, …

  KeyGradients(const Call& c, const Plan& p, int64_t kv, float* margins, float* owned) : c(c), p(p) {
    const int64_t b = kv / c.kv_heads, h = kv % c.kv_heads;
    this->margins = margins + kv * p.chunks * p.margin;
    owned += kv * p.owned;
    dk = p.k_in_place ? (float*)row_of(c.dk, c.type, b, h, 0) : owned;
    dv = p.v_in_place ? (float*)row_of(c.dv, c.type, b, h, 0) : owned + (p.k_in_place ? 0 : c.kv_len * p.d);
  }
  // Keys [first, second) that a chunk owns: those at its queries' positions, and all earlier ones for the first.
  std::pair<int64_t, int64_t> own(int64_t chunk) const {
    const int64_t start = c.kv_len - c.q_len + chunk * p.rows;
    return {chunk ? start : 0, chunk + 1 < p.chunks ? start + p.rows : c.kv_len};
  }
  // Where chunk's sums for the keys from j lie: rows of dk and of dv.
  std::pair<float*, float*> at(int64_t chunk, int64_t j) const {
    auto [start, end] = own(chunk);
    if (j >= start && j < end) return {dk + j * p.d, dv + j * p.dv};
    float* margin = margins + chunk * p.margin;
    const int64_t row = j < start ? j - (start - p.before) : p.before + j - end;
    return {margin + row * p.d, margin + (p.before + p.after) * p.d + row * p.dv};
  }
  // The end of the keys from j that lie in one piece.
  int64_t piece(int64_t chunk, int64_t j) const {
    auto [start, end] = own(chunk);
    return j < start ? start : j < end ? end : c.kv_len;
  }
  void clear(int64_t chunk) const {
    auto [start, end] = own(chunk);
    std::fill(dk + start * p.d, dk + end * p.d, 0.f);
    std::fill(dv + start * p.dv, dv + end * p.dv, 0.f);
    std::fill(margins + chunk * p.margin, margins + (chunk + 1) * p.margin, 0.f);
  }
  // Margins to their owners, then to the gradients' own type.
  void finish(int64_t kv) const {
    for (int64_t chunk = 0; chunk < p.chunks; chunk++) {
      auto [start, end] = own(chunk);
      const int64_t first = std::max<int64_t>(0, start - p.before), last = std::min(c.kv_len, end + p.after);
      for (int64_t j = first; j < last; j++) {
        if (j == start) j = end;
        if (j >= last) break;
        auto [from_k, from_v] = at(chunk, j);
        for (int64_t n = 0; n < p.d; n += VW) store(dk + j * p.d + n, load(dk + j * p.d + n) + load(from_k + n));
        for (int64_t n = 0; n < p.dv; n += VW) store(dv + j * p.dv + n, load(dv + j * p.dv + n) + load(from_v + n));
      }
    }
    const int64_t b = kv / c.kv_heads, h = kv % c.kv_heads;
    for (int64_t j = 0; j < c.kv_len; j++) {
      if (!p.k_in_place)
        store_row(row_of(c.dk, c.type, b, h, j), dk + j * p.d, c.dk.stride[3], c.head_dim, c.type);
      if (!p.v_in_place)
        store_row(row_of(c.dv, c.type, b, h, j), dv + j * p.dv, c.dv.stride[3], c.value_dim, c.type);
    }
  }
};

// What the next block reads and writes: the next query head on the same keys, or the next rows and their further keys.
static Ahead ahead_of(const Call& c, const KeyGradients& to, int64_t batch, int64_t head, int64_t row, int64_t end) {
  const int64_t group = c.q_heads / c.kv_heads, kv_head = head / group, d = to.p.d, dv = to.p.dv;
  const bool same = (head + 1) % group != 0;
  head = same ? head + 1 : kv_head * group;
  if (!same) row += c.block;
  const int64_t rows = std::min(c.block, c.q_len - row);
  const int64_t more = same ? 0 : keys_of(c, c.kv_len - c.q_len + row, rows).second - end;
  Ahead ahead;
  ahead.add(c.q, c.type, batch, head, row, rows, c.head_dim);
  ahead.add(c.grad, c.type, batch, head, row, rows, c.value_dim);
  ahead.add(c.dq, c.type, batch, head, row, rows, c.head_dim);
  ahead.add(c.k, c.type, batch, kv_head, end, more, c.head_dim);
  ahead.add(c.v, c.type, batch, kv_head, end, more, c.value_dim);
  ahead.add(to.dk + end * d, more, d * 4, d * 4);
  ahead.add(to.dv + end * dv, more, dv * 4, dv * 4);
  return ahead;
}

// One block of queries of one head: dq whole, its part of dk, dv and of the head's two sums [slope, bias].
static void differentiate(
    const Call& c, const KeyGradients& to, int64_t chunk, int64_t batch, int64_t head, int64_t row, Space space,
    double* per_head) {
  const int64_t kv_head = head / (c.q_heads / c.kv_heads), d = to.p.d, dv = to.p.dv;
  Queries q = block_of(c, head, row);
  const bool direct = in_place(c.dq, c.type, c.head_dim) && q.rows % VW == 0;
  float* dq = direct ? (float*)row_of(c.dq, c.type, batch, head, row) : space.take(c.block * d);
  bool is_new = true;
  if (set_ids(c, batch, q, (int32_t*)space.take(c.block))) {
    float *transposed = space.take(c.block * d), *grads = space.take(c.block * dv);
    Rows q_rows = rows_of(c.q, c.type, batch, head, row, q.rows, c.head_dim, space.take(c.block * d));
    Rows g_rows = rows_of(c.grad, c.type, batch, head, row, q.rows, c.value_dim, space.take(c.block * dv));
    transpose_rows(transposed, q.width, q_rows, q.rows, c.head_dim, c.scale);
    transpose_rows(grads, q.width, g_rows, q.rows, c.value_dim, 1.f);
    q.transposed = transposed;
    float *w = space.take(c.block * c.tile), *dx = space.take(c.block * c.tile);
    float *k_space = space.take(c.tile * d), *v_space = space.take(c.tile * dv);
    auto [first, end] = keys_of(c, q.first, q.rows);
    Ahead ahead = ahead_of(c, to, batch, head, row, end);
    ahead.spread((end - first + GROUP - 1) / GROUP);
    int64_t next;
    for (int64_t j = first; j < end; j = next) {
      next = std::min({j + c.tile, end, to.piece(chunk, j)});
      Tile t{q, j, (int)(next - j), (int)c.left, (int)c.right, nullptr};
      if (!meets(c, batch, t)) continue;
      Rows k = rows_of(c.k, c.type, batch, kv_head, j, t.keys, c.head_dim, k_space);
      Rows v = rows_of(c.v, c.type, batch, kv_head, j, t.keys, c.value_dim, v_space);
      auto [dk_rows, dv_rows] = to.at(chunk, j);
      Sums sums{};
      weights(t, k, c.head_dim, w, ahead);
      add_to_keys(t, w, g_rows, c.value_dim, 1.f, dv_rows);
      logit_gradients(t, v, grads, c.value_dim, w, dx, per_head ? &sums : nullptr);
      add_to_keys(t, dx, q_rows, c.head_dim, c.scale, dk_rows);
      add_to_queries(t, dx, k, c.head_dim, c.scale, is_new, dq);
      is_new = false;
      if (per_head)
        for (int i = 0; i < VW; i++) per_head[0] += sums.slope[i], per_head[1] += sums.bias[i];
    }
  }
  if (is_new) std::fill(dq, dq + q.width * d, 0.f);
  for (int i = 0; i < q.rows && !direct; i++)
    store_row(row_of(c.dq, c.type, batch, head, row + i), dq + i * d, c.dq.stride[3], c.head_dim, c.type);
}

// Workspace: threads' spaces, margins, owned sums, then [tasks, group, 2] doubles.
extern "C" int64_t swat_backward_workspace(const Call* c) {
  const Plan p(*c);
  const int64_t heads = c->batch * c->kv_heads, group = c->q_heads / c->kv_heads;
  return 4 * (c->threads * p.space + p.tasks(*c) * p.margin + heads * p.owned) + 16 * p.tasks(*c) * group + 8;
}

extern "C" void swat_backward(const Call* call) {
  const Call& c = *call;
  const Plan p(c);
  const int64_t heads = c.batch * c.kv_heads, group = c.q_heads / c.kv_heads;
  on_large_pages(c.workspace, swat_backward_workspace(call));
  on_large_pages(c.dq, c.type, c.batch, c.q_heads, c.q_len, c.head_dim);
  on_large_pages(c.dk, c.type, c.batch, c.kv_heads, c.kv_len, c.head_dim);
  on_large_pages(c.dv, c.type, c.batch, c.kv_heads, c.kv_len, c.value_dim);
  float* margins = (float*)c.workspace + c.threads * p.space;
  float* owned = margins + p.tasks(c) * p.margin;
  double* partial = (double*)(owned + heads * p.owned);
  std::vector<std::atomic<int64_t>> left(heads);
  for (auto& n : left) n = p.chunks;
  share(c, p.tasks(c), 1, [&](int64_t task, int64_t thread) {
    const int64_t kv = task / p.chunks, chunk = task % p.chunks;
    const KeyGradients to(c, p, kv, margins, owned);
    double* sums = partial + task * group * 2;
    std::fill(sums, sums + group * 2, 0.);
    to.clear(chunk);
    for (int64_t row = chunk * p.rows; row < std::min(c.q_len, (chunk + 1) * p.rows); row += c.block)
      for (int64_t n = 0; n < group; n++)
        differentiate(
            c, to, chunk, kv / c.kv_heads, kv % c.kv_heads * group + n, row,
            {(float*)c.workspace + thread * p.space}, c.per_head ? sums + 2 * n : nullptr);
    if (--left[kv] == 0) to.finish(kv);
  });
  if (!c.per_head) return;
  for (int64_t head = 0; head < c.q_heads; head++) {
    double slope = 0, bias = 0;
    for (int64_t batch = 0; batch < c.batch; batch++)
      for (int64_t chunk = 0; chunk < p.chunks; chunk++) {
        const double* from = partial + (((batch * c.kv_heads + head / group) * p.chunks + chunk) * group + head % group) * 2;
        slope += from[0], bias += from[1];
      }
    c.per_head[head] = (float)slope, c.per_head[c.q_heads + head] = (float)bias;
  }
}
