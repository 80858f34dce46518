/* The whole interface to the CUDA kernels: raw device pointers, sizes, a
 * stream. The kernels live in libopguard_cuda.so, which load.c opens at the
 * first use; a machine without CUDA never loads it.
 *
 * Kernels launch and never synchronise or allocate, so a CUDA graph can
 * capture them. The oldest architecture is sm_80. */
#ifndef OPGUARD_CUDA_H
#define OPGUARD_CUDA_H

#include "core/base.h"
#include "core/slots.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One block of bytes to copy to an offset of a packed buffer. */
typedef struct og_cuda_span {
    const void *source; /* device memory, readable for bytes */
    int64_t offset;     /* a multiple of OG_PACK_ALIGN (core/layout.h) */
    int64_t bytes;      /* 0 allowed */
} og_cuda_span;

/* Where a kernel runs. */
typedef struct og_cuda_place {
    void *stream;
    int32_t device;
} og_cuda_place;

/* The flags a kernel makes. from is NULL for samples without errors and equal
 * to `to` for rows changed in place; both are read and written in units of 4
 * bytes. No two rows of `to` overlap. */
typedef struct og_cuda_rows {
    int64_t samples;
    const void *from;
    int64_t from_stride; /* bytes from row to row */
    void *to;
    int64_t to_stride;
    int32_t capacity; /* slots of a row, even */
    og_policy policy;
} og_cuda_rows;

/* How a number format tells NaN and Inf. With m = (bits ^ flip) & magnitude,
 * a number is NaN when m > top, and Inf when m == top and the format has Inf;
 * its highest bit is then the sign. */
typedef struct og_cuda_format {
    uint64_t flip;
    uint64_t magnitude;
    uint64_t top;
    int32_t bytes; /* 1, 2, 4 or 8 */
    bool infinite;
    /* NaN is one pattern that uses all bits of a byte, no exponent tells it */
    bool whole;
} og_cuda_format;

#define OG_CUDA_DIMS 64

/* The values of each sample: element (0, ..., 0) of sample i lies i *
 * row_stride bytes behind data. */
typedef struct og_cuda_values {
    const void *data;
    int64_t row_stride; /* bytes */
    int64_t count;      /* units of one sample */
    int32_t unit;       /* bytes that lie side by side: one element or 16 */
    int32_t ndim;       /* 0: all units of a sample lie side by side */
    int64_t sizes[OG_CUDA_DIMS];   /* outermost first, in units */
    int64_t strides[OG_CUDA_DIMS]; /* bytes */
} og_cuda_values;

typedef struct og_cuda_check {
    og_cuda_rows rows;
    og_cuda_values x;
    og_cuda_format format;
    int32_t checks; /* 1 NaN, 2 +Inf, 4 -Inf */
    uint16_t nan;   /* slots to record */
    uint16_t inf;
    uint8_t *findings; /* (samples,) check bits instead of rows, or NULL */
    /* og_cuda_check_scratch() bytes of device memory, aligned to 8; nothing
     * is expected in it. */
    void *scratch;
} og_cuda_check;

typedef struct og_cuda_index {
    og_cuda_rows rows;
    og_cuda_values ids; /* in the order of the dimensions */
    bool is_signed;
    int64_t size; /* right ids are 0..size-1 */
    uint16_t slot;
    void *clamped; /* contiguous, ids' dtype; or NULL */
} og_cuda_index;

typedef struct og_cuda_push {
    og_cuda_rows rows;
    const uint8_t *where; /* NULL: every sample */
    int64_t where_stride; /* bytes */
    uint16_t slot;
} og_cuda_push;

typedef struct og_cuda_codes {
    og_cuda_rows rows;
    const void *codes;
    int64_t codes_stride; /* bytes */
    int32_t codes_bytes;
    bool is_signed;
    int32_t location;
    uint32_t severities; /* of code c in bits 2c and 2c+1 */
} og_cuda_codes;

