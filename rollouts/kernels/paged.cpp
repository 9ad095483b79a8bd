// One new position a row over vLLM's paged cache, in the layout of its "vec" kernels: of every page and key head, keys
// [D, positions], then values [positions, D]. A page holds a multiple of 32 positions; every row has at least one.
#include <omp.h>
#include "vectors.h"

constexpr int64_t GROUP = 32, AHEAD = 2;

struct Pages {
    const int32_t* table_NP;
    int64_t width, page, kv_heads, head_size;

    // Elements before page p of row n and key head h.
    int64_t at(int64_t n, int64_t h, int64_t p) const {
        return (table_NP[n * width + p] * kv_heads + h) * 2 * page * head_size;
    }
};

// The sum of values, C vectors, in the order of `load_two`.
template <class T, int C>
INLINE void add_weighed(vec* sum, float weight, const T* value) {
    for (int c = 0; c < C; c += 2) {
        vec low, high;
        load_two(value + c * LANES, low, high);
        sum[c] += weight * low;
        sum[c + 1] += weight * high;
    }
}

// A query's softmax over the positions seen so far: the highest score, and what was summed relative to it.
template <int C>
struct Seen {
    float query[C * LANES], top = -INFINITY;
    vec total{}, even[C]{}, odd[C]{};
};

// One more group of positions: `count` of them (at most GROUP), keys [D, ...] with `stride` between rows, values [.., D].
// What lies `ahead` is fetched meanwhile in bfloat16 alone: in float32 the processor's own prefetching is faster.
template <class T, int C>
INLINE void see(Seen<C>& seen, const T* keys, int64_t stride, const T* values, int64_t count, int64_t ahead) {
    constexpr int D = C * LANES;
    constexpr bool FETCH = sizeof(T) == 2;  // then two vectors a line
    vec part[4] = {};
    for (int d = 0; d < D; d++) {
        vec low, high;
        load_two(keys + d * stride, low, high);
        part[d % 2 * 2] += seen.query[d] * low;
        part[d % 2 * 2 + 1] += seen.query[d] * high;
        if (FETCH) __builtin_prefetch(keys + d * stride + ahead, 0, 2);
    }
    vec score[2];
    for (int half = 0; half < 2; half++)
        score[half] = element<T>(half) < (int32_t)count ? part[half] + part[half + 2] : all(-INFINITY);
    vec larger = score[0] > score[1] ? score[0] : score[1];
    if (any_above(larger, seen.top)) {  // seldom after the first groups, so what follows need not wait for the highest
        float top = seen.top;
        for (int i = 0; i < LANES; i++) top = larger[i] > top ? larger[i] : top;
        vec less = exponential(all(seen.top - top));
        seen.total *= less;
        for (int c = 0; c < C; c++) { seen.even[c] *= less; seen.odd[c] *= less; }
        seen.top = top;
    }
    float weight[GROUP];
    for (int half = 0; half < 2; half++) {
        vec p = exponential(score[half] - seen.top);
        seen.total += p;
        store(weight + half * LANES, p);
    }
    int64_t t = 0;
    for (; t + 1 < count; t += 2) {
        add_weighed<T, C>(seen.even, weight[place<T>(t)], values + t * D);
        add_weighed<T, C>(seen.odd, weight[place<T>(t + 1)], values + (t + 1) * D);
        if (FETCH)
            for (int c = 0; c < C; c++) __builtin_prefetch(values + ahead + t * D + 2 * c * LANES, 0, 2);
    }
    if (t < count) add_weighed<T, C>(seen.even, weight[place<T>(t)], values + t * D);
}

struct Step {
    int64_t rows, heads, query_stride, key_stride, value_stride;
    const int32_t* length_N;
    float scale;
};

// Row n's key heads first..end-1. Pages come first and heads within them, since the heads of a page lie side by side:
// so the cache is read in pieces that are long enough for the processor to see the next one coming.
template <class T, int C>
static void attend_row(int64_t n, int64_t first, int64_t end, const T* q, const T* k, const T* v, T* cache, T* out,
                       const Pages& pages, const Step& s) {
    constexpr int D = C * LANES;
    static thread_local std::vector<Seen<C>> seen;
    int64_t group = s.heads / pages.kv_heads, last = s.length_N[n] - 1, off = last % pages.page;
    seen.assign((end - first) * group, Seen<C>{});
    for (int64_t g = 0; g < (end - first) * group; g++)
        for (int d = 0; d < D; d++)
            seen[g].query[d] = scalar(q[n * s.query_stride + (first * group + g) * D + d]) * s.scale;
    auto add = [&](int64_t h) {  // the new position
        T* here = cache + pages.at(n, h, last / pages.page);
        for (int d = 0; d < D; d++) here[d * pages.page + off] = k[n * s.key_stride + h * D + d];
        memcpy(here + (pages.page + off) * D, v + n * s.value_stride + h * D, D * sizeof(T));
    };
    constexpr bool LATE = sizeof(T) == 2;  // once what it is written into has been fetched; float32 fetches nothing
    for (int64_t h = first; h < end && !LATE; h++) add(h);
    for (int64_t p = 0; p <= last / pages.page; p++)
        for (int64_t h = first; h < end; h++) {
            const T* keys = cache + pages.at(n, h, p);
            if (LATE && p == last / pages.page) add(h);
            bool same = h + AHEAD < end || p == last / pages.page;
            int64_t next = h + AHEAD < end ? h + AHEAD : same ? h : first + (h + AHEAD - end) % (end - first);
            int64_t ahead = pages.at(n, next, same ? p : p + 1) - pages.at(n, h, p);
            for (int64_t t = 0; t < pages.page && p * pages.page + t <= last; t += GROUP) {
                int64_t left = last + 1 - p * pages.page - t;
                for (int64_t g = (h - first) * group; g < (h - first + 1) * group; g++)
                    see<T, C>(seen[g], keys + t, pages.page, keys + (pages.page + t) * D, left < GROUP ? left : GROUP, ahead);
            }
        }
    for (int64_t g = 0; g < (end - first) * group; g++) {
        float normal = 1.0f / sum(seen[g].total);
        T* mine = out + (n * s.heads + first * group + g) * D;
        for (int c = 0; c < C; c += 2)
            store_two(mine + c * LANES, (seen[g].even[c] + seen[g].odd[c]) * normal,
                      (seen[g].even[c + 1] + seen[g].odd[c + 1]) * normal);
    }
}

template <class T, int C>
static void attend_paged(const T* q, const T* k, const T* v, T* cache, T* out, const Pages& pages, const Step& s) {
    // A task is a row, or with few rows a key head of one; what is computed is the same.
    int64_t width = s.rows < omp_get_max_threads() ? 1 : pages.kv_heads;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t n = 0; n < s.rows; n++)
        for (int64_t h = 0; h < pages.kv_heads; h += width)
            attend_row<T, C>(n, h, h + width, q, k, v, cache, out, pages, s);
}

template <class T>
static int attend_paged_sized(const T* q, const T* k, const T* v, T* cache, T* out, const Pages& pages, const Step& s) {
    if (pages.head_size % LANES) return 1;
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
