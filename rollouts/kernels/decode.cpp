// The element-wise parts of a Llama decode step, fused: residual + norm, rotary + cache + attention, SwiGLU.
// Matrix products stay in torch (oneDNN).
#include <sys/mman.h>

#include "vectors.h"

template <class X, class D, class W, class O>
static void add_norm(X* x_NH, const D* delta_NH, const W* weight_H, O* out_NH, int64_t rows, int64_t hidden, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        X* x = x_NH + n * hidden;
        O* out = out_NH + n * hidden;
        vec squares{}, more{};
        for (int64_t i = 0; i < hidden; i += LANES) {
            vec v = load(x + i);
            if (delta_NH) { v += load(delta_NH + n * hidden + i); store(x + i, v); v = load(x + i); }
            if (i & LANES) more += v * v; else squares += v * v;
        }
        float factor = 1.0f / std::sqrt(sum(squares + more) / hidden + eps);
        for (int64_t i = 0; i < hidden; i += LANES) store(out + i, load(x + i) * factor * load(weight_H + i));
    }
}

template <class T>
static void gate(const T* gate_up_N2I, T* out_NI, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const T *g = gate_up_N2I + n * 2 * size, *u = g + size;
        T* out = out_NI + n * size;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            vec x = load(g + i);
            T act[LANES];
            store(act, x / (1.0f + exponential(-x)));  // rounded to T, as the unfused operation rounds
            store(out + i, load(act) * load(u + i));
        }
        for (; i < size; i++) {
            T act;
            float x = scalar(g[i]);
            put(&act, x / (1.0f + std::exp(-x)));
            put(out + i, scalar(act) * scalar(u[i]));
        }
    }
}

template <class T>
INLINE void rotate(const T* x, const float* cos_D, const float* sin_D, T* out, int size) {
    int half = size / 2;
    for (int i = 0; i < half; i++) {
        float a = scalar(x[i]), b = scalar(x[i + half]);
        put(out + i, a * cos_D[i] - b * sin_D[i]);
        put(out + i + half, b * cos_D[i + half] + a * sin_D[i + half]);
    }
}

// One query over the keys [blocks, D, 16] and values [capacity, D] of its head, positions first..last. The head after
// it, `ahead` elements on, is fetched meanwhile: each head's run is too short for the processor to see it coming.
template <class T, int C>
INLINE void attend_one(const T* q, const T* keys, const T* values, T* out, float* scores, int64_t first, int64_t last,
                       int64_t ahead, float scale) {
    constexpr int D = C * LANES, PER_LINE = 64 / (LANES * sizeof(T));
    ints lane{};
    for (int i = 0; i < LANES; i++) lane[i] = i;
    float query[D];
    for (int d = 0; d < D; d++) query[d] = scalar(q[d]) * scale;
    vec highest = all(-INFINITY);
    for (int64_t b = first / LANES; b <= last / LANES; b++) {
        const T* block = keys + b * LANES * D;
        vec part[4] = {};
        for (int d = 0; d < D; d += 4)
            for (int j = 0; j < 4; j++) {
                part[j] += query[d + j] * load(block + (d + j) * LANES);
                if ((d + j) % PER_LINE == 0) __builtin_prefetch(block + ahead + (d + j) * LANES, 0, 2);
            }
        ints t = lane + (int32_t)(b * LANES);
        vec score = (part[0] + part[1]) + (part[2] + part[3]);
        score = (t >= (int32_t)first) & (t <= (int32_t)last) ? score : all(-INFINITY);
        highest = score > highest ? score : highest;
        store(scores + b * LANES, score);
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top ? highest[i] : top;
    vec total{};
    for (int64_t b = first / LANES; b <= last / LANES; b++) {
        vec p = exponential(load(scores + b * LANES) - top);
        total += p;
        store(scores + b * LANES, p);
    }
    vec even[C] = {}, odd[C] = {};
    int64_t t = first;
    for (; t < last; t += 2)
        for (int c = 0; c < C; c++) {
            even[c] += scores[t] * load(values + t * D + c * LANES);
            odd[c] += scores[t + 1] * load(values + (t + 1) * D + c * LANES);
            for (int l = 0; l < 2; l += PER_LINE) __builtin_prefetch(values + ahead + t * D + (2 * c + l) * LANES, 0, 2);
        }
    if (t == last)
        for (int c = 0; c < C; c++) even[c] += scores[t] * load(values + t * D + c * LANES);
    float normal = 1.0f / sum(total);
    for (int c = 0; c < C; c++) store(out + c * LANES, (even[c] + odd[c]) * normal);
}

struct Sizes { int64_t rows, heads, kv_heads, head_size, capacity, position; };

template <class T, int C>
static void attend(const T* qkv, const float* cos_PD, const float* sin_PD, T* keys, T* values, const int64_t* start_N,
                   T* out, const Sizes& s, float scale) {
    constexpr int D = C * LANES;
    int64_t group = s.heads / s.kv_heads, width = (s.heads + 2 * s.kv_heads) * D, at = s.position;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < s.rows; n++)
        for (int64_t h = 0; h < s.kv_heads; h++) {
            static thread_local std::vector<float> scores;
            scores.resize(s.capacity);
            const T* row = qkv + n * width;
            const float *cos_D = cos_PD + (at - start_N[n]) * D, *sin_D = sin_PD + (at - start_N[n]) * D;
            T* key = keys + (n * s.kv_heads + h) * s.capacity * D;
            T* value = values + (n * s.kv_heads + h) * s.capacity * D;
            T turned[D];
            rotate(row + (s.heads + h) * D, cos_D, sin_D, turned, D);
            for (int d = 0; d < D; d++) key[((at / LANES) * D + d) * LANES + at % LANES] = turned[d];
            memcpy(value + at * D, row + (s.heads + s.kv_heads + h) * D, D * sizeof(T));
            for (int64_t g = h * group; g < (h + 1) * group; g++) {
                rotate(row + g * D, cos_D, sin_D, turned, D);
                attend_one<T, C>(turned, key, value, out + (n * s.heads + g) * D, scores.data(), start_N[n], at,
                                 s.capacity * D, scale);
            }
        }
}

