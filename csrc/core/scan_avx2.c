/* The kernels for AVX2: 32 bytes a vector. It has no unsigned comparisons, so
 * they go by maxima, and no maxima of 64 bits. */
#include "core/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#endif

#define OG_OPERATIONS(W, SUFFIX, VALUE)                              \
    static inline __m256i load##W(const char *p)                     \
    {                                                                \
        return _mm256_loadu_si256((const __m256i *)(const void *)p); \
    }                                                                \
    static inline __m256i load_some##W(const char *p, int64_t n)     \
    {                                                                \
        char some[32] = {0};                                         \
        memcpy(some, p, (size_t)n * (W / 8));                        \
        return load##W(some);                                        \
    }                                                                \
    static inline __m256i fill##W(uint64_t value)                    \
    {                                                                \
        return _mm256_set1_##SUFFIX((VALUE)value);                   \
    }                                                                \
    static inline __m256i eq##W(__m256i a, __m256i b)                \
    {                                                                \
        return _mm256_cmpeq_epi##W(a, b);                            \
    }                                                                \
    static inline __m256i gt_s##W(__m256i a, __m256i b)              \
    {                                                                \
        return _mm256_cmpgt_epi##W(a, b);                            \
    }                                                                \
    static inline bool any##W(__m256i mask)                          \
    {                                                                \
        return _mm256_movemask_epi8(mask) != 0;                      \
    }

#define OG_MAXIMA(W)                                    \
    static inline __m256i smax##W(__m256i a, __m256i b) \
    {                                                   \
        return _mm256_max_epi##W(a, b);                 \
    }                                                   \
    static inline __m256i umax##W(__m256i a, __m256i b) \
    {                                                   \
        return _mm256_max_epu##W(a, b);                 \
    }                                                   \
    static inline __m256i ge_s##W(__m256i a, __m256i b) \
    {                                                   \
        return eq##W(smax##W(a, b), a);                 \
    }                                                   \
    static inline __m256i ge_u##W(__m256i a, __m256i b) \
    {                                                   \
        return eq##W(umax##W(a, b), a);                 \
    }                                                   \
    static inline __m256i gt_u##W(__m256i a, __m256i b) \
    {                                                   \
        return ~ge_u##W(b, a);                          \
    }

