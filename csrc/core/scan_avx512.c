/* The kernels for AVX-512 (F, BW, VL): 64 bytes a vector, short ends by
 * masked loads, which do not touch what they leave out. */
#include "core/kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,popcnt"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,popcnt")
#endif

#define OG_OPERATIONS(W, MASK, VALUE)                                        \
    static inline __m512i load##W(const char *p)                             \
    {                                                                        \
        return _mm512_loadu_si512(p);                                        \
    }                                                                        \
    static inline __m512i load_some##W(const char *p, int64_t n)             \
    {                                                                        \
        return _mm512_maskz_loadu_epi##W((MASK)(((uint64_t)1 << n) - 1), p); \
    }                                                                        \
    static inline __m512i fill##W(uint64_t value)                            \
    {                                                                        \
        return _mm512_set1_epi##W((VALUE)value);                             \
    }                                                                        \
    static inline __m512i smax##W(__m512i a, __m512i b)                      \
    {                                                                        \
        return _mm512_max_epi##W(a, b);                                      \
    }                                                                        \
    static inline __m512i umax##W(__m512i a, __m512i b)                      \
    {                                                                        \
        return _mm512_max_epu##W(a, b);                                      \
    }                                                                        \
    static inline MASK gt_s##W(__m512i a, __m512i b)                         \
    {                                                                        \
        return _mm512_cmpgt_epi##W##_mask(a, b);                             \
    }                                                                        \
    static inline MASK ge_s##W(__m512i a, __m512i b)                         \
    {                                                                        \
        return _mm512_cmpge_epi##W##_mask(a, b);                             \
    }                                                                        \
    static inline MASK gt_u##W(__m512i a, __m512i b)                         \
    {                                                                        \
        return _mm512_cmpgt_epu##W##_mask(a, b);                             \
    }                                                                        \
    static inline MASK ge_u##W(__m512i a, __m512i b)                         \
    {                                                                        \
        return _mm512_cmpge_epu##W##_mask(a, b);                             \
    }                                                                        \
    static inline MASK eq##W(__m512i a, __m512i b)                           \
    {                                                                        \
        return _mm512_cmpeq_epi##W##_mask(a, b);                             \
    }                                                                        \
    static inline bool any##W(MASK mask)                                     \
    {                                                                        \
        return mask != 0;                                                    \
    }

/* spread: VEC holds as many bytes as there are lanes. */
#define OG_SPREAD(W, MASK, VEC, PREFIX, LOAD, STORE)                         \
    static inline void spread##W(uint8_t *bits, MASK nan, MASK positive,     \
                                 MASK negative, uint8_t keep)                \
    {                                                                        \
        VEC a = PREFIX##_maskz_set1_epi8(nan, OG_FOUND_NAN & keep);          \
        VEC b = PREFIX##_maskz_set1_epi8(positive, OG_FOUND_POS_INF & keep); \
        VEC c = PREFIX##_maskz_set1_epi8(negative, OG_FOUND_NEG_INF & keep); \
        STORE((void *)bits, LOAD((const void *)bits) | a | b | c);           \
    }

OG_OPERATIONS(8, __mmask64, char)
OG_SPREAD(8, __mmask64, __m512i, _mm512, _mm512_loadu_si512,
          _mm512_storeu_si512)
#define OG_W 8
#define OG_LANES 64
#define OG_VEC __m512i
#define OG_MASK __mmask64
#include "core/scan_width.h"

OG_OPERATIONS(16, __mmask32, short)
OG_SPREAD(16, __mmask32, __m256i, _mm256, _mm256_loadu_si256,
          _mm256_storeu_si256)
#define OG_W 16
#define OG_LANES 32
#define OG_VEC __m512i
#define OG_MASK __mmask32
#include "core/scan_width.h"

