// A step of decoding: a few new queries against a ring of keys and values, each read once, in its own type.
//
//   out_i = Σ σ(scale·⟨q_i, k_j⟩ + slope·(i − j) + bias) v_j over 0 ≤ i − j < window
//
// Position p lies in slot p % slots. Of a batch row with `length` tokens the `live` newest, window + T − 1 at most, are
// seen by one of its T queries. Counted from the oldest of them, query t is live − T + t and key j is j.
//
// A task is a run of the live keys of one key head with all queries that share it. Its sums are a part of their own; who
// finishes a key head last adds its parts in the order of the keys. So the sums are the same to the bit whoever does
// which task when.
#include "block.h"
#include "call.h"

constexpr int PIECE = 16;                                // keys computed together: whole vectors
constexpr int64_t TASKS = 64, LEAST = 128, MOST = 1024;  // tasks wanted in a call; keys of a task, if there are so many

// How a call is cut; all of it follows from the sizes alone.
struct Cut {
  int64_t group, rows;  // query heads of a key head; queries that share it
  int64_t d, dv;        // padded
  int64_t splits;       // tasks of a key head
  int64_t space, part;  // floats: of a thread, of a task's sums

  explicit Cut(const Call& c) {
    const int64_t keys = c.left + c.q_len, wanted = std::max<int64_t>(1, TASKS / (c.batch * c.kv_heads));
    const int64_t share = std::min(std::max((keys + wanted - 1) / wanted, LEAST), MOST);
    group = c.q_heads / c.kv_heads, rows = group * c.q_len;
    d = padded(c.head_dim), dv = padded(c.value_dim);
    splits = (keys + share - 1) / share;
    space = rows * (d + PIECE) + PIECE * (d + dv) + 16 * 4;
    part = rows * dv;
  }
  // Keys of a task where so many are live.
  int64_t share(int64_t live) const {
    const int64_t even = std::max((live + splits - 1) / splits, LEAST);
    return (even + PIECE - 1) / PIECE * PIECE;
  }
};

// What the logits of one query need.
struct Query {
  int64_t position;
  float slope, bias;
};

static int64_t live_of(const Call& c, int64_t batch) { return std::min(c.length[batch], c.left + c.q_len); }

// f(row, Size<R>) over n queries, in groups of 4, then 2, then 1.
template <class F>
static INLINE void for_queries(int64_t n, F f) {
  int r = 0;
  for (; r + 4 <= n; r += 4) f(r, Size<4>{});
  for (; r + 2 <= n; r += 2) f(r, Size<2>{});
  for (; r < n; r++) f(r, Size<1>{});
}

// VW vectors to one: lane i is the sum of vector i's lanes, added in the same tree for every i.
static INLINE V sums(V (&x)[VW]) {
  UNROLL for (int n = VW / 2; n > 0; n /= 2)
    UNROLL for (int i = 0; i < n; i++) x[i] = zip_low(x[i], x[i + n]) + zip_high(x[i], x[i + n]);
  return x[0];
}

