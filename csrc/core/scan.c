/* Walking a prepared scan.
 *
 * Prepared (scan_plan.c), a tensor is a nest of loops in the order of memory:
 * outer dimensions, the rows, dimensions within a row, and a run of elements
 * side by side. Whatever the layout, kernels are given runs as long as it
 * allows: many short rows that touch, or rows that interleave (a transposed
 * tensor), are first looked at together, and one by one only where something
 * is. */
#include "core/scan.h"

#include <string.h>

#include "core/kernels.h"

enum {
    CHUNK_BYTES = 16384,  /* looked at together, and again from L1 */
    EACH_ELEMENTS = 1024, /* found one by one, on the stack */
    SHORT_RUN = 64,       /* below it, rows are found element by element */
};

/* --- Runs --------------------------------------------------------------- */

/* What is in n elements side by side. */
static uint8_t
run_found(const og_scan *scan, const char *p, int64_t n)
{
    const og_format *format = &scan->format;
    const int64_t chunk = CHUNK_BYTES >> format->width;
    uint8_t bits = 0;
    while (n > 0) {
        int64_t now = og_least(n, chunk);
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

/* bytes is a constant where this is inlined, so that memcpy is a move. */
static inline void
gather_bytes(char *to, const char *p, int64_t n, int64_t stride, size_t bytes)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4, p += 4 * stride, to += 4 * bytes) {
        memcpy(to, p, bytes);
        memcpy(to + bytes, p + stride, bytes);
        memcpy(to + 2 * bytes, p + 2 * stride, bytes);
        memcpy(to + 3 * bytes, p + 3 * stride, bytes);
    }
    for (; i < n; i++, p += stride, to += bytes) {
        memcpy(to, p, bytes);
    }
}

/* n elements at a stride, side by side in `to`. */
static void
gather(void *to, const char *p, int64_t n, int64_t stride, int32_t width)
{
    switch (width) {
        case 0:
            gather_bytes(to, p, n, stride, 1);
            break;
        case 1:
            gather_bytes(to, p, n, stride, 2);
            break;
        case 2:
            gather_bytes(to, p, n, stride, 4);
            break;
        default:
            gather_bytes(to, p, n, stride, 8);
    }
}

/* What is in n elements at a stride. */
static uint8_t
strided_found(const og_scan *scan, const char *p, int64_t n, int64_t stride)
{
    uint64_t piece[EACH_ELEMENTS];
    uint8_t bits = 0;
    while (n > 0) {
        int64_t now = og_least(n, EACH_ELEMENTS);
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
        int64_t now = og_least(rows, step);
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
    const int64_t step = og_most(1, CHUNK_BYTES / row_bytes);
    for (int64_t r = 0; r < rows; r += step) {
        const char *at = p + r * row_bytes;
        int64_t now = og_least(step, rows - r);
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
        int64_t now = og_least(rows - r, EACH_ELEMENTS);
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
    const int64_t step = og_most(1, EACH_ELEMENTS / period);
    uint8_t each[EACH_ELEMENTS + 8];
    for (int64_t t = 0; t < times; t += step) {
        int64_t now = og_least(step, times - t);
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
    int64_t first = begin * each + og_least(begin, left);
    int64_t last = end * each + og_least(end, left);
    *size = last - first;
    part.data += first * stride;
    return part;
}

/* What was found in the one row that is all rows. Who comes second with the
 * same leaves the rest to who came first. */
static void
share_all(const og_scan *scan, uint8_t *bits, uint8_t found)
{
    uint8_t there = __atomic_load_n(bits, __ATOMIC_RELAXED);
    for (int64_t r = 0; r < scan->rows && (found & ~there) != 0; r++) {
        share(&bits[r], found);
    }
}

/* Units of rows that each lie together. */
static void
row_slices(const og_scan *scan, int64_t begin, int64_t end, uint8_t *bits)
{
    while (begin < end) {
        int64_t row = begin / scan->slices;
        int64_t until = og_least(end, (row + 1) * scan->slices);
        og_scan part = slices_of(scan, begin - row * scan->slices,
                                 until - row * scan->slices);
        uint8_t found = row_found(&part, part.data + row * part.row_stride, 0);
        if (scan->same_rows) {
            share_all(scan, bits, found);
        }
        else {
            share(&bits[row], found);
        }
        begin = until;
    }
}

void
og_scan_units(const og_scan *scan, int64_t begin, int64_t end, uint8_t *bits)
{
    if (begin >= end) {
        return;
    }
    if (begin == 0 && end == scan->units) { /* all of it is the caller's */
        og_scan_rows(scan, 0, scan->rows, bits);
    }
    else if (scan->slices == 1) {
        og_scan_rows(scan, begin, end, bits);
    }
    else if (scan->outer > 0) {
        uint8_t found[OG_SCAN_FEW_TOGETHER];
        og_scan part = slices_of(scan, begin, end);
        memset(found, 0, (size_t)part.rows);
        og_scan_rows(&part, 0, part.rows, found);
        for (int64_t r = 0; r < part.rows; r++) {
            share(&bits[r], found[r]);
        }
    }
    else {
        row_slices(scan, begin, end, bits);
    }
}