OG_OPERATIONS(32, __mmask16, int)
OG_SPREAD(32, __mmask16, __m128i, _mm, _mm_loadu_si128, _mm_storeu_si128)
#define OG_W 32
#define OG_LANES 16
#define OG_VEC __m512i
#define OG_MASK __mmask16
#include "core/scan_width.h"

OG_OPERATIONS(64, __mmask8, long long)
OG_SPREAD(64, __mmask8, __m128i, _mm, _mm_loadl_epi64, _mm_storel_epi64)
#define OG_W 64
#define OG_LANES 8
#define OG_VEC __m512i
#define OG_MASK __mmask8
#include "core/scan_width.h"

/* --- Slots: 32 a vector -------------------------------------------------- */

/* A vector of slots, and what is left of a row, zeros behind. */
static inline __m512i
slots_at(const uint16_t *slots)
{
    return load16((const char *)slots);
}

static inline __m512i
slots_left(const uint16_t *slots, int64_t n)
{
    return load_some16((const char *)slots, n);
}

/* Which are errors that match. */
static inline __mmask32
matching(__m512i x, __m512i mask, __m512i value)
{
    return _mm512_mask_cmpeq_epi16_mask(_mm512_test_epi16_mask(x, x), x & mask,
                                        value);
}

static inline bool
row_has(const uint16_t *row, int64_t n, __m512i mask, __m512i value)
{
    int64_t i = 0;
    for (; i + 128 <= n; i += 128) {
        __mmask32 a = matching(slots_at(row + i), mask, value);
        __mmask32 b = matching(slots_at(row + i + 32), mask, value);
        __mmask32 c = matching(slots_at(row + i + 64), mask, value);
        __mmask32 d = matching(slots_at(row + i + 96), mask, value);
        if ((a | b | c | d) != 0) {
            return true;
        }
    }
    __mmask32 found = 0;
    for (; i + 32 <= n; i += 32) {
        found |= matching(slots_at(row + i), mask, value);
    }
    if (i < n) {
        found |= matching(slots_left(row + i, n - i), mask, value);
    }
    return found != 0;
}

static bool
has(const uint16_t *slots, int64_t n, uint16_t mask, uint16_t value)
{
    return row_has(slots, n, fill16(mask), fill16(value));
}

/* Rows of up to 16 slots, the usual: half a vector each. */
static inline __m256i
small_row(const char *row, __mmask16 slots)
{
    return _mm256_maskz_loadu_epi16(slots, row);
}

/* Rows of one 64-bit word side by side, eight at a time; returns where it
 * stopped. */
static int64_t
find_in_words(const char *row, __m512i masks, __m512i values, bool inverse,
              bool *out, int64_t r, int64_t end)
{
    for (; r + 8 <= end; r += 8, row += 64) {
        __m512i x = _mm512_loadu_si512(row);
        __m512i found = _mm512_movm_epi16(_mm512_mask_cmpeq_epi16_mask(
            _mm512_test_epi16_mask(x, x), x & masks, values));
        __mmask8 rows = _mm512_test_epi64_mask(found, found);
        rows = inverse ? (__mmask8)~rows : rows;
        _mm_storel_epi64((__m128i *)(out + r),
                         _mm_maskz_set1_epi8((__mmask16)rows, 1));
    }
    return r;
}

static void
find(og_rows in, uint16_t mask, uint16_t value, bool inverse, bool *out,
     int64_t begin, int64_t end)
{
    const __m512i masks = fill16(mask), values = fill16(value);
    if (in.capacity == 4 && in.stride == 8) {
        begin = find_in_words(in.data + begin * 8, masks, values, inverse, out,
                              begin, end);
    }
    const char *row = in.data + begin * in.stride;
    if (in.capacity <= 16) {
        const __mmask16 slots = (__mmask16)((1u << in.capacity) - 1);
        const __m256i m = _mm512_castsi512_si256(masks);
        const __m256i v = _mm512_castsi512_si256(values);
        for (int64_t r = begin; r < end; r++, row += in.stride) {
            __m256i x = small_row(row, slots);
            __mmask16 found = _mm256_mask_cmpeq_epi16_mask(
                _mm256_test_epi16_mask(x, x), x & m, v);
            out[r] = (found != 0) != inverse;
        }
        return;
    }
    for (int64_t r = begin; r < end; r++, row += in.stride) {
        out[r] = row_has((const uint16_t *)row, in.capacity, masks, values) !=
                 inverse;
    }
}

