/* The kernels in plain C: the reference of the others, and what does their
 * short ends. Loads go by memcpy, because runs have any alignment. */
#include "core/kernels.h"

#include <string.h>

#define SCALAR_KERNELS(W)                                                     \
    static inline uint##W##_t load##W(const void *run, int64_t i)             \
    {                                                                         \
        uint##W##_t x;                                                        \
        memcpy(&x, (const char *)run + i * (int64_t)sizeof x, sizeof x);      \
        return x;                                                             \
    }                                                                         \
                                                                              \
    static inline uint8_t found##W(uint##W##_t x, const og_format *f)         \
    {                                                                         \
        const uint##W##_t sign = (uint##W##_t)1 << (W - 1);                   \
        const uint##W##_t inf = (uint##W##_t)f->inf;                          \
        uint##W##_t magnitude = x & (uint##W##_t)(sign - 1);                  \
        unsigned nan = magnitude > inf, both = magnitude == inf;              \
        unsigned negative = x >= sign;                                        \
        return (uint8_t)((nan * OG_FOUND_NAN |                                \
                          both * (OG_FOUND_POS_INF << negative)) &            \
                         f->keep);                                            \
    }                                                                         \
                                                                              \
    static uint8_t exact##W(const void *run, int64_t n, const og_format *f)   \
    {                                                                         \
        uint8_t bits = 0;                                                     \
        for (int64_t i = 0; i < n; i++) {                                     \
            bits |= found##W(load##W(run, i), f);                             \
        }                                                                     \
        return bits;                                                          \
    }                                                                         \
                                                                              \
    void og_scalar_each##W(const void *run, int64_t n, const og_format *f,    \
                           uint8_t *bits)                                     \
    {                                                                         \
        for (int64_t i = 0; i < n; i++) {                                     \
            bits[i] |= found##W(load##W(run, i), f);                          \
        }                                                                     \
    }                                                                         \
                                                                              \
    static uint8_t outside##W(const void *run, int64_t n, const og_format *f) \
    {                                                                         \
        unsigned outside = 0;                                                 \
        for (int64_t i = 0; i < n; i++) {                                     \
            outside |= load##W(run, i) >= f->inf;                             \
        }                                                                     \
        return outside != 0 ? OG_FOUND_OUTSIDE : 0;                           \
    }

/* Eight bytes at a time, whatever the width: adding what is missing from Inf
 * to the sign bit carries into it where a lane, without its sign, is Inf or
 * more, and never out of the lane. `ones` has a one in each lane. */
static inline uint8_t
fast_lanes(const void *run, int64_t bytes, uint64_t ones, int bits,
           const og_format *f)
{
    const uint64_t signs = ones << (bits - 1);
    const uint64_t carry = signs - ones * f->inf;
    uint64_t all = 0, x;
    int64_t i = 0;
    for (; i + 8 <= bytes; i += 8) {
        memcpy(&x, (const char *)run + i, sizeof x);
        all |= (x & ~signs) + carry;
    }
    if (i < bytes) {
        x = 0;
        memcpy(&x, (const char *)run + i, (size_t)(bytes - i));
        all |= (x & ~signs) + carry;
    }
    return (all & signs) != 0 ? OG_FOUND_UNSURE : 0;
}

static uint8_t
fast8(const void *run, int64_t n, const og_format *f)
{
    return fast_lanes(run, n, UINT64_MAX / 0xFF, 8, f);
}

static uint8_t
fast16(const void *run, int64_t n, const og_format *f)
{
    return fast_lanes(run, 2 * n, UINT64_MAX / 0xFFFF, 16, f);
}

static uint8_t
fast32(const void *run, int64_t n, const og_format *f)
{
    return fast_lanes(run, 4 * n, UINT64_MAX / 0xFFFFFFFF, 32, f);
}

static uint8_t
fast64(const void *run, int64_t n, const og_format *f)
{
    return fast_lanes(run, 8 * n, 1, 64, f);
}

SCALAR_KERNELS(8)
SCALAR_KERNELS(16)
SCALAR_KERNELS(32)
SCALAR_KERNELS(64)

uint8_t
og_byte_run(const void *run, int64_t n, const og_format *f)
{
    return n > 0 && memchr(run, (int)f->inf, (size_t)n) != NULL ? OG_FOUND_NAN
                                                                : 0;
}

void
og_byte_each(const void *run, int64_t n, const og_format *f, uint8_t *bits)
{
    const uint8_t *p = run;
    uint8_t nan = (uint8_t)f->inf;
    for (int64_t i = 0; i < n; i++) {
        bits[i] |= p[i] == nan; /* OG_FOUND_NAN is 1 */
    }
}

void
og_ids_each(const void *run, int64_t n, const og_format *f, uint8_t *bits)
{
    for (int64_t i = 0; i < n; i++) {
        uint64_t id = f->width == 0   ? load8(run, i)
                      : f->width == 1 ? load16(run, i)
                      : f->width == 2 ? load32(run, i)
                                      : load64(run, i);
        bits[i] |= id >= f->inf ? OG_FOUND_OUTSIDE : 0;
    }
}

bool
og_scalar_has(const uint16_t *slots, int64_t n, uint16_t mask, uint16_t value)
{
    for (int64_t i = 0; i < n; i++) {
        if (slots[i] != 0 && (slots[i] & mask) == value) {
            return true;
        }
    }
    return false;
}

static int32_t
slots_count(const uint16_t *slots, int64_t n)
{
    int32_t count = 0;
    for (int64_t i = 0; i < n; i++) {
        count += slots[i] != 0;
    }
    return count;
}

static int32_t
slots_severity(const uint16_t *slots, int64_t n)
{
    int32_t highest = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t severity = og_slot_severity(slots[i]);
        highest = severity > highest ? severity : highest;
    }
    return highest;
}

void
og_scalar_find_rows(og_rows in, uint16_t mask, uint16_t value, bool inverse,
                    bool *out, int64_t begin, int64_t end)
{
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = (const uint16_t *)(in.data + r * in.stride);
        out[r] = og_scalar_has(row, in.capacity, mask, value) != inverse;
    }
}

void
og_scalar_count_rows(og_rows in, int32_t *out, int64_t begin, int64_t end)
{
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = (const uint16_t *)(in.data + r * in.stride);
        out[r] = slots_count(row, in.capacity);
    }
}

void
og_scalar_severity_rows(og_rows in, bool wide, void *out, int64_t begin,
                        int64_t end)
{
    for (int64_t r = begin; r < end; r++) {
        const uint16_t *row = (const uint16_t *)(in.data + r * in.stride);
        int32_t highest = slots_severity(row, in.capacity);
        if (wide) {
            ((int64_t *)out)[r] = highest;
        }
        else {
            ((int32_t *)out)[r] = highest;
        }
    }
}

const og_kernels og_kernels_scalar = {
    .isa = "scalar",
    .fast = {fast8, fast16, fast32, fast64},
    .exact = {exact8, exact16, exact32, exact64},
    .each = {og_scalar_each8, og_scalar_each16, og_scalar_each32,
             og_scalar_each64},
    .outside = {outside8, outside16, outside32, outside64},
    .find = og_scalar_find_rows,
    .count = og_scalar_count_rows,
    .severity = og_scalar_severity_rows,
    .has = og_scalar_has,
};
