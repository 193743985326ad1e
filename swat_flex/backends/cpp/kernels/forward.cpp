// out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·|i − j| + bias) v_j over the visible keys j.
#include "tile.h"

static int64_t space_of(const Call& c) {
  const int64_t d = padded(c.head_dim), dv = padded(c.value_dim);
  return ((c.block + c.tile) * (d + dv) + c.block * (d + c.tile + 1) + 16 * 8) / 16 * 16;
}

static void attend(const Call& c, int64_t batch, int64_t head, int64_t row, Space space) {
  const int64_t kv_head = head / (c.q_heads / c.kv_heads), d = padded(c.head_dim), dv = padded(c.value_dim);
  Queries q = block_of(c, head, row);
  float* out = space.take(c.block * dv);
  std::fill(out, out + q.width * dv, 0.f);
  if (set_ids(c, batch, q, (int32_t*)space.take(c.block))) {
    float* transposed = space.take(c.block * d);
    Rows rows = rows_of(c.q, c.type, batch, head, row, q.rows, c.head_dim, space.take(c.block * d));
    transpose_rows(transposed, q.width, rows, q.rows, c.head_dim, c.scale);
    q.transposed = transposed;
    float *w = space.take(c.block * c.tile), *k_space = space.take(c.tile * d), *v_space = space.take(c.tile * dv);
    auto [first, end] = keys_of(c, q.first, q.rows);
    for (int64_t j = first; j < end; j += c.tile) {
      Tile t{q, j, (int)std::min(c.tile, end - j), (int)c.left, (int)c.right, nullptr};
      if (!meets(c, batch, t)) continue;
      weights(t, rows_of(c.k, c.type, batch, kv_head, j, t.keys, c.head_dim, k_space), c.head_dim, w);
      Rows v = rows_of(c.v, c.type, batch, kv_head, j, t.keys, c.value_dim, v_space);
      add_to_queries(t, w, v, c.value_dim, out);
    }
  }
  for (int i = 0; i < q.rows; i++)
    store_row(row_of(c.out, c.type, batch, head, row + i), out + i * dv, c.out.stride[3], c.value_dim, 1.f, c.type);
}

extern "C" int64_t swat_forward_workspace(const Call* c) { return 4 * c->threads * space_of(*c); }

extern "C" void swat_forward(const Call* call) {
  const Call& c = *call;
  const int64_t blocks = (c.q_len + c.block - 1) / c.block, space = space_of(c);
  share(c, c.batch * c.q_heads * blocks, [&](int64_t task, int64_t thread) {
    const int64_t head = task / blocks;
    attend(c, head / c.q_heads, head % c.q_heads, task % blocks * c.block, {(float*)c.workspace + thread * space});
  });
}

extern "C" int swat_vector_width() { return VW; }
