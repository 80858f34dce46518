/* A scan's plan, and walking it.
 *
 * Prepared, a tensor is a nest of loops in the order of memory: outer
 * dimensions, the rows, dimensions within a row, and a run of elements side
 * by side. Whatever the layout, kernels are given runs as long as it allows:
 * many short rows that touch, or rows that interleave (a transposed tensor),
 * are first looked at together, and one by one only where something is. */
#include "core/scan.h"

#include <string.h>

#include "core/cpu.h"
#include "core/kernels.h"

enum {
    CHUNK_BYTES = 16384,  /* looked at together, and again from L1 */
    UNIT_BYTES = 1 << 17, /* worth a thread of its own */
    EACH_ELEMENTS = 1024, /* found one by one, on the stack */
    SHORT_RUN = 64,       /* below it, rows are found element by element */
    FEW_ROWS = 256,       /* so few may be cut into slices */
};

static int64_t
least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t
most(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* --- The plan ----------------------------------------------------------- */

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
    int64_t row_bytes = 0, bytes = 0;
    if (__builtin_mul_overflow(inner, (int64_t)1 << scan->format.width,
                               &row_bytes) ||
        __builtin_mul_overflow(row_bytes, scan->rows, &bytes)) {
        row_bytes = row_bytes > 0 ? row_bytes : INT64_MAX;
        bytes = INT64_MAX;
    }
    scan->slices = 1;
    scan->slice_dim = -1;
    if (scan->same_rows) {
        scan->units = scan->grain = 1;
        return;
    }
    bool together = scan->outer > 0;
    if (scan->rows < FEW_ROWS) {
        int64_t size = together ? 0 : scan->run;
        int32_t last = together ? scan->outer : scan->used;
        for (int32_t d = 0; d < last; d++) {
            if (scan->dims[d].size > size) {
                size = scan->dims[d].size;
                scan->slice_dim = d;
            }
        }
        int64_t wanted = (together ? bytes : row_bytes) / UNIT_BYTES;
        scan->slices = most(1, least(wanted, size));
    }
    scan->units = scan->slices * scan->rows;
    if (together && scan->rows < FEW_ROWS) {
        scan->units = scan->slices;
    }
    scan->grain = most(1, UNIT_BYTES / most(1, bytes / scan->units));
}

static og_status
bad_layout(og_error *err, const char *what)
{
    return og_fail(err, OG_BAD_ARGUMENT,
                   "expected a strided tensor of at most %d dimensions and "
                   "less than 2**63 bytes, its %s; pass x.contiguous()",
                   OG_SCAN_DIMS, what);
}

/* Fills in the dimensions; pairs is 2 for complex, else 1. */
static og_status
lay_out(og_scan *scan, int64_t ndim, const int64_t *sizes,
        const int64_t *strides, int32_t pairs, og_error *err)
{
    int64_t step = (int64_t)pairs << scan->format.width, span = step;
    bool empty = false;
    if (ndim < 0 || ndim > OG_SCAN_DIMS) {
        return bad_layout(err, "number of dimensions is another");
    }
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
        empty = empty || sizes[d] == 0;
        if (sizes[d] > 1 &&
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

/* --- Runs --------------------------------------------------------------- */

/* What is in n elements side by side. */
static uint8_t
run_found(const og_scan *scan, const char *p, int64_t n)
{
    const og_format *format = &scan->format;
    const int64_t chunk = CHUNK_BYTES >> format->width;
    uint8_t bits = 0;
    while (n > 0) {
        int64_t now = least(n, chunk);
        uint8_t found = scan->fast(p, now, format);
        if ((found & OG_FOUND_UNSURE) != 0) {
            found = scan->exact(p, now, format);
        }
        bits |= found;
        p += now << format->width;
        n -= now;
    }
    return bits;
}

/* n elements at a stride, side by side in `to`. */
static void
gather(void *to, const char *p, int64_t n, int64_t stride, int32_t width)
{
    char *out = to;
    for (int64_t i = 0; i < n; i++, p += stride) {
        switch (width) {
            case 0:
                out[i] = *p;
                break;
            case 1:
                memcpy(out + 2 * i, p, 2);
                break;
            case 2:
                memcpy(out + 4 * i, p, 4);
                break;
            default:
                memcpy(out + 8 * i, p, 8);
        }
    }
}

/* What is in n elements at a stride. */
static uint8_t
strided_found(const og_scan *scan, const char *p, int64_t n, int64_t stride)
{
    uint64_t piece[EACH_ELEMENTS];
    uint8_t bits = 0;
    while (n > 0) {
        int64_t now = least(n, EACH_ELEMENTS);
        gather(piece, p, now, stride, scan->format.width);
        bits |= run_found(scan, (const char *)piece, now);
        p += now * stride;
        n -= now;
    }
    return bits;
}

/* What is in a row: dims[d..used) and the run at the bottom. */
static uint8_t
row_found(const og_scan *scan, const char *p, int32_t d)
{
    if (d == scan->used) {
        return run_found(scan, p, scan->run);
    }
    const og_scan_dim dim = scan->dims[d];
    if (d + 1 == scan->used && scan->run == 1) {
        return strided_found(scan, p, dim.size, dim.stride);
    }
    uint8_t bits = 0;
    for (int64_t i = 0; i < dim.size; i++) {
        bits |= row_found(scan, p + i * dim.stride, d + 1);
    }
    return bits;
}

/* --- Rows that touch ---------------------------------------------------- */

/* bits[i] |= each[i]. */
static void
join(const uint8_t *each, int64_t n, uint8_t *bits)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        uint64_t a, b;
        memcpy(&a, each + i, sizeof a);
        memcpy(&b, bits + i, sizeof b);
        b |= a;
        memcpy(bits + i, &b, sizeof b);
    }
    for (; i < n; i++) {
        bits[i] |= each[i];
    }
}

