// out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·|i − j| + bias) v_j over the visible keys j.
#include "tile.h"

static int64_t space_of(const Call& c) {
  const int64_t d = padded(c.head_dim), dv = padded(c.value_dim);
  return ((c.block + c.tile) * (d + dv) + c.block * (d + c.tile + 1) + 16 * 8) / 16 * 16;
}

// A task: a block of queries of one head. Neighbours share keys: all query heads of a key head, then the next rows.
struct Task {
  int64_t batch, head, kv_head, row, rows;

  Task(const Call& c, int64_t n) {
    const int64_t blocks = (c.q_len + c.block - 1) / c.block, group = c.q_heads / c.kv_heads;
    batch = n / (blocks * c.q_heads), kv_head = n / (blocks * group) % c.kv_heads;
    head = kv_head * group + n % group, row = n / group % blocks * c.block;
    rows = std::min(c.block, c.q_len - row);
  }
  std::pair<int64_t, int64_t> keys(const Call& c) const { return keys_of(c, c.kv_len - c.q_len + row, rows); }
};

// What `next` reads and writes, but for the keys that `now` reads.
static Ahead ahead_of(const Call& c, const Task& now, const Task& next) {
  auto [first, end] = next.keys(c);
  if (next.batch == now.batch && next.kv_head == now.kv_head) first = std::max(first, now.keys(c).second);
  Ahead ahead;
  ahead.add(c.q, c.type, next.batch, next.head, next.row, next.rows, c.head_dim);
  ahead.add(c.k, c.type, next.batch, next.kv_head, first, end - first, c.head_dim);
  ahead.add(c.v, c.type, next.batch, next.kv_head, first, end - first, c.value_dim);
  ahead.add(c.out, c.type, next.batch, next.head, next.row, next.rows, c.value_dim);
  return ahead;
}

static void attend(const Call& c, const Task& now, const Task& next, Space space) {
  const auto [batch, head, kv_head, row, n_rows] = now;
  const int64_t d = padded(c.head_dim), dv = padded(c.value_dim);
  Queries q = block_of(c, head, row);
  const bool direct = in_place(c.out, c.type, c.value_dim) && n_rows % VW == 0;
  float* out = direct ? (float*)row_of(c.out, c.type, batch, head, row) : space.take(c.block * dv);
  bool is_new = true;
  if (set_ids(c, batch, q, (int32_t*)space.take(c.block))) {
    float* transposed = space.take(c.block * d);
    Rows rows = rows_of(c.q, c.type, batch, head, row, n_rows, c.head_dim, space.take(c.block * d));
    transpose_rows(transposed, q.width, rows, n_rows, c.head_dim, c.scale);
    q.transposed = transposed;
    float *w = space.take(c.block * c.tile), *k_space = space.take(c.tile * d), *v_space = space.take(c.tile * dv);
    auto [first, end] = now.keys(c);
    Ahead ahead = ahead_of(c, now, next);
    ahead.spread((end - first + GROUP - 1) / GROUP);
    for (int64_t j = first; j < end; j += c.tile) {
      Tile t{q, j, (int)std::min(c.tile, end - j), (int)c.left, (int)c.right, nullptr};
      if (!meets(c, batch, t)) continue;
      weights(t, rows_of(c.k, c.type, batch, kv_head, j, t.keys, c.head_dim, k_space), c.head_dim, w, ahead);
      Rows v = rows_of(c.v, c.type, batch, kv_head, j, t.keys, c.value_dim, v_space);
      add_to_queries(t, w, v, c.value_dim, 1.f, is_new, out);
      is_new = false;
    }
  }
  if (is_new) std::fill(out, out + q.width * dv, 0.f);
  for (int i = 0; i < n_rows && !direct; i++)
    store_row(row_of(c.out, c.type, batch, head, row + i), out + i * dv, c.out.stride[3], c.value_dim, c.type);
}

extern "C" int64_t swat_forward_workspace(const Call* c) { return 4 * c->threads * space_of(*c); }

extern "C" void swat_forward(const Call* call) {
  const Call& c = *call;
  const int64_t tasks = c.batch * c.q_heads * ((c.q_len + c.block - 1) / c.block), space = space_of(c);
  on_large_pages(c.out, c.type, c.batch, c.q_heads, c.q_len, c.value_dim);
  // Runs long enough to find what was asked for ahead, short enough that threads end together.
  const int64_t run = std::min<int64_t>(8, std::max<int64_t>(1, tasks / (16 * c.threads)));
  share(c, tasks, run, [&](int64_t n, int64_t thread) {
    const int64_t next = (n + 1) % run ? n + 1 : n + 1 + run * (c.threads - 1);  // the others take a run each, most likely
    attend(c, {c, n}, {c, std::min(next, tasks - 1)}, {(float*)c.workspace + thread * space});
  });
}

extern "C" int swat_vector_width() { return VW; }
