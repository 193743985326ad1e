// Vectors of float32 for AVX-512, AVX2, NEON and SSE from one text, by the compiler's vector extensions; and σ on them.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int VW = 16, WIDEST = 4;  // floats in a vector; vectors in a row of a register block
#define LOW_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
constexpr int VW = 8, WIDEST = 2;
#define LOW_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#if defined(__aarch64__)
constexpr int VW = 4, WIDEST = 4;
#else
constexpr int VW = 4, WIDEST = 2;
#endif
#define LOW_HALVES 0, 4, 1, 5
#define HIGH_HALVES 2, 6, 3, 7
#endif

#define INLINE inline __attribute__((always_inline))
// Left to itself, GCC reads a vector that up to four instructions use from memory for each of them.
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(x) asm("" : "+v"(x))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(x) asm("" : "+w"(x))
#else
#define KEEP_IN_REGISTER(x)
#endif
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("nounroll")
#else
#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1")
#endif

// aligned(4): loads and stores through these types need no more alignment than a float
typedef float V __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint32_t U __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef uint16_t H __attribute__((vector_size(VW * 2), aligned(2), may_alias));

static INLINE V all(float x) { return x - V{}; }
static INLINE I all(int32_t x) { return x - I{}; }
static INLINE U bits(uint32_t x) { return x - U{}; }
static INLINE V load(const float* p) { return *(const V*)p; }
static INLINE void store(float* p, V x) { *(V*)p = x; }

static INLINE V absolute(V x) { return (V)((U)x & bits(0x7fffffff)); }

static INLINE I lanes() {
  I x{};
  UNROLL for (int i = 0; i < VW; i++) x[i] = i;
  return x;
}

// Interleave the first (second) halves of a and b.
static INLINE V zip_low(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LOW_HALVES);
#else
  return __builtin_shuffle(a, b, I{LOW_HALVES});
#endif
}
static INLINE V zip_high(V a, V b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, HIGH_HALVES);
#else
  return __builtin_shuffle(a, b, I{HIGH_HALVES});
#endif
}

// VW vectors as the rows of a square, transposed: log2 VW rounds that each zip row r with row r + VW/2.
static INLINE void transpose(V (&x)[VW]) {
  UNROLL for (int round = 1; round < VW; round *= 2) {
    V y[VW];
    UNROLL for (int r = 0; r < VW / 2; r++) {
      y[2 * r] = zip_low(x[r], x[r + VW / 2]);
      y[2 * r + 1] = zip_high(x[r], x[r + VW / 2]);
    }
    UNROLL for (int r = 0; r < VW; r++) x[r] = y[r];
  }
}

// σ of a logit.
//
// With e = exp(−|x|), σ is 1/(1 + e) right of 0 and e/(1 + e) left of it, so e keeps its relative accuracy down to logits
// of −87. e = 2^a, a = −|x|·log2 e: the sum with 1.5·2^23 + 127 rounds a to an integer n and leaves n + 127 in its last
// bits, which shifted are the float 2^n, 0 for n = −127; a polynomial (minimax, relative error 2e-9) gives 2^(a − n), of
// an a − n exact to log2 e in two floats. A NaN stays one: it fails the comparison and passes through the polynomial.
// Each σ has a division of its own: one shared by two, 1/(a·b), would let an unseen key change its neighbour's weight.
static INLINE V sigmoid(V x) {
  V a = (V)((U)x | bits(0x80000000u));
  a = a < all(-88.f) ? all(-88.f) : a;
  V shifted = a * all(1.44269502f) + all(12583039.f);
  V f = a * all(1.44269502f) - (shifted - all(12583039.f)) + a * all(1.92596301e-8f);
  V p = all(1.5353362e-4f);
  p = p * f + all(1.3398875e-3f);
  p = p * f + all(9.6184369e-3f);
  p = p * f + all(5.5503324e-2f);
  p = p * f + all(2.4022648e-1f);
  p = p * f + all(6.9314718e-1f);
  p = p * f + all(1.f);
  V e = p * (V)((I)shifted << 23);
  return (x < all(0.f) ? e : all(1.f)) / (all(1.f) + e);
}
