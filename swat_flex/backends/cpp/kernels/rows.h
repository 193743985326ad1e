// Rows of a tensor to float32 and back: any strides, float32, bfloat16 or float16, padded with zeros to whole vectors.
#pragma once
#include "vector.h"

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

struct Tensor {  // [batch, head, row, column], strides in elements
  char* data;
  int64_t stride[4];
};

static INLINE int64_t size_of(Type type) { return type == FLOAT32 ? 4 : 2; }
static INLINE int64_t padded(int64_t n) { return (n + VW - 1) / VW * VW; }

static INLINE char* row_of(const Tensor& x, Type type, int64_t batch, int64_t head, int64_t row) {
  return x.data + size_of(type) * (batch * x.stride[0] + head * x.stride[1] + row * x.stride[2]);
}

static INLINE V widen(H x, Type type) {
  U u = __builtin_convertvector(x, U);
  if (type == BFLOAT16) return (V)(u << 16);
  U size = u & bits(0x7fff);
  U normal = (size << 13) + bits(112u << 23);
  normal = size >= bits(0x7c00) ? normal + bits(112u << 23) : normal;  // infinity and NaN
  U tiny = (U)(__builtin_convertvector((I)size, V) * all(0x1p-24f));
  return (V)((size < bits(0x400) ? tiny : normal) | (u & bits(0x8000)) << 16);
}

// To the nearest, ties to even; NaN stays NaN, what is too large becomes infinity.
static INLINE H narrow(V x, Type type) {
  U u = (U)x, size = u & bits(0x7fffffff);
  if (type == BFLOAT16) {
    U rounded = (u + bits(0x7fff) + (u >> 16 & bits(1))) >> 16;
    return __builtin_convertvector(size > bits(0x7f800000) ? (u >> 16 | bits(0x40)) : rounded, H);
  }
  U normal = (size + bits(0xfff) + (size >> 13 & bits(1)) - bits(112u << 23)) >> 13;
  U tiny = (U)((V)size + all(0.5f)) - bits(0x3f000000);  // the unit of 0.5's last place is float16's smallest number
  U h = size < bits(0x38800000) ? tiny : normal;
  h = size >= bits(0x477ff000) ? bits(0x7c00) : h;
  h = size > bits(0x7f800000) ? bits(0x7e00) : h;
  return __builtin_convertvector(h | (u >> 16 & bits(0x8000)), H);
}

static INLINE V load_16(const char* p, Type type) {
  H x;
  std::memcpy(&x, p, sizeof x);
  return widen(x, type);
}

static inline float load_one(const char* p, Type type) {
  if (type == FLOAT32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  H h{};
  std::memcpy(&h, p, 2);
  return widen(h, type)[0];
}

static inline void store_one(char* p, float x, Type type) {
  if (type == FLOAT32) {
    std::memcpy(p, &x, 4);
    return;
  }
  H h = narrow(all(x), type);
  std::memcpy(p, &h, 2);
}

// One row of `dim` elements to `to`, zeros up to the next whole vector.
static inline void load_row(float* to, const char* from, int64_t step, int64_t dim, Type type) {
  const int64_t whole = step == 1 ? dim / VW * VW : 0, size = size_of(type);
  for (int64_t d = dim / VW * VW; d < padded(dim); d += VW) store(to + d, V{});
  if (type == FLOAT32)
    for (int64_t d = 0; d < whole; d += VW) store(to + d, load((const float*)from + d));
  else
    for (int64_t d = 0; d < whole; d += VW) store(to + d, load_16(from + 2 * d, type));
  for (int64_t d = whole; d < dim; d++) to[d] = load_one(from + d * step * size, type);
}

static inline void store_row(char* to, const float* from, int64_t step, int64_t dim, Type type) {
  const int64_t whole = step == 1 ? dim / VW * VW : 0, size = size_of(type);
  for (int64_t d = 0; d < whole; d += VW) {
    V x = load(from + d);
    if (type == FLOAT32) {
      store((float*)to + d, x);
    } else {
      H h = narrow(x, type);
      std::memcpy(to + 2 * d, &h, sizeof h);
    }
  }
  for (int64_t d = whole; d < dim; d++) store_one(to + d * step * size, from[d], type);
}

// Float32 rows, one every `width` floats: where they lie if they can be read so, or copied to `space`.
//
// A vector is read to its end, so that rows in place need a dim of whole vectors; rows far apart would fall on the same
// few lines of the cache.
struct Rows {
  const float* at;
  int64_t width;
};
static INLINE bool in_place(const Tensor& x, Type type, int64_t dim) {
  return type == FLOAT32 && x.stride[3] == 1 && x.stride[2] == dim && dim % VW == 0;
}
static inline Rows rows_of(
    const Tensor& x, Type type, int64_t batch, int64_t head, int64_t first, int64_t n, int64_t dim, float* space) {
  const char* from = row_of(x, type, batch, head, first);
  if (in_place(x, type, dim)) return {(const float*)from, dim};
  const int64_t width = padded(dim);
  for (int64_t r = 0; r < n; r++)
    load_row(space + r * width, from + r * x.stride[2] * size_of(type), x.stride[3], dim, type);
  return {space, width};
}

// to[d][r] = factor · x[r][d] for `dim` columns d and `block` rows r (whole vectors), zeros from row n on.
static inline void transpose_rows(float* to, int64_t block, Rows x, int64_t n, int64_t dim, float factor) {
  for (int64_t r = 0; r < block; r += VW)
    for (int64_t d = 0; d < dim; d += VW) {
      V square[VW];
      if (r + VW <= n)
        UNROLL for (int i = 0; i < VW; i++) square[i] = load(x.at + (r + i) * x.width + d) * all(factor);
      else
        UNROLL for (int i = 0; i < VW; i++)
          square[i] = r + i < n ? load(x.at + (r + i) * x.width + d) * all(factor) : V{};
      transpose(square);
      UNROLL for (int i = 0; i < VW; i++) store(to + (d + i) * block + r, square[i]);
    }
}
