// One new position a row over vLLM's paged cache, in the layout of its "vec" kernels: of every page and key head, keys
// [D, positions], then values [positions, D]. A page holds a multiple of 32 positions; every row has at least one.
#include "vectors.h"

constexpr int64_t GROUP = 32;

struct Pages {
    const int32_t* table_NP;
    int64_t width, page, kv_heads, head_size;

    // Elements before page p of row n and key head h.
    int64_t at(int64_t n, int64_t h, int64_t p) const {
        return (table_NP[n * width + p] * kv_heads + h) * 2 * page * head_size;
    }
};

// A query over positions 0..last. `next` gives where each page of the head after it starts: that is fetched meanwhile,
// since a page is too short for the processor to see the next one coming.
template <class T, int C, class Place, class Next>
INLINE void attend_paged_one(const float* query, const T* cache, Place place, Next next, int64_t page, int64_t last, T* out,
                             float* scores) {
    constexpr int D = C * LANES, PER_LINE = 64 / (LANES * sizeof(T));
    int64_t groups = last / GROUP + 1, in_page = page / GROUP;
    ints lane{};
    for (int i = 0; i < LANES; i++) lane[i] = i;
    vec highest = all(-INFINITY);
    for (int64_t g = 0; g < groups; g++) {
        const T* keys = cache + place(g / in_page) + (g % in_page) * GROUP;
        const T* ahead = cache + next(g / in_page) + (g % in_page) * GROUP;
        vec part[4] = {};
        for (int d = 0; d < D; d += 2)
            for (int j = 0; j < 4; j++) {
                int64_t place_in = (d + j / 2) * page + (j % 2) * LANES;
                part[j] += query[d + j / 2] * load(keys + place_in);
                if (j % PER_LINE == 0) __builtin_prefetch(ahead + place_in, 0, 2);
            }
        for (int half = 0; half < 2; half++) {
            ints t = lane + (int32_t)(g * GROUP + half * LANES);
            vec score = part[half] + part[half + 2];
            score = t <= (int32_t)last ? score : all(-INFINITY);
            highest = score > highest ? score : highest;
            store(scores + g * GROUP + half * LANES, score);
        }
    }
    float top = highest[0];
    for (int i = 1; i < LANES; i++) top = highest[i] > top ? highest[i] : top;
    vec total{};
    for (int64_t t = 0; t < groups * GROUP; t += LANES) {
        vec p = exponential(load(scores + t) - top);
        total += p;
        store(scores + t, p);
    }
    vec even[C] = {}, odd[C] = {};
    for (int64_t first = 0; first <= last; first += page) {
        const T* values = cache + place(first / page) + page * D;
        const T* ahead = cache + next(first / page) + page * D;
        int64_t count = last + 1 - first < page ? last + 1 - first : page, t = 0;
        for (; t + 1 < count; t += 2)
            for (int c = 0; c < C; c++) {
                even[c] += scores[first + t] * load(values + t * D + c * LANES);
                odd[c] += scores[first + t + 1] * load(values + (t + 1) * D + c * LANES);
                for (int l = 0; l < 2; l += PER_LINE) __builtin_prefetch(ahead + t * D + (2 * c + l) * LANES, 0, 2);
            }
        if (t < count)
            for (int c = 0; c < C; c++) even[c] += scores[first + t] * load(values + t * D + c * LANES);
    }
    float normal = 1.0f / sum(total);
    for (int c = 0; c < C; c++) store(out + c * LANES, (even[c] + odd[c]) * normal);
}

struct Step {
    int64_t rows, heads, query_stride, key_stride, value_stride;
    const int32_t* length_N;
    float scale;
};

template <class T, int C>
static void attend_paged(const T* q, const T* k, const T* v, T* cache, T* out, const Pages& pages, const Step& s) {
    constexpr int D = C * LANES;
    int64_t group = s.heads / pages.kv_heads;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < s.rows; n++)
        for (int64_t h = 0; h < pages.kv_heads; h++) {
            static thread_local std::vector<float> scores;
            int64_t last = s.length_N[n] - 1, off = last % pages.page;
            scores.resize((last / GROUP + 1) * GROUP);
            auto place = [&](int64_t p) { return pages.at(n, h, p); };
            bool same = h + 1 < pages.kv_heads;
            int64_t row = same || n + 1 == s.rows ? n : n + 1, head = same ? h + 1 : 0;
            int64_t held = (s.length_N[row] - 1) / pages.page;
            auto next = [&](int64_t p) { return pages.at(row, head, p < held ? p : held); };
            T* here = cache + place(last / pages.page);
            for (int d = 0; d < D; d++) here[d * pages.page + off] = k[n * s.key_stride + h * D + d];
            memcpy(here + (pages.page + off) * D, v + n * s.value_stride + h * D, D * sizeof(T));
            for (int64_t g = h * group; g < (h + 1) * group; g++) {
                float query[D];
                for (int d = 0; d < D; d++) query[d] = scalar(q[n * s.query_stride + g * D + d]) * s.scale;
                attend_paged_one<T, C>(query, cache, place, next, pages.page, last, out + (n * s.heads + g) * D,
                                       scores.data());
            }
        }
}

template <class T>
static int attend_paged_sized(const T* q, const T* k, const T* v, T* cache, T* out, const Pages& pages, const Step& s) {
    switch (pages.head_size / LANES) {
#define SIZE(C) case C: attend_paged<T, C>(q, k, v, cache, out, pages, s); return 0;
        SIZE(2) SIZE(4) SIZE(6) SIZE(8)
#undef SIZE
    }
    return 1;
}

extern "C" int rlmm_attend_paged(int is_bf16, const void* q, const void* k, const void* v, void* cache, void* out,
                                 const int32_t* table_NP, const int32_t* length_N, int64_t rows, int64_t heads,
                                 int64_t kv_heads, int64_t head_size, int64_t page, int64_t width, int64_t query_stride,
                                 int64_t key_stride, int64_t value_stride, float scale) {
    Pages pages{table_NP, width, page, kv_heads, head_size};
    Step step{rows, heads, query_stride, key_stride, value_stride, length_N, scale};
    if (is_bf16)
        return attend_paged_sized((const bf16*)q, (const bf16*)k, (const bf16*)v, (bf16*)cache, (bf16*)out, pages, step);
    return attend_paged_sized((const float*)q, (const float*)k, (const float*)v, (float*)cache, (float*)out, pages, step);
}
