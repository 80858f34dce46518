/* A scan's plan: the tensor's dimensions in the order of memory, joined where
 * they continue one another, and the work cut in units. */
#include "core/scan.h"

#include "core/cpu.h"
#include "core/kernels.h"

/* Worth a thread of its own: reading it takes some 7 us, and waking a thread
 * 2 to 3. */
enum { UNIT_BYTES = 1 << 18 };

/* Elements of the dimensions; INT64_MAX when there are more. */
static int64_t
volume(const og_scan_dim *dims, int32_t count, int64_t first)
{
    int64_t all = first;
    for (int32_t d = 0; d < count; d++) {
        if (__builtin_mul_overflow(all, dims[d].size, &all)) {
            return INT64_MAX;
        }
    }
    return all;
}

/* Puts one dimension where its stride belongs. */
static void
insert_dim(og_scan *scan, int64_t size, int64_t stride)
{
    int32_t at = scan->used++;
    while (at > 0 && scan->dims[at - 1].stride < stride) {
        scan->dims[at] = scan->dims[at - 1];
        at--;
    }
    scan->dims[at] = (og_scan_dim){size, stride};
}

/* Joins dimensions that continue one another; the innermost becomes the run
 * when its elements lie side by side. */
static void
collapse(og_scan *scan)
{
    int32_t kept = 0;
    for (int32_t d = 1; d < scan->used; d++) {
        og_scan_dim *last = &scan->dims[kept], *next = &scan->dims[d];
        int64_t reach = 0;
        if (!__builtin_mul_overflow(next->size, next->stride, &reach) &&
            reach == last->stride) {
            last->size *= next->size;
            last->stride = next->stride;
        }
        else {
            scan->dims[++kept] = *next;
        }
    }
    scan->used = scan->used > 0 ? kept + 1 : 0;
    scan->run = 1;
    if (scan->used > 0 && scan->dims[kept].stride == 1 << scan->format.width) {
        scan->run = scan->dims[kept].size;
        scan->used--;
    }
}

/* Cuts the work in units: rows when there are many, else slices of what is
 * largest. Rows that interleave are cut together. */
static void
divide(og_scan *scan)
{
    int64_t inner = volume(scan->dims, scan->used, scan->run);
    int64_t rows = scan->same_rows ? 1 : scan->rows; /* that are read */
    int64_t row_bytes = 0, bytes = 0;
    if (__builtin_mul_overflow(inner, (int64_t)1 << scan->format.width,
                               &row_bytes) ||
        __builtin_mul_overflow(row_bytes, rows, &bytes)) {
        row_bytes = row_bytes > 0 ? row_bytes : INT64_MAX;
        bytes = INT64_MAX;
    }
    scan->slices = 1;
    scan->slice_dim = -1;
    bool together = scan->outer > 0;
    bool few = rows < (together ? OG_SCAN_FEW_TOGETHER : OG_SCAN_FEW_ROWS);
    if (few) {
        int64_t size = together ? 0 : scan->run;
        int32_t last = together ? scan->outer : scan->used;
        for (int32_t d = 0; d < last; d++) {
            if (scan->dims[d].size > size) {
                size = scan->dims[d].size;
                scan->slice_dim = d;
            }
        }
        int64_t wanted = (together ? bytes : row_bytes) / UNIT_BYTES;
        scan->slices = og_most(1, og_least(wanted, size));
    }
    scan->units = scan->slices * (together && few ? 1 : rows);
    scan->grain = og_most(1, UNIT_BYTES / og_most(1, bytes / scan->units));
}

static og_status
bad_layout(og_error *err, const char *what)
{
    return og_fail(err, OG_BAD_ARGUMENT,
                   "expected a strided tensor of at most %d dimensions and "
                   "less than 2**63 bytes, its %s; pass x.contiguous()",
                   OG_SCAN_DIMS, what);
}

static bool
has_none(int64_t ndim, const int64_t *sizes)
{
    bool none = false;
    for (int64_t d = 0; d < ndim; d++) {
        none = none || sizes[d] == 0;
    }
    return none;
}

