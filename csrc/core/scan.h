/* Which rows of a tensor hold a NaN, a +Inf or a -Inf: one pass over memory.
 *
 * og_scan_prepare puts the dimensions in the order memory has them, so that
 * any strides are read in long runs; og_scan_units and og_scan_rows then do
 * the work, which may be shared among threads. Values are tested as integers
 * (no floating-point compare, no exceptions raised, survives -ffast-math),
 * and nothing outside the tensor's elements is read. */
#ifndef OPGUARD_CORE_SCAN_H
#define OPGUARD_CORE_SCAN_H

#include "core/base.h"

/* What was found in a row; also the bits of an op's `checks`. */
#define OG_FOUND_NAN 1
#define OG_FOUND_POS_INF 2
#define OG_FOUND_NEG_INF 4
/* An id below 0 or not below the size (og_scan_prepare_ids only). */
#define OG_FOUND_OUTSIDE 8

/* How the elements are written. Complex kinds are pairs; strides stay in
 * whole elements. Conjugation does not change what is found; a tensor with
 * the negation bit has its infinities the other way round (og_found_negated).
 */
typedef enum og_scan_kind {
    OG_SCAN_NONE = 0, /* has no NaN and no Inf: nothing is read */
    OG_SCAN_F16,
    OG_SCAN_BF16,
    OG_SCAN_F32,
    OG_SCAN_F64,
    OG_SCAN_F8_E5M2,   /* Inf 0x7C, NaN above */
    OG_SCAN_F8_E4M3FN, /* NaN 0x7F and 0xFF, no Inf */
    OG_SCAN_F8_FNUZ,   /* both fnuz kinds: NaN 0x80, no Inf */
    OG_SCAN_F8_E8M0,   /* e8m0fnu: NaN 0xFF, no Inf */
    OG_SCAN_C32,       /* pairs of f16 */
    OG_SCAN_C64,       /* pairs of f32 */
    OG_SCAN_C128,      /* pairs of f64 */
} og_scan_kind;

/* How ids are written (og_scan_prepare_ids). */
typedef enum og_id_kind {
    OG_ID_U8 = 0,
    OG_ID_I8,
    OG_ID_I16,
    OG_ID_I32,
    OG_ID_I64,
    OG_ID_U16,
    OG_ID_U32,
    OG_ID_U64,
} og_id_kind;

#define OG_SCAN_DIMS 64

typedef struct og_scan_dim {
    int64_t size;
    int64_t stride; /* bytes */
} og_scan_dim;

/* What the kernels of kernels.h are told about the elements. */
typedef struct og_format {
    uint64_t inf;  /* Inf without its sign, NaN is above; for ids, the first
                      value that is outside */
    uint8_t keep;  /* the OG_FOUND_* that these elements can have */
    int32_t width; /* log2 of an element's bytes */
} og_format;

typedef uint8_t (*og_run_fn)(const void *run, int64_t n, const og_format *f);
typedef void (*og_each_fn)(const void *run, int64_t n, const og_format *f,
                           uint8_t *bits);

/* A prepared scan: plain data, borrowed pointers, read-only once prepared.
 * On the caller's stack (1 KB, of which only what is used is written). Of its
 * fields a caller reads rows, units and grain. */
typedef struct og_scan {
    int64_t rows;  /* size of dimension 0; 1 for a 0-d tensor */
    int64_t units; /* pieces of about equal work; 0: nothing to read */
    int64_t grain; /* so many units are worth a thread of their own */

    const char *data;
    og_run_fn fast; /* the three kernels, as kernels.h has them */
    og_run_fn exact;
    og_each_fn each;
    og_format format;
    int64_t row_stride; /* bytes */
    int64_t run;        /* elements side by side at the bottom of a row */
    int64_t slices;     /* the units of a row, or of all rows together */
    int32_t slice_dim;  /* what is cut: index in dims, -1 for the run */
    bool same_rows;     /* all rows are one in memory (stride 0) */
    int32_t outer;      /* dims[0..outer) step further than a row does */
    int32_t used;       /* dims[outer..used) lie within a row */
    og_scan_dim dims[OG_SCAN_DIMS + 1]; /* largest stride first */
} og_scan;

/* Prepares a scan of ndim dimensions, strides in elements, none negative,
 * dimension 0 being the rows. data may be NULL where there are no elements.
 * Fails (OG_BAD_ARGUMENT) for more than OG_SCAN_DIMS dimensions, a negative
 * size or stride, or extents of 2**63 bytes or more. */
og_status
og_scan_prepare(og_scan *scan, const void *data, int64_t ndim,
                const int64_t *sizes, const int64_t *strides,
                og_scan_kind kind, og_error *err);

/* The same for ids: OG_FOUND_OUTSIDE where an id is < 0 or >= size. */
og_status
og_scan_prepare_ids(og_scan *scan, const void *data, int64_t ndim,
                    const int64_t *sizes, const int64_t *strides,
                    og_id_kind kind, int64_t size, og_error *err);

/* Does units begin..end (of 0..scan->units). bits has scan->rows bytes, one a
 * row, and is ORed into: the caller zeroes it before the first unit. Threads
 * may do disjoint ranges of units into the same bits at the same time. Rows
 * may be shared between units, so bits is complete when all have been done.
 * Meant for parallel_for(0, scan.units, scan.grain, ...): with units <=
 * grain there is nothing to gain from a second thread. */
void
og_scan_units(const og_scan *scan, int64_t begin, int64_t end, uint8_t *bits);

/* Rows begin..end as a whole, ORed into bits[begin..end). One thread a row. */
void
og_scan_rows(const og_scan *scan, int64_t begin, int64_t end, uint8_t *bits);

/* What the bits of a tensor with the negation bit mean. */
static inline uint8_t
og_found_negated(uint8_t bits)
{
    return (uint8_t)((bits & OG_FOUND_NAN) | (bits & OG_FOUND_POS_INF) << 1 |
                     (bits & OG_FOUND_NEG_INF) >> 1);
}

#endif