/* The findings of each lane, as wide as the lane. */
#define OG_FINDINGS(W)                                                \
    static inline __m256i findings##W(__m256i nan, __m256i positive,  \
                                      __m256i negative, uint8_t keep) \
    {                                                                 \
        __m256i all = (nan & fill##W(OG_FOUND_NAN)) |                 \
                      (positive & fill##W(OG_FOUND_POS_INF)) |        \
                      (negative & fill##W(OG_FOUND_NEG_INF));         \
        return all & fill##W(keep);                                   \
    }

OG_OPERATIONS(8, epi8, char)
OG_MAXIMA(8)
OG_FINDINGS(8)

static inline void
spread8(uint8_t *bits, __m256i nan, __m256i positive, __m256i negative,
        uint8_t keep)
{
    __m256i all = findings8(nan, positive, negative, keep);
    _mm256_storeu_si256((__m256i *)(void *)bits,
                        load8((const char *)bits) | all);
}

#define OG_W 8
#define OG_LANES 32
#define OG_VEC __m256i
#define OG_MASK __m256i
#include "core/scan_width.h"

OG_OPERATIONS(16, epi16, short)
OG_MAXIMA(16)
OG_FINDINGS(16)

/* Sixteen 16-bit lanes as bytes. */
static inline __m128i
bytes_of(__m256i all)
{
    return _mm_packus_epi16(_mm256_castsi256_si128(all),
                            _mm256_extracti128_si256(all, 1));
}

static inline void
spread16(uint8_t *bits, __m256i nan, __m256i positive, __m256i negative,
         uint8_t keep)
{
    __m128i *to = (__m128i *)(void *)bits;
    __m128i all = bytes_of(findings16(nan, positive, negative, keep));
    _mm_storeu_si128(to, _mm_loadu_si128(to) | all);
}

#define OG_W 16
#define OG_LANES 16
#define OG_VEC __m256i
#define OG_MASK __m256i
#include "core/scan_width.h"

OG_OPERATIONS(32, epi32, int)
OG_MAXIMA(32)
OG_FINDINGS(32)

static inline void
spread32(uint8_t *bits, __m256i nan, __m256i positive, __m256i negative,
         uint8_t keep)
{
    __m128i *to = (__m128i *)(void *)bits;
    __m256i all = findings32(nan, positive, negative, keep);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(all),
                                    _mm256_extracti128_si256(all, 1));
    words = _mm_packus_epi16(words, words);
    _mm_storel_epi64(to, _mm_loadl_epi64(to) | words);
}

#define OG_W 32
#define OG_LANES 8
#define OG_VEC __m256i
#define OG_MASK __m256i
#include "core/scan_width.h"

OG_OPERATIONS(64, epi64x, long long)

/* Maxima of the halves: an upper half that is as great as Inf's says that
 * something is there, not what. */
static inline __m256i
smax64(__m256i a, __m256i b)
{
    return smax32(a, b);
}

static inline __m256i
umax64(__m256i a, __m256i b)
{
    return umax32(a, b);
}

static inline __m256i
gt_u64(__m256i a, __m256i b)
{
    const __m256i half = fill64((uint64_t)1 << 63);
    return gt_s64(a ^ half, b ^ half);
}

static inline __m256i
ge_u64(__m256i a, __m256i b)
{
    return ~gt_u64(b, a);
}

static inline uint8_t
judge64(__m256i high, __m256i low, const og_format *f)
{
    const uint64_t sign = (uint64_t)1 << 31, upper = f->inf >> 32;
    __m256i positive = ge_s32(high, fill32(upper));
    __m256i negative = ge_u32(low, fill32(upper | sign));
    __m256i uppers = fill64(~(uint64_t)0 << 32);
    return any32((positive | negative) & uppers) ? OG_FOUND_UNSURE : 0;
}

static inline void
spread64(uint8_t *bits, __m256i nan, __m256i positive, __m256i negative,
         uint8_t keep)
{
    uint64_t lanes[4];
    __m256i all = (nan & fill64(OG_FOUND_NAN)) |
                  (positive & fill64(OG_FOUND_POS_INF)) |
                  (negative & fill64(OG_FOUND_NEG_INF));
    _mm256_storeu_si256((__m256i *)(void *)lanes, all & fill64(keep));
    for (int i = 0; i < 4; i++) {
        bits[i] |= (uint8_t)lanes[i];
    }
}

#define OG_W 64
#define OG_LANES 4
#define OG_VEC __m256i
#define OG_MASK __m256i
#define OG_HALVES
#include "core/scan_width.h"

/* --- Slots: 16 a vector -------------------------------------------------- */

/* The next slots of a row, n > 0 of them left, with zeros behind; *taken is
 * how many. n is even, as a row's capacity is. */
static inline __m256i
slots_at(const uint16_t *slots, int64_t n, int64_t *taken)
{
    const __m128i *at = (const __m128i *)(const void *)slots;
    int32_t pair;
    if (n >= 16) {
        *taken = 16;
        return load16((const char *)slots);
    }
    if (n >= 8) {
        *taken = 8;
        return _mm256_zextsi128_si256(_mm_loadu_si128(at));
    }
    if (n >= 4) {
        *taken = 4;
        return _mm256_zextsi128_si256(_mm_loadl_epi64(at));
    }
    *taken = 2;
    memcpy(&pair, slots, sizeof pair);
    return _mm256_zextsi128_si256(_mm_cvtsi32_si128(pair));
}

/* Which are errors that match. */
static inline __m256i
matching(__m256i x, __m256i mask, __m256i value)
{
    return ~eq16(x, fill16(0)) & eq16(x & mask, value);
}

static inline bool
row_has(const uint16_t *row, int64_t n, __m256i mask, __m256i value)
{
    int64_t i = 0, taken;
    for (; i + 64 <= n; i += 64) {
        const char *at = (const char *)(row + i);
        __m256i a = matching(load16(at), mask, value);
        __m256i b = matching(load16(at + 32), mask, value);
        __m256i c = matching(load16(at + 64), mask, value);
        __m256i d = matching(load16(at + 96), mask, value);
        if (any16(a | b | c | d)) {
            return true;
        }
    }
    __m256i found = fill16(0);
    for (; i < n; i += taken) {
        found |= matching(slots_at(row + i, n - i, &taken), mask, value);
    }
    return any16(found);
}

static bool
has(const uint16_t *slots, int64_t n, uint16_t mask, uint16_t value)
{
    return row_has(slots, n, fill16(mask), fill16(value));
}

static void
find(og_rows in, uint16_t mask, uint16_t value, bool inverse, bool *out,
     int64_t begin, int64_t end)
{
    const __m256i masks = fill16(mask), values = fill16(value);
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = (const uint16_t *)(in.data + r * in.stride);
        out[r] = row_has(row, in.capacity, masks, values) != inverse;
    }
}

static void
count(og_rows in, int32_t *out, int64_t begin, int64_t end)
{
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = (const uint16_t *)(in.data + r * in.stride);
        int32_t bytes = 0;
        for (int64_t i = 0, taken; i < in.capacity; i += taken) {
            __m256i x = slots_at(row + i, in.capacity - i, &taken);
            __m256i clean = eq16(x, fill16(0));
            bytes +=
                __builtin_popcount(~(unsigned)_mm256_movemask_epi8(clean));
        }
        out[r] = bytes / 2;
    }
}