/* bits[r] |= whatever is in the `run` bytes of row r. each has eight bytes
 * behind its last row. */
static void
fold(const uint8_t *each, int64_t rows, int64_t run, uint8_t *bits)
{
    if (run == 1) {
        join(each, rows, bits);
        return;
    }
    for (int64_t r = 0; r < rows; r++, each += run) {
        uint64_t all = 0, eight;
        int64_t i = 0;
        for (; i + 8 <= run; i += 8) {
            memcpy(&eight, each + i, sizeof eight);
            all |= eight;
        }
        if (i < run) {
            memcpy(&eight, each + i, sizeof eight);
            all |= eight & (((uint64_t)1 << 8 * (run - i)) - 1);
        }
        all |= all >> 32;
        all |= all >> 16;
        bits[r] |= (uint8_t)(all | all >> 8);
    }
}

/* Rows of a few elements side by side, in which something is. */
static void
short_rows(const og_scan *scan, const char *p, int64_t rows, uint8_t *bits)
{
    const int64_t run = scan->run, step = EACH_ELEMENTS / run;
    uint8_t each[EACH_ELEMENTS + 8];
    while (rows > 0) {
        int64_t now = least(rows, step);
        memset(each, 0, (size_t)(now * run) + 8);
        scan->each(p, now * run, &scan->format, each);
        fold(each, now, run, bits);
        p += (now * run) << scan->format.width;
        bits += now;
        rows -= now;
    }
}

/* Rows whose runs follow one another without gaps. */
static void
dense_rows(const og_scan *scan, const char *p, int64_t rows, uint8_t *bits)
{
    const int64_t run = scan->run, row_bytes = run << scan->format.width;
    const int64_t step = most(1, CHUNK_BYTES / row_bytes);
    for (int64_t r = 0; r < rows; r += step) {
        const char *at = p + r * row_bytes;
        int64_t now = least(step, rows - r);
        if (now == 1) {
            bits[r] |= run_found(scan, at, run);
        }
        else if (scan->fast(at, now * run, &scan->format) == 0) {
            continue;
        }
        else if (run == 1) {
            scan->each(at, now, &scan->format, bits + r);
        }
        else if (run < SHORT_RUN) {
            short_rows(scan, at, now, bits + r);
        }
        else {
            for (int64_t i = 0; i < now; i++) {
                bits[r + i] |= run_found(scan, at + i * row_bytes, run);
            }
        }
    }
}

/* Rows of one element each, at a stride. */
static void
single_rows(const og_scan *scan, const char *p, int64_t rows, uint8_t *bits)
{
    uint64_t piece[EACH_ELEMENTS];
    for (int64_t r = 0; r < rows; r += EACH_ELEMENTS) {
        int64_t now = least(rows - r, EACH_ELEMENTS);
        gather(piece, p + r * scan->row_stride, now, scan->row_stride,
               scan->format.width);
        if (scan->fast(piece, now, &scan->format) != 0) {
            scan->each(piece, now, &scan->format, bits + r);
        }
    }
}