typedef struct og_cuda_other {
    const void *data;
    int64_t stride; /* bytes */
} og_cuda_other;

/* others is host memory and may be freed on return. */
typedef struct og_cuda_merge {
    og_cuda_rows rows;
    const og_cuda_other *others;
    size_t count;
} og_cuda_merge;

/* Row r of `to` = the rows of `from` that r's picks name, merged; picks
 * outside 0..rows-1 name none. */
typedef struct og_cuda_gather {
    int64_t samples; /* rows of `to` */
    int64_t rows;    /* of `from` */
    const void *from;
    int64_t from_stride; /* bytes */
    void *to;
    int64_t to_stride;
    const void *picks;
    int64_t picks_row_stride; /* bytes */
    int64_t picks_stride;
    int64_t count;    /* picks of a row */
    int32_t capacity; /* slots of a row; all are used */
    bool wide;        /* int64 picks, else int32 */
    og_policy policy;
} og_cuda_gather;

typedef struct og_cuda_clear {
    og_cuda_rows rows;
    int32_t code;
} og_cuda_clear;

typedef enum og_cuda_what {
    OG_CUDA_FIND,
    OG_CUDA_OK,
    OG_CUDA_ERR,
    OG_CUDA_COUNT,
    OG_CUDA_MAX_SEVERITY,
} og_cuda_what;

typedef struct og_cuda_query {
    int64_t samples;
    const void *data;
    int64_t stride; /* bytes */
    int32_t capacity;
    int32_t what; /* og_cuda_what */
    uint16_t mask;
    uint16_t value;
    void *out;
    int32_t out_bytes; /* 1, 4 or 8 */
} og_cuda_query;

/* What libopguard_cuda.so exports; all but error_text return cudaError_t as
 * int. Host memory that a call points to may be freed on return. */
OG_EXPORT int
og_cuda_launch_pack(void *packed, const og_cuda_span *spans, size_t count,
                    const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_check(const og_cuda_check *call, const og_cuda_place *place);
/* How much scratch launch_check wants; often 0. */
OG_EXPORT int
og_cuda_check_scratch(const og_cuda_check *call, const og_cuda_place *place,
                      int64_t *bytes);
OG_EXPORT int
og_cuda_launch_index(const og_cuda_index *call, const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_push(const og_cuda_push *call, const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_codes(const og_cuda_codes *call, const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_merge(const og_cuda_merge *call, const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_gather(const og_cuda_gather *call, const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_clear(const og_cuda_clear *call, const og_cuda_place *place);
OG_EXPORT int
og_cuda_launch_query(const og_cuda_query *call, const og_cuda_place *place);
/* A static text; never NULL. */
OG_EXPORT const char *
og_cuda_error_text(int code);

/* All of the above, once more as a list: X(name without og_cuda_). */
#define OG_CUDA_FUNCTIONS(X) \
    X(launch_pack)           \
    X(launch_check)          \
    X(check_scratch)         \
    X(launch_index)          \
    X(launch_push)           \
    X(launch_codes)          \
    X(launch_merge)          \
    X(launch_gather)         \
    X(launch_clear)          \
    X(launch_query)          \
    X(error_text)

typedef struct og_cuda_table {
#define OG_CUDA_FIELD(name) __typeof__(&og_cuda_##name) name;
    OG_CUDA_FUNCTIONS(OG_CUDA_FIELD)
#undef OG_CUDA_FIELD
} og_cuda_table;

/* What load.c offers the layers above. Loads the library where it is not
 * loaded; the table is never NULL on OG_OK and lives for ever. */
og_status
og_cuda_functions(const og_cuda_table **table, og_error *err);
og_status
og_cuda_ready(og_error *err);
/* Turns what a launch returned into a status. */
og_status
og_cuda_outcome(const og_cuda_table *table, int code, const char *what,
                og_error *err);

#ifdef __cplusplus
}
#endif
#endif
