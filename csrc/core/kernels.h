/* The kernels that exist once for each instruction set, and their table.
 *
 * Sign-magnitude formats (all floats but fnuz and e8m0) are told apart by
 * width alone: without its sign bit, Inf is format.inf and NaN is above. */
#ifndef OPGUARD_CORE_KERNELS_H
#define OPGUARD_CORE_KERNELS_H

#include "core/batch.h"
#include "core/scan.h"

/* Fewer rows than this may be cut into slices: rows that each lie together,
 * and rows that interleave, which are read a slice at a time even when they
 * are many, because part of each stretch would be no run to read. */
#define OG_SCAN_FEW_ROWS 256
#define OG_SCAN_FEW_TOGETHER 16384

/* With this bit a kernel says that an Inf may be hidden behind what it found;
 * `exact` on the same run tells. */
#define OG_FOUND_UNSURE 0x80

/* Arrays are indexed by log2 of an element's bytes. n elements lie side by
 * side, at any alignment; n >= 0. */
typedef struct og_kernels {
    const char *isa;
    og_run_fn fast[4];  /* OG_FOUND_* of a run, with OG_FOUND_UNSURE */
    og_run_fn exact[4]; /* the same without OG_FOUND_UNSURE, slower */
    og_each_fn each[4]; /* bits[i] |= OG_FOUND_* of element i */
    og_run_fn outside[4];
    /* Rows begin..end; out is by absolute row. mask 0 with value 0 finds any
     * error. */
    void (*find)(og_rows in, uint16_t mask, uint16_t value, bool inverse,
                 bool *out, int64_t begin, int64_t end);
    void (*count)(og_rows in, int32_t *out, int64_t begin, int64_t end);
    void (*severity)(og_rows in, bool wide, void *out, int64_t begin,
                     int64_t end);
    bool (*has)(const uint16_t *slots, int64_t n, uint16_t mask,
                uint16_t value);
} og_kernels;

static inline int64_t
og_least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t
og_most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* Complete, and what every other table may point to. */
extern const og_kernels og_kernels_scalar;
#if defined(__x86_64__)
extern const og_kernels og_kernels_avx2;
extern const og_kernels og_kernels_avx512;
#elif defined(__aarch64__)
extern const og_kernels og_kernels_neon;
#endif

void
og_scalar_each8(const void *run, int64_t n, const og_format *f, uint8_t *bits);
void
og_scalar_each16(const void *run, int64_t n, const og_format *f,
                 uint8_t *bits);
void
og_scalar_each32(const void *run, int64_t n, const og_format *f,
                 uint8_t *bits);
void
og_scalar_each64(const void *run, int64_t n, const og_format *f,
                 uint8_t *bits);
bool
og_scalar_has(const uint16_t *slots, int64_t n, uint16_t mask, uint16_t value);
void
og_scalar_find_rows(og_rows in, uint16_t mask, uint16_t value, bool inverse,
                    bool *out, int64_t begin, int64_t end);
void
og_scalar_count_rows(og_rows in, int32_t *out, int64_t begin, int64_t end);
void
og_scalar_severity_rows(og_rows in, bool wide, void *out, int64_t begin,
                        int64_t end);

/* Formats where one byte is the only NaN (format.inf is that byte), and the
 * elements of ids: the same on every instruction set. */
uint8_t
og_byte_run(const void *run, int64_t n, const og_format *f);
void
og_byte_each(const void *run, int64_t n, const og_format *f, uint8_t *bits);
void
og_ids_each(const void *run, int64_t n, const og_format *f, uint8_t *bits);

#endif
