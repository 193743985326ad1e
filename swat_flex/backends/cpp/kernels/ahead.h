// Rows that a thread needs for its next block, asked for line by line while it computes: they are in its cache by then.
#pragma once
#include <algorithm>

#include "rows.h"

class Ahead {
  static constexpr int64_t LINE = 64;
  struct Part {
    const char* at;
    int64_t rows, size, stride;  // bytes of a row and from row to row
  };
  Part parts[8];
  int first = 0, end = 0;
  int64_t lines = 0, share = 0, offset = 0;

 public:
  void add(const void* at, int64_t rows, int64_t size, int64_t stride) {
    if (rows <= 0) return;
    parts[end++] = stride == size ? Part{(const char*)at, 1, rows * size, 0} : Part{(const char*)at, rows, size, stride};
    lines += parts[end - 1].rows * ((parts[end - 1].size + LINE - 1) / LINE);
  }
  void add(const Tensor& x, Type type, int64_t batch, int64_t head, int64_t row, int64_t rows, int64_t dim) {
    if (x.stride[3] == 1)
      add(row_of(x, type, batch, head, row), rows, dim * size_of(type), x.stride[2] * size_of(type));
  }
  // All is asked for after so many calls of `ask`.
  void spread(int64_t calls) { share = (lines + calls - 1) / calls * LINE; }
  INLINE void ask() {
    for (int64_t left = share; left > 0 && first < end;) {
      Part& p = parts[first];
      const int64_t to = std::min(p.size, offset + left);
      left -= to - offset;
      for (; offset < to; offset += LINE) __builtin_prefetch(p.at + offset, 0, 2);
      if (to < p.size) return;
      offset = 0;
      p.at += p.stride;
      if (--p.rows == 0) first++;
    }
  }
};
