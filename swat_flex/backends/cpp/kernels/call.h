// One call as Python hands it over, and how its tasks are shared among threads.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "rows.h"

// GOMP_parallel of the OpenMP that torch itself runs on: f(data) on so many threads.
using Region = void (*)(void (*f)(void*), void* data, unsigned threads, unsigned flags);

struct Call {  // mirrored by library.py; strides and sizes in elements, lengths and window sides in tokens
  Tensor q, k, v, out, grad, dq, dk, dv;
  const float *slopes, *logit_bias;  // [q_heads] or null
  const int32_t* ids;                // [batch or 1, kv_len] or null
  const int64_t* length;             // [batch]: tokens in each row of a ring of kv_len slots
  float* per_head;                   // [2, q_heads] or null
  char* workspace;
  Region region;                     // null: threads of our own
  int64_t ids_stride, batch, q_heads, kv_heads, q_len, kv_len, head_dim, value_dim, left, right;
  int64_t threads, block, tile;  // queries of a block, a multiple of VW; keys of a tile
  float scale;
  Type type;
};

// Large pages for memory that the call is the first to write, where the system has them: faults for small ones would take
// a tenth of the time.
static void on_large_pages(const void* at, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t LARGE = 2 << 20;
  const uintptr_t first = ((uintptr_t)at + LARGE - 1) / LARGE * LARGE, end = ((uintptr_t)at + bytes) / LARGE * LARGE;
  if (first < end) madvise((void*)first, end - first, MADV_HUGEPAGE);
#endif
}
static void on_large_pages(const Tensor& x, Type type, int64_t batch, int64_t heads, int64_t rows, int64_t dim) {
  int64_t last = 0;
  for (auto [n, stride] : {std::pair{batch, x.stride[0]}, {heads, x.stride[1]}, {rows, x.stride[2]}, {dim, x.stride[3]}})
    last += (n - 1) * stride;
  on_large_pages(x.data, size_of(type) * (last + 1));
}

// Floats of one task's scratch space, handed out one array after the other, each on a cache line of its own.
struct Space {
  float* next;
  float* take(int64_t n) {
    float* start = next;
    next += (n + 15) / 16 * 16;
    return start;
  }
};

// f(task, thread) for every task, handed out in runs of neighbours. A thread more or less changes who does a task, not
// the task.
template <class F>
static void share(const Call& c, int64_t tasks, int64_t run, F f) {
  struct Shared {
    F& f;
    int64_t tasks, of_run;
    std::atomic<int64_t> task{0}, thread{0};
    static void run(void* data) {
      Shared& s = *(Shared*)data;
      const int64_t me = s.thread++;
      for (int64_t first; (first = s.task.fetch_add(s.of_run)) < s.tasks;)
        for (int64_t t = first; t < std::min(first + s.of_run, s.tasks); t++) s.f(t, me);
    }
  } shared{f, tasks, run};
  const int64_t threads = std::min(c.threads, (tasks + run - 1) / run);
  if (threads <= 1) {
    Shared::run(&shared);
  } else if (c.region) {
    c.region(Shared::run, &shared, (unsigned)threads, 0);
  } else {
    std::vector<std::thread> others;
    for (int64_t n = 1; n < threads; n++) others.emplace_back(Shared::run, &shared);
    Shared::run(&shared);
    for (std::thread& t : others) t.join();
  }
}