/* Fills in the dimensions; pairs is 2 for complex, else 1. */
static og_status
lay_out(og_scan *scan, int64_t ndim, const int64_t *sizes,
        const int64_t *strides, int32_t pairs, og_error *err)
{
    int64_t step = (int64_t)pairs << scan->format.width, span = step;
    if (ndim < 0 || ndim > OG_SCAN_DIMS) {
        return bad_layout(err, "number of dimensions is another");
    }
    /* Without elements, strides may be any numbers. */
    const bool empty = has_none(ndim, sizes);
    scan->used = 0;
    scan->row_stride = 0;
    if (pairs == 2) {
        insert_dim(scan, 2, step / 2);
    }
    for (int64_t d = 0; d < ndim; d++) {
        int64_t stride = 0, reach = 0;
        if (sizes[d] < 0 || strides[d] < 0) {
            return bad_layout(err, "sizes or strides are negative");
        }
        if (sizes[d] > 1 && !empty &&
            (__builtin_mul_overflow(strides[d], step, &stride) ||
             __builtin_mul_overflow(sizes[d] - 1, stride, &reach) ||
             __builtin_add_overflow(span, reach, &span))) {
            return bad_layout(err, "extent is another");
        }
        if (d == 0) {
            scan->row_stride = stride;
        }
        else if (stride > 0) {
            insert_dim(scan, sizes[d], stride);
        }
    }
    scan->rows = ndim > 0 ? sizes[0] : 1;
    scan->same_rows = scan->rows > 1 && scan->row_stride == 0;
    collapse(scan);
    scan->outer = 0;
    while (scan->rows > 1 && !scan->same_rows && scan->outer < scan->used &&
           scan->dims[scan->outer].stride > scan->row_stride) {
        scan->outer++;
    }
    if (empty) {
        scan->units = 0;
        scan->grain = 1;
    }
    else {
        divide(scan);
    }
    return OG_OK;
}

static const og_format formats[] = {
    [OG_SCAN_NONE] = {0, 0, 0},
    [OG_SCAN_F16] = {0x7C00, 7, 1},
    [OG_SCAN_BF16] = {0x7F80, 7, 1},
    [OG_SCAN_F32] = {0x7F800000, 7, 2},
    [OG_SCAN_F64] = {0x7FF0000000000000, 7, 3},
    [OG_SCAN_F8_E5M2] = {0x7C, 7, 0},
    /* 0x7E is its largest number, which is nothing to find. */
    [OG_SCAN_F8_E4M3FN] = {0x7E, OG_FOUND_NAN, 0},
    [OG_SCAN_F8_FNUZ] = {0x80, OG_FOUND_NAN, 0},
    [OG_SCAN_F8_E8M0] = {0xFF, OG_FOUND_NAN, 0},
    [OG_SCAN_C32] = {0x7C00, 7, 1},
    [OG_SCAN_C64] = {0x7F800000, 7, 2},
    [OG_SCAN_C128] = {0x7FF0000000000000, 7, 3},
};

og_status
og_scan_prepare(og_scan *scan, const void *data, int64_t ndim,
                const int64_t *sizes, const int64_t *strides,
                og_scan_kind kind, og_error *err)
{
    if ((unsigned)kind > OG_SCAN_C128) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected an og_scan_kind, got %d", (int)kind);
    }
    const og_kernels *kernels = og_cpu_kernels();
    scan->data = data;
    scan->format = formats[kind];
    scan->fast = kernels->fast[scan->format.width];
    scan->exact = kernels->exact[scan->format.width];
    scan->each = kernels->each[scan->format.width];
    if (kind == OG_SCAN_F8_FNUZ || kind == OG_SCAN_F8_E8M0) {
        scan->fast = scan->exact = og_byte_run;
        scan->each = og_byte_each;
    }
    og_status status =
        lay_out(scan, ndim, sizes, strides, kind >= OG_SCAN_C32 ? 2 : 1, err);
    if (kind == OG_SCAN_NONE) {
        scan->units = 0;
    }
    return status;
}

og_status
og_scan_prepare_ids(og_scan *scan, const void *data, int64_t ndim,
                    const int64_t *sizes, const int64_t *strides,
                    og_id_kind kind, int64_t size, og_error *err)
{
    static const int8_t width[] = {
        [OG_ID_U8] = 0,  [OG_ID_I8] = 0,  [OG_ID_I16] = 1, [OG_ID_I32] = 2,
        [OG_ID_I64] = 3, [OG_ID_U16] = 1, [OG_ID_U32] = 2, [OG_ID_U64] = 3,
    };
    if ((unsigned)kind > OG_ID_U64) {
        return og_fail(err, OG_BAD_ARGUMENT, "expected an og_id_kind, got %d",
                       (int)kind);
    }
    bool is_signed = kind >= OG_ID_I8 && kind <= OG_ID_I64;
    int32_t bits = 8 << width[kind];
    /* Read as unsigned, what is negative begins at half the range. */
    uint64_t first = is_signed ? (uint64_t)1 << (bits - 1) : UINT64_MAX;
    uint64_t limit = size > 0 ? (uint64_t)size : 0;
    const og_kernels *kernels = og_cpu_kernels();
    scan->data = data;
    scan->format = (og_format){limit < first ? limit : first, OG_FOUND_OUTSIDE,
                               width[kind]};
    scan->fast = scan->exact = kernels->outside[width[kind]];
    scan->each = og_ids_each;
    og_status status = lay_out(scan, ndim, sizes, strides, 1, err);
    if (!is_signed && bits < 64 && limit > UINT64_MAX >> (64 - bits)) {
        scan->units = 0; /* every value is inside */
    }
    return status;
}