template <class T>
static int attend_sized(const T* qkv, const float* cos_PD, const float* sin_PD, T* keys, T* values,
                        const int64_t* start_N, T* out, const Sizes& s, float scale) {
    if (s.head_size % LANES) return 1;
    switch (s.head_size / LANES) {
#define SIZE(C) case C: attend<T, C>(qkv, cos_PD, sin_PD, keys, values, start_N, out, s, scale); return 0;
        SIZE(1) SIZE(2) SIZE(3) SIZE(4) SIZE(5) SIZE(6) SIZE(8)
#undef SIZE
    }
    return 1;
}

extern "C" {
// Ask for large pages under a range not yet touched: fewer faults and page walks. Without them all works as before.
// `zeros`: the range was touched and holds zeros alone, so its pages are given back first and come again as zeros.
int rlmm_large_pages(void* memory, int64_t bytes, int zeros) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t PAGE = 4096;
    uintptr_t first = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, last = ((uintptr_t)memory + bytes) / PAGE * PAGE;
    if (last <= first || (zeros && madvise((void*)first, last - first, MADV_DONTNEED))) return 0;
    return madvise((void*)first, last - first, MADV_HUGEPAGE);
#else
    return 0;
#endif
}
int rlmm_add_norm(int delta_bf16, int out_bf16, float* x, const void* delta, const float* weight, void* out,
                  int64_t rows, int64_t hidden, float eps) {
    if (delta_bf16 && out_bf16) add_norm(x, (const bf16*)delta, weight, (bf16*)out, rows, hidden, eps);
    else if (delta_bf16) add_norm(x, (const bf16*)delta, weight, (float*)out, rows, hidden, eps);
    else if (out_bf16) add_norm(x, (const float*)delta, weight, (bf16*)out, rows, hidden, eps);
    else add_norm(x, (const float*)delta, weight, (float*)out, rows, hidden, eps);
    return 0;
}
int rlmm_add_norm_bf16(bf16* x, const bf16* delta, const bf16* weight, bf16* out, int64_t rows, int64_t hidden,
                       float eps) {
    add_norm(x, delta, weight, out, rows, hidden, eps);
    return 0;
}
int rlmm_gate(int is_bf16, const void* gate_up, void* out, int64_t rows, int64_t size) {
    if (is_bf16) gate((const bf16*)gate_up, (bf16*)out, rows, size);
    else gate((const float*)gate_up, (float*)out, rows, size);
    return 0;
}
int rlmm_attend(int is_bf16, const void* qkv, const float* cos_PD, const float* sin_PD, void* keys, void* values,
                const int64_t* start_N, void* out, int64_t rows, int64_t heads, int64_t kv_heads, int64_t head_size,
                int64_t capacity, int64_t position, float scale) {
    Sizes s{rows, heads, kv_heads, head_size, capacity, position};
    if (is_bf16)
        return attend_sized((const bf16*)qkv, cos_PD, sin_PD, (bf16*)keys, (bf16*)values, start_N, (bf16*)out, s, scale);
    return attend_sized((const float*)qkv, cos_PD, sin_PD, (float*)keys, (float*)values, start_N, (float*)out, s, scale);
}
}
