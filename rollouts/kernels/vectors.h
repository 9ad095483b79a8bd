// Vectors of 16 floats, the compiler's own, split where registers are narrower, and bfloat16 as they are stored.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t bf16;

INLINE vec load(const float* p) { vec v; memcpy(&v, p, sizeof v); return v; }
INLINE vec load(const bf16* p) {
    halves h; memcpy(&h, p, sizeof h);
    return (vec)(__builtin_convertvector(h, uints) << 16);
}
INLINE void store(float* p, vec v) { memcpy(p, &v, sizeof v); }

// 2 * LANES elements in the order that takes the fewest operations: of float the first half and the second, of bfloat16
// the even ones and the odd ones. `place` is where element t of them lies in the two, and `element` the reverse.
INLINE void load_two(const float* p, vec& a, vec& b) { a = load(p); b = load(p + LANES); }
INLINE void load_two(const bf16* p, vec& a, vec& b) {
    uints u; memcpy(&u, p, sizeof u);
    a = (vec)(u << 16); b = (vec)(u & 0xffff0000u);
}
INLINE void store_two(float* p, vec a, vec b) { store(p, a); store(p + LANES, b); }
INLINE void store_two(bf16* p, vec a, vec b) {  // to nearest, ties to even
    uints x = (uints)a, y = (uints)b;
    uints u = ((x + 0x7fffu + ((x >> 16) & 1u)) >> 16) | ((y + 0x7fffu + ((y >> 16) & 1u)) & 0xffff0000u);
    memcpy(p, &u, sizeof u);
}
template <class T> constexpr int64_t place(int64_t t) { return sizeof(T) == 2 ? t % 2 * LANES + t / 2 : t; }
template <class T> INLINE ints element(int half) {
    ints found{};
    for (int i = 0; i < LANES; i++) found[i] = sizeof(T) == 2 ? 2 * i + half : half * LANES + i;
    return found;
}

INLINE bool any_above(vec v, float x) {
#ifdef __AVX512F__
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
#else
    for (int i = 0; i < LANES; i++) if (v[i] > x) return true;
    return false;
#endif
}

INLINE halves rounded(vec v) {  // to nearest, ties to even
    uints u = (uints)v;
    return __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, halves);
}
INLINE float scalar(float x) { return x; }
INLINE float scalar(bf16 x) { uint32_t u = (uint32_t)x << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) {
    uint32_t u; memcpy(&u, &x, 4);
    *p = (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
INLINE vec all(float x) { return vec{} + x; }
INLINE float sum(vec v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }

#ifdef __AVX512BF16__
INLINE void narrow(bf16* p, vec v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v)); }
#else
INLINE void narrow(bf16* p, vec v) { halves h = rounded(v); memcpy(p, &h, sizeof h); }
#endif
INLINE void store(bf16* p, vec v) { narrow(p, v); }

// e^x to about 1 ulp (Cephes): 2^n times a polynomial of the rest; 0 below the smallest normal float.
INLINE vec exponential(vec x) {
    vec bounded = x > 88.0f ? all(88.0f) : x;
    vec y = bounded < -87.0f ? all(-87.0f) : bounded;
    vec shifted = y * 1.44269504f + 12582912.0f;  // rounds to an integer in the low mantissa bits
    vec n = shifted - 12582912.0f;
    vec r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f; p = p * r * r + r + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return x < -87.0f ? vec{} : p * (vec)power;
}
