/* The flag ops below torch's boxes: one call, decoded and validated.
 *
 * flags_read.c turns tensors into the structs below, flags.c runs them on the
 * host (parallel by torch_parallel_for), flags_cuda.c on a device. A runner
 * is given what is right: shapes agree, slots fit, everything is on the one
 * device, and rows' words lie side by side; it only computes. */
#ifndef OPGUARD_TORCH_FLAGS_H
#define OPGUARD_TORCH_FLAGS_H

#include "core/batch.h"
#include "core/scan.h"
#include "core/slots.h"
#include "torch/opguard_ops.h"
#include "torch/shim.h"

/* torch's numbers of its dtypes; tests/abi compares them with torch's own,
 * and registering refuses a torch that has others. */
enum {
    OG_DTYPE_UINT8 = 0,
    OG_DTYPE_INT8 = 1,
    OG_DTYPE_INT16 = 2,
    OG_DTYPE_INT32 = 3,
    OG_DTYPE_INT64 = 4,
    OG_DTYPE_FLOAT16 = 5,
    OG_DTYPE_FLOAT32 = 6,
    OG_DTYPE_FLOAT64 = 7,
    OG_DTYPE_COMPLEX32 = 8,
    OG_DTYPE_COMPLEX64 = 9,
    OG_DTYPE_COMPLEX128 = 10,
    OG_DTYPE_BOOL = 11,
    OG_DTYPE_BFLOAT16 = 15,
    OG_DTYPE_FLOAT8_E5M2 = 23,
    OG_DTYPE_FLOAT8_E4M3FN = 24,
    OG_DTYPE_FLOAT8_E5M2FNUZ = 25,
    OG_DTYPE_FLOAT8_E4M3FNUZ = 26,
    OG_DTYPE_UINT16 = 27,
    OG_DTYPE_UINT32 = 28,
    OG_DTYPE_UINT64 = 29,
    OG_DTYPE_FLOAT8_E8M0FNU = 44,
};

/* torch's numbers of the device types. */
enum { OG_DEVICE_CPU = 0, OG_DEVICE_CUDA = 1 };

/* A tensor of at least one dimension; dim 0 are the samples, a 0-d tensor is
 * one. Sizes and strides are in elements, borrowed from the tensor or the
 * call. data is NULL when there are no elements; it is written only where a
 * struct says so. */
typedef struct og_tensor {
    void *data;
    int64_t ndim;
    const int64_t *sizes;
    const int64_t *strides;
    int32_t dtype;
    int32_t device_type;
    int32_t device_index;
} og_tensor;

/* Bytes from sample to sample. The stride of a single sample may be any
 * number, even one that in bytes is too large: it is 0 here. */
static inline int64_t
og_tensor_step(const og_tensor *tensor, int64_t element_bytes)
{
    return tensor->sizes[0] > 1 ? tensor->strides[0] * element_bytes : 0;
}

/* What every call that writes flags has. from.data is NULL for samples that
 * have no errors yet, and equals to.data when rows are changed in place. Both
 * have the capacity of the tensors' words. */
typedef struct og_flags_rows {
    int64_t samples;
    og_rows from; /* only read, unless it is to */
    og_rows to;
    og_policy policy;
    int32_t device_index;
} og_flags_rows;

/* NaN and Inf of each sample of x. */
typedef struct og_flags_check {
    og_flags_rows rows; /* with bits: samples and device_index alone */
    og_tensor x;
    og_scan_kind kind; /* OG_SCAN_NONE: nothing can be found */
    int32_t checks;    /* OG_FOUND_* bits; the others are not recorded */
    int32_t location;  /* of NAN, then INF, both CRITICAL */
    uint8_t *bits;     /* row_findings: written instead of rows, or NULL */
} og_flags_check;

/* Any id of a sample below 0 or not below size. */
typedef struct og_flags_index {
    og_flags_rows rows;
    og_tensor ids;
    og_id_kind kind;
    int64_t size; /* at least 0 */
    uint16_t slot;
    /* Written where not NULL: ids clamped to 0..size-1 (0 when size is 0),
     * contiguous in the order of ids' dimensions, of ids' dtype. */
    void *clamped;
} og_flags_index;

/* slot for the samples where where[i * where_stride] is not 0. */
typedef struct og_flags_push {
    og_flags_rows rows;
    const uint8_t *where; /* NULL: every sample */
    int64_t where_stride; /* bytes */
    uint16_t slot;
} og_flags_push;

/* A code of its own for each sample; those that are not 1..15 record nothing
 * (a device cannot raise; the host refuses them). */
typedef struct og_flags_codes {
    og_flags_rows rows;
    og_column codes;
    int32_t location;         /* 0..OG_LOCATION_MAX */
    int32_t severity;         /* 0..3, -1: by code */
    int32_t default_severity; /* of codes without one of their own */
} og_flags_codes;