/* Rows for one place of the outer dimensions; p is where they begin. */
static void
rows_found(const og_scan *scan, const char *p, int64_t rows, uint8_t *bits)
{
    if (scan->outer == scan->used) {
        if (scan->row_stride == scan->run << scan->format.width) {
            dense_rows(scan, p, rows, bits);
            return;
        }
        if (scan->run == 1) {
            single_rows(scan, p, rows, bits);
            return;
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        bits[r] |= row_found(scan, p + r * scan->row_stride, scan->outer);
    }
}

/* --- Rows that interleave ----------------------------------------------- */

/* Few, short rows one after another, and that `times` times over without a
 * gap: all of it is one run, found element by element where it is not clean.
 */
static void
periods_found(const og_scan *scan, const char *p, int64_t times, uint8_t *bits)
{
    const int32_t width = scan->format.width;
    const int64_t period = scan->rows * scan->run;
    const int64_t step = most(1, EACH_ELEMENTS / period);
    uint8_t each[EACH_ELEMENTS + 8];
    for (int64_t t = 0; t < times; t += step) {
        int64_t now = least(step, times - t);
        const char *at = p + ((t * period) << width);
        if (scan->fast(at, now * period, &scan->format) == 0) {
            continue;
        }
        memset(each, 0, (size_t)(now * period) + 8);
        scan->each(at, now * period, &scan->format, each);
        for (int64_t i = 0; i < now; i++) {
            fold(each + i * period, scan->rows, scan->run, bits);
        }
    }
}

/* Rows begin..begin+rows over dims[d..outer) and all below. */
static void
outer_found(const og_scan *scan, const char *p, int32_t d, int64_t rows,
            uint8_t *bits)
{
    if (d == scan->outer) {
        rows_found(scan, p, rows, bits);
        return;
    }
    const og_scan_dim dim = scan->dims[d];
    const int64_t period = scan->rows * scan->run;
    if (d + 1 == scan->outer && scan->outer == scan->used &&
        rows == scan->rows && period <= EACH_ELEMENTS &&
        scan->row_stride == scan->run << scan->format.width &&
        dim.stride == period << scan->format.width) {
        periods_found(scan, p, dim.size, bits);
        return;
    }
    for (int64_t i = 0; i < dim.size; i++) {
        outer_found(scan, p + i * dim.stride, d + 1, rows, bits);
    }
}

/* --- Sharing the work --------------------------------------------------- */

void
og_scan_rows(const og_scan *scan, int64_t begin, int64_t end, uint8_t *bits)
{
    if (scan->units == 0 || begin >= end) {
        return;
    }
    if (scan->same_rows) {
        uint8_t found = row_found(scan, scan->data, 0);
        for (int64_t r = begin; r < end && found != 0; r++) {
            bits[r] |= found;
        }
        return;
    }
    outer_found(scan, scan->data + begin * scan->row_stride, 0, end - begin,
                bits + begin);
}

/* Other threads may be at the same row. */
static void
share(uint8_t *bits, uint8_t found)
{
    if (found != 0) {
        (void)__atomic_fetch_or(bits, found, __ATOMIC_RELAXED);
    }
}

/* The scan of slices begin..end alone. */
static og_scan
slices_of(const og_scan *scan, int64_t begin, int64_t end)
{
    og_scan part = *scan;
    int32_t d = scan->slice_dim;
    int64_t *size = d < 0 ? &part.run : &part.dims[d].size;
    int64_t stride =
        d < 0 ? (int64_t)1 << scan->format.width : scan->dims[d].stride;
    /* Evenly, without a product that might overflow. */
    int64_t each = *size / scan->slices, left = *size % scan->slices;
    int64_t first = begin * each + least(begin, left);
    int64_t last = end * each + least(end, left);
    *size = last - first;
    part.data += first * stride;
    return part;
}

void
og_scan_units(const og_scan *scan, int64_t begin, int64_t end, uint8_t *bits)
{
    if (begin >= end) {
        return;
    }
    if (scan->same_rows) {
        og_scan_rows(scan, 0, scan->rows, bits);
    }
    else if (scan->slices == 1 && scan->units == scan->rows) {
        og_scan_rows(scan, begin, end, bits);
    }
    else if (scan->outer > 0) {
        uint8_t found[FEW_ROWS] = {0};
        og_scan part = slices_of(scan, begin, end);
        og_scan_rows(&part, 0, part.rows, found);
        for (int64_t r = 0; r < part.rows; r++) {
            share(&bits[r], found[r]);
        }
    }
    else {
        while (begin < end) {
            int64_t row = begin / scan->slices;
            int64_t until = least(end, (row + 1) * scan->slices);
            og_scan part = slices_of(scan, begin - row * scan->slices,
                                     until - row * scan->slices);
            share(&bits[row],
                  row_found(&part, part.data + row * part.row_stride, 0));
            begin = until;
        }
    }
}