static inline int32_t
row_count(const uint16_t *row, int64_t n)
{
    int32_t slots = 0;
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m512i x = slots_at(row + i);
        slots += __builtin_popcount(_mm512_test_epi16_mask(x, x));
    }
    if (i < n) {
        __m512i x = slots_left(row + i, n - i);
        slots += __builtin_popcount(_mm512_test_epi16_mask(x, x));
    }
    return slots;
}

static void
count(og_rows in, int32_t *out, int64_t begin, int64_t end)
{
    const char *row = in.data + begin * in.stride;
    if (in.capacity <= 16) {
        const __mmask16 slots = (__mmask16)((1u << in.capacity) - 1);
        for (int64_t r = begin; r < end; r++, row += in.stride) {
            __m256i x = small_row(row, slots);
            out[r] = __builtin_popcount(_mm256_test_epi16_mask(x, x));
        }
        return;
    }
    for (int64_t r = begin; r < end; r++, row += in.stride) {
        out[r] = row_count((const uint16_t *)row, in.capacity);
    }
}

/* The highest severity of a row. */
static inline int32_t
row_severity(const uint16_t *row, int64_t n)
{
    const __m512i mask = fill16(OG_SEVERITY_MASK);
    __m512i all = fill16(0);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        all = umax16(all, slots_at(row + i) & mask);
    }
    if (i < n) {
        all = umax16(all, slots_left(row + i, n - i) & mask);
    }
    __mmask32 high = _mm512_test_epi16_mask(all, fill16(2));
    __mmask32 low = _mm512_test_epi16_mask(all, fill16(1));
    return (high & low) != 0 ? 3 : high != 0 ? 2 : low != 0;
}

static inline int32_t
small_severity(__m256i x)
{
    __mmask16 high = _mm256_test_epi16_mask(x, _mm256_set1_epi16(2));
    __mmask16 low = _mm256_test_epi16_mask(x, _mm256_set1_epi16(1));
    return (high & low) != 0 ? 3 : high != 0 ? 2 : low != 0;
}

/* Rows of one 64-bit word side by side, eight at a time; returns where it
 * stopped. Lane by lane, the highest of a word's four slots meets in its
 * lowest. */
static int64_t
word_severities(const char *row, bool wide, void *out, int64_t r, int64_t end)
{
    for (; r + 8 <= end; r += 8, row += 64) {
        __m512i all = _mm512_loadu_si512(row) & fill16(OG_SEVERITY_MASK);
        all = umax16(all, _mm512_srli_epi64(all, 32));
        all = umax16(all, _mm512_srli_epi64(all, 16));
        all &= _mm512_set1_epi64(OG_SEVERITY_MASK);
        if (wide) {
            _mm512_storeu_si512((int64_t *)out + r, all);
        }
        else {
            _mm256_storeu_si256((__m256i *)((int32_t *)out + r),
                                _mm512_cvtepi64_epi32(all));
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
    const char *row = in.data + begin * in.stride;
    const __mmask16 few =
        (__mmask16)(in.capacity <= 16 ? (1u << in.capacity) - 1 : 0);
    for (int64_t r = begin; r < end; r++, row += in.stride) {
        int32_t level = few != 0
                            ? small_severity(small_row(row, few))
                            : row_severity((const uint16_t *)row, in.capacity);
        if (wide) {
            ((int64_t *)out)[r] = level;
        }
        else {
            ((int32_t *)out)[r] = level;
        }
    }
}

const og_kernels og_kernels_avx512 = {
    .isa = "avx512",
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