/* rows.from is the eldest, others follow by age; none overlaps rows.to but
 * rows.from. */
typedef struct og_flags_merge {
    og_flags_rows rows;
    const og_rows *others;
    size_t count;
} og_flags_merge;

/* Row r of `to` is made of the rows of `from` that its picks name; -1 names
 * none. The host refuses other numbers outside 0..rows-1, a device, which
 * cannot raise, takes them for -1. The two do not overlap. */
typedef struct og_flags_gather {
    int64_t samples; /* of to, 1 or more */
    int64_t rows;    /* of from */
    og_rows from;
    og_rows to;
    og_picks picks;
    og_policy policy; /* without its num_slots: all slots are used */
    int32_t device_index;
} og_flags_gather;

typedef struct og_flags_clear {
    og_flags_rows rows;
    int32_t code;
} og_flags_clear;

typedef struct og_flags_query {
    int64_t samples;
    og_rows rows;
    int32_t device_index;
    og_flags_what what;
    uint16_t mask;
    uint16_t value;
    void *out;         /* (samples,): one byte for FIND, OK, ERR (0 or 1),
                        * int32 for COUNT */
    int32_t out_bytes; /* 4 or 8 for MAX_SEVERITY */
} og_flags_query;

/* How one kind of device runs each call. */
typedef struct og_flags_runner {
    og_status (*check)(const og_flags_check *call, og_error *err);
    og_status (*index)(const og_flags_index *call, og_error *err);
    og_status (*push)(const og_flags_push *call, og_error *err);
    og_status (*push_codes)(const og_flags_codes *call, og_error *err);
    og_status (*merge)(const og_flags_merge *call, og_error *err);
    og_status (*gather)(const og_flags_gather *call, og_error *err);
    og_status (*clear)(const og_flags_clear *call, og_error *err);
    og_status (*query)(const og_flags_query *call, og_error *err);
} og_flags_runner;

extern const og_flags_runner og_flags_cpu;  /* flags.c */
extern const og_flags_runner og_flags_cuda; /* flags_cuda.c */

/* The calls on tensors: they decode, validate and run. flags NULL: samples
 * without errors. *out NULL: a new tensor, the caller's then; else (N, W) to
 * write to, and the same handle as flags means in place. The handles stay the
 * caller's. */
og_status
og_flags_check_run(AtenTensorHandle x, AtenTensorHandle flags,
                   AtenTensorHandle *out, int64_t location, int64_t checks,
                   int64_t key, og_error *err);
/* clamped: of ids' shape and dtype, contiguous; NULL when not wanted. */
og_status
og_flags_index_run(AtenTensorHandle ids, AtenTensorHandle flags,
                   AtenTensorHandle *out, AtenTensorHandle clamped,
                   int64_t size, int64_t location, int64_t key, og_error *err);
/* An uninitialised, contiguous tensor like ids, for clamped. */
og_status
og_flags_empty_like(AtenTensorHandle ids, AtenTensorHandle *out,
                    og_error *err);
/* where NULL: every sample. */
og_status
og_flags_push_run(AtenTensorHandle flags, AtenTensorHandle where,
                  AtenTensorHandle *out, int64_t slot, int64_t key,
                  og_error *err);
og_status
og_flags_codes_run(AtenTensorHandle flags, AtenTensorHandle codes,
                   AtenTensorHandle *out, int64_t location, int64_t severity,
                   int64_t default_severity, int64_t key, og_error *err);
og_status
og_flags_merge_run(const AtenTensorHandle *flags, size_t count,
                   AtenTensorHandle *out, int64_t key, og_error *err);
/* index: (M,) or (M, K) of int64 or int32. *out: (M, W), never flags. */
og_status
og_flags_gather_run(AtenTensorHandle flags, AtenTensorHandle index,
                    AtenTensorHandle *out, int64_t key, og_error *err);
og_status
og_flags_clear_run(AtenTensorHandle flags, int64_t code, AtenTensorHandle *out,
                   og_error *err);
/* *out: (N,). */
og_status
og_flags_query_run(AtenTensorHandle flags, og_flags_what what, int64_t mask,
                   int64_t value, AtenTensorHandle *out, og_error *err);
/* *out: (N,) uint8. */
og_status
og_flags_findings_run(AtenTensorHandle x, AtenTensorHandle *out,
                      og_error *err);
/* The slots in use of one sample in host memory; *used may exceed capacity,
 * the rest is then left out. */
og_status
og_flags_slots_read(AtenTensorHandle flags, int64_t row, uint16_t *slots,
                    int64_t capacity, int64_t *used, og_error *err);

#endif