/* Rows of one 64-bit word side by side, four at a time; returns where it
 * stopped. Lane by lane, the highest of a word's four slots meets in its
 * lowest. */
static int64_t
word_severities(const char *row, bool wide, void *out, int64_t r, int64_t end)
{
    const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    for (; r + 4 <= end; r += 4, row += 32) {
        __m256i all = _mm256_loadu_si256((const __m256i *)row) &
                      fill16(OG_SEVERITY_MASK);
        all = umax16(all, _mm256_srli_epi64(all, 32));
        all = umax16(all, _mm256_srli_epi64(all, 16));
        all &= _mm256_set1_epi64x(OG_SEVERITY_MASK);
        if (wide) {
            _mm256_storeu_si256((__m256i *)((int64_t *)out + r), all);
        }
        else {
            all = _mm256_permutevar8x32_epi32(all, even);
            _mm_storeu_si128((__m128i *)((int32_t *)out + r),
                             _mm256_castsi256_si128(all));
        }
    }
    return r;
}

static void
severity(og_rows in, bool wide, void *out, int64_t begin, int64_t end)
{
    if (in.capacity == 4 && in.stride == 8) {
        begin = word_severities(in.data + begin * 8, wide, out, begin, end);
    }
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = (const uint16_t *)(in.data + r * in.stride);
        __m256i all = fill16(0);
        for (int64_t i = 0, taken; i < in.capacity; i += taken) {
            __m256i x = slots_at(row + i, in.capacity - i, &taken);
            all = umax16(all, x & fill16(OG_SEVERITY_MASK));
        }
        int32_t level = any16(eq16(all, fill16(3)))   ? 3
                        : any16(eq16(all, fill16(2))) ? 2
                        : any16(eq16(all, fill16(1))) ? 1
                                                      : 0;
        if (wide) {
            ((int64_t *)out)[r] = level;
        }
        else {
            ((int32_t *)out)[r] = level;
        }
    }
}

const og_kernels og_kernels_avx2 = {
    .isa = "avx2",
    .fast = {fast8, fast16, fast32, fast64},
    .exact = {exact8, exact16, exact32, exact64},
    .each = {each8, each16, each32, each64},
    .outside = {outside8, outside16, outside32, outside64},
    .find = find,
    .count = count,
    .severity = severity,
    .has = has,
};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