// w[query][key] = σ(logit) of R queries and the keys j … j + n − 1, 0 where hidden; past key n it does not matter.
template <int R>
static INLINE void weights(
    const Call& c, const Query* query, const float* q, int64_t d, Rows k, int64_t j, int n, float* w) {
  constexpr int K = 8 / R;  // keys in the register block
  V part[R][PIECE];
  for (int first = 0; first < (int)padded(n); first += K) {
    const float* at[K];
    UNROLL for (int i = 0; i < K; i++) at[i] = k.at + std::min(first + i, n - 1) * k.width;
    V sum[R * K]{};
    for (int64_t x = 0; x < d; x += VW) {
      V key[K];
      UNROLL for (int i = 0; i < K; i++) key[i] = load(at[i] + x);
      UNROLL for (int r = 0; r < R; r++) {
        V y = load(q + r * d + x);
        UNROLL for (int i = 0; i < K; i++) sum[r * K + i] += y * key[i];
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int i = 0; i < K; i++) part[r][first + i] = sum[r * K + i];
  }
  for (int r = 0; r < R; r++)
    for (int first = 0; first < n; first += VW) {
      const I distance = all((int32_t)(query[r].position - j) - first) - lanes();
      V x = sums(*(V(*)[VW])(part[r] + first));
      x = sigmoid(x + (__builtin_convertvector(distance, V) * all(query[r].slope) + all(query[r].bias)));
      if (c.q_len > 1) x = (distance >= all(0)) & (distance <= all((int32_t)c.left)) ? x : V{};
      store(w + r * PIECE + first, x);
    }
}

// total[query] += Σ over n keys of w[query][key] · v[key], of R queries.
template <int R>
static INLINE void add_values(const float* w, Rows v, int n, float* total, int64_t dv) {
  for_strips(0, (int)(dv / VW), [&](int x, auto N) {
    constexpr int strip = N.value;
    V sum[R * strip];
    multiply<R, strip>(sum, w, PIECE, 1, v.at + x * VW, v.width, n);
    UNROLL for (int i = 0; i < R * strip; i++) {
      float* p = total + i / strip * dv + (x + i % strip) * VW;
      store(p, load(p) + sum[i]);
    }
  });
}

// One task: total[query] = the sum over keys [j, end) of the live ones.
static void attend(const Call& c, const Cut& p, int64_t head, int64_t j, int64_t end, float* total, Space space) {
  const int64_t batch = head / c.kv_heads, kv_head = head % c.kv_heads, live = live_of(c, batch);
  const int64_t oldest = (c.length[batch] - live) % c.kv_len;
  float *q = space.take(p.rows * p.d), *w = space.take(p.rows * PIECE);
  float *k_space = space.take(PIECE * p.d), *v_space = space.take(PIECE * p.dv);
  std::vector<Query> query(p.rows);
  std::fill(total, total + p.part, 0.f);
  for (int64_t r = 0; r < p.rows; r++) {
    const int64_t t = r % c.q_len, h = kv_head * p.group + r / c.q_len;
    load_row(q + r * p.d, row_of(c.q, c.type, batch, h, t), c.q.stride[3], c.head_dim, c.type);
    for (int64_t x = 0; x < p.d; x++) q[r * p.d + x] *= c.scale;
    query[r] = {live - c.q_len + t, c.slopes ? c.slopes[h] : 0, c.logit_bias ? c.logit_bias[h] : 0};
  }
  for (int64_t n; j < end; j += n) {
    const int64_t slot = (oldest + j) % c.kv_len;
    n = std::min({(int64_t)PIECE, end - j, c.kv_len - slot});
    const Rows k = rows_of(c.k, c.type, batch, kv_head, slot, n, c.head_dim, k_space);
    const Rows v = rows_of(c.v, c.type, batch, kv_head, slot, n, c.value_dim, v_space);
    for_queries(p.rows, [&](int r, auto R) {
      weights<R.value>(c, query.data() + r, q + r * p.d, p.d, k, j, (int)n, w + r * PIECE);
      add_values<R.value>(w + r * PIECE, v, (int)n, total + r * p.dv, p.dv);
    });
  }
}

// Workspace: threads' spaces, then the parts [key heads, splits, rows, dv].
extern "C" int64_t swat_decode_workspace(const Call* c) {
  const Cut p(*c);
  return 4 * (c->threads * p.space + c->batch * c->kv_heads * p.splits * p.part);
}

extern "C" void swat_decode(const Call* call) {
  const Call& c = *call;
  const Cut p(c);
  const int64_t heads = c.batch * c.kv_heads;
  float* parts = (float*)c.workspace + c.threads * p.space;
  std::vector<std::atomic<int64_t>> left(heads);
  for (auto& n : left) n = p.splits;
  share(c, heads * p.splits, 1, [&](int64_t task, int64_t thread) {
    const int64_t head = task / p.splits, batch = head / c.kv_heads, live = live_of(c, batch), n = p.share(live);
    const int64_t first = task % p.splits * n;
    float *mine = parts + task * p.part, *total = parts + head * p.splits * p.part;
    if (first < live || first == 0)
      attend(c, p, head, first, std::min(live, first + n), mine, {(float*)c.workspace + thread * p.space});
    if (--left[head] > 0) return;
    for (int64_t i = 1; i * n < live; i++)
      for (int64_t x = 0; x < p.part; x += VW) store(total + x, load(total + x) + load(total + i * p.part + x));
    for (int64_t r = 0; r < p.rows; r++) {
      const int64_t h = head % c.kv_heads * p.group + r / c.q_len;
      char* to = row_of(c.out, c.type, batch, h, r % c.q_len);
      store_row(to, total + r * p.dv, c.out.stride[3], c.value_dim, c.type);
    }
  });
}
