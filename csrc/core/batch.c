/* The batch of rows: copies first, then touches only the rows that change. */
#include "core/batch.h"

#include <string.h>

#include "core/cpu.h"
#include "core/kernels.h"
#include "core/rows.h"

/* Rows looked at together for "is anything there at all". */
enum { BLOCK_BYTES = 4096 };

/* How many slots come before the first empty one; *holes when some follow. */
static int32_t
leading(const uint16_t *row, int32_t capacity, bool *holes)
{
    int32_t used = 0;
    while (used < capacity && row[used] != 0) {
        used++;
    }
    *holes = !og_row_is_clean(row + used, capacity - used);
    return used;
}

/* Slots in use of a row, which is compacted if it has holes. */
static int32_t
row_used(uint16_t *row, int32_t capacity)
{
    bool holes;
    int32_t used = leading(row, capacity, &holes);
    return holes ? og_row_compact(row, capacity) : used;
}

static int32_t
room(int32_t capacity, og_policy p)
{
    return p.num_slots < capacity ? p.num_slots : capacity;
}

/* og_row_push of a slot that counts, quick where the row is clean. */
static void
row_record(uint16_t *row, int32_t capacity, og_policy p, uint16_t slot)
{
    if (OG_LIKELY(og_row_is_clean(row, capacity))) {
        row[0] = slot; /* under every policy */
        return;
    }
    (void)og_row_record(row, row_used(row, capacity), room(capacity, p), p,
                        slot);
}

/* og_row_merge, which looks at no more of other than is in use. */
static void
row_merge(uint16_t *row, const uint16_t *other, int32_t capacity, og_policy p)
{
    bool holes;
    int32_t count = leading(other, capacity, &holes),
            limit = room(capacity, p);
    if (holes) {
        og_row_merge(row, other, capacity, p);
        return;
    }
    bool backwards = p.priority == OG_CHRONO && p.order == OG_LAST;
    int32_t used = -1;
    for (int32_t i = 0; i < count; i++) {
        uint16_t slot = other[backwards ? count - 1 - i : i];
        if (og_slot_counts(slot)) {
            used = used < 0 ? row_used(row, capacity) : used;
            used = og_row_record(row, used, limit, p, slot);
        }
    }
}

/* og_row_clear, which writes only where something changes. */
static void
row_clear(uint16_t *row, int32_t capacity, int32_t code)
{
    bool holes, there = false;
    int32_t used = leading(row, capacity, &holes);
    for (int32_t i = 0; i < used && !there; i++) {
        there = og_slot_code(row[i]) == code;
    }
    if (there || holes) {
        og_row_clear(row, capacity, code);
    }
}

int32_t
og_code_severity(int32_t code, int32_t fallback)
{
    switch (code) {
        case 0:
            return 0;
        case OG_CODE_NAN:
        case OG_CODE_INF:
            return OG_SEVERITY_CRITICAL;
        case 3:
        case OG_CODE_OUT_OF_BOUNDS:
        case 6:
        case 7:
            return OG_SEVERITY_ERROR;
        case 9:
        case 10:
        case 11:
        case 13:
        case 14:
            return 1;
        default:
            return fallback;
    }
}

static bool
same_memory(og_rows a, og_rows b)
{
    return a.data == b.data && a.stride == b.stride;
}

void
og_batch_copy(og_rows in, og_rows out, int64_t begin, int64_t end)
{
    int64_t bytes = og_row_bytes(out);
    if (begin >= end || (in.data != NULL && same_memory(in, out))) {
        return;
    }
    bool dense =
        out.stride == bytes && (in.data == NULL || in.stride == bytes);
    int64_t step = dense ? end - begin : 1;
    for (int64_t r = begin; r < end; r += step) {
        char *to = out.data + r * out.stride;
        size_t size = (size_t)(bytes * step);
        if (in.data == NULL) {
            memset(to, 0, size);
        }
        else {
            memcpy(to, in.data + r * in.stride, size);
        }
    }
}

void
og_batch_push(og_rows in, og_rows out, const uint8_t *where,
              int64_t where_stride, uint16_t slot, og_policy p, int64_t begin,
              int64_t end)
{
    og_batch_copy(in, out, begin, end);
    if (!og_slot_counts(slot)) {
        return;
    }
    for (int64_t r = begin; r < end; r++) {
        if (where == NULL || where[r * where_stride] != 0) {
            row_record(og_row_at(out, r), out.capacity, p, slot);
        }
    }
}

/* The first row from r on in which something was found. */
static int64_t
next_found(const uint8_t *found, int64_t r, int64_t end)
{
    while (r + 8 <= end) {
        uint64_t eight;
        memcpy(&eight, found + r, sizeof eight);
        if (eight != 0) {
            return r + __builtin_ctzll(eight) / 8;
        }
        r += 8;
    }
    while (r < end && found[r] == 0) {
        r++;
    }
    return r;
}

void
og_batch_push_found(og_rows in, og_rows out, const uint8_t *found,
                    int32_t checks, int32_t location, og_policy p,
                    int64_t begin, int64_t end)
{
    const int32_t infs = checks & (OG_FOUND_POS_INF | OG_FOUND_NEG_INF);
    uint16_t nan = og_slot_make(location, OG_CODE_NAN, OG_SEVERITY_CRITICAL);
    uint16_t inf = og_slot_make(location, OG_CODE_INF, OG_SEVERITY_CRITICAL);
    og_batch_copy(in, out, begin, end);
    for (int64_t r = next_found(found, begin, end); r < end;
         r = next_found(found, r + 1, end)) {
        if ((found[r] & checks & OG_FOUND_NAN) != 0) {
            row_record(og_row_at(out, r), out.capacity, p, nan);
        }
        if ((found[r] & infs) != 0) {
            row_record(og_row_at(out, r), out.capacity, p, inf);
        }
    }
}

/* A column's value; unsigned ones of 2**63 and more come as -1. */
static int64_t
value_at(og_column column, int64_t r)
{
    const char *at = (const char *)column.data + r * column.stride;
    uint64_t raw = 0;
    memcpy(&raw, at, (size_t)column.bytes);
    if (column.is_signed) {
        int unused = 64 - 8 * column.bytes;
        return (int64_t)(raw << unused) >> unused;
    }
    return raw > INT64_MAX ? -1 : (int64_t)raw;
}

int64_t
og_batch_push_codes(og_rows in, og_rows out, og_column codes, int32_t location,
                    int32_t severity, int32_t fallback, og_policy p,
                    int64_t begin, int64_t end)
{
    int64_t bad = -1;
    og_batch_copy(in, out, begin, end);
    for (int64_t r = begin; r < end; r++) {
        int64_t code = value_at(codes, r);
        if (code < 0 || code > 15) {
            bad = bad < 0 ? r : bad;
            continue;
        }
        int32_t level = severity < 0
                            ? og_code_severity((int32_t)code, fallback)
                            : severity;
        uint16_t slot = og_slot_make(location, (int32_t)code, level);
        if (og_slot_counts(slot)) {
            row_record(og_row_at(out, r), out.capacity, p, slot);
        }
    }
    return bad;
}

/* Calls that skip clean rows go by blocks: the first row from r on, in the
 * block that begins there, that may hold something; `*until` is the block's
 * end. */
static int64_t
skip_clean(og_rows rows, int64_t r, int64_t end, int64_t *until)
{
    const og_kernels *kernels = og_cpu_kernels();
    int64_t bytes = og_row_bytes(rows);
    int64_t block = bytes < BLOCK_BYTES ? BLOCK_BYTES / bytes : 1;
    for (; rows.stride == bytes && r < end; r = *until) {
        *until = end - r < block ? end : r + block;
        if (kernels->has(og_row_at(rows, r), (*until - r) * rows.capacity, 0,
                         0)) {
            return r;
        }
    }
    *until = end;
    return r;
}

/* The one error of a row that holds no other, 0 for any other row. */
static uint16_t
only_slot(const uint16_t *row, int32_t capacity)
{
    return row[1] == 0 && og_row_is_clean(row + 1, capacity - 1) ? row[0] : 0;
}

static void
merge_one(uint16_t *row, const uint16_t *other, int32_t capacity, og_policy p)
{
    uint16_t slot = only_slot(other, capacity);
    if (slot == 0) {
        row_merge(row, other, capacity, p);
    }
    else if (og_slot_counts(slot)) {
        row_record(row, capacity, p, slot);
    }
}

void
og_batch_merge(og_rows in, og_rows other, og_rows out, og_policy p,
               int64_t begin, int64_t end)
{
    og_batch_copy(in, out, begin, end);
    int64_t until = begin;
    for (int64_t r = begin; r < end; r++) {
        if (r == until) {
            r = skip_clean(other, r, end, &until);
        }
        if (r < end && !og_row_is_clean(og_row_at(other, r), other.capacity)) {
            merge_one(og_row_at(out, r), og_row_at(other, r), out.capacity, p);
        }
    }
}

void
og_batch_clear(og_rows in, og_rows out, int32_t code, int64_t begin,
               int64_t end)
{
    og_batch_copy(in, out, begin, end);
    int64_t until = begin;
    for (int64_t r = begin; r < end; r++) {
        if (r == until) {
            r = skip_clean(out, r, end, &until);
        }
        if (r < end && !og_row_is_clean(og_row_at(out, r), out.capacity)) {
            row_clear(og_row_at(out, r), out.capacity, code);
        }
    }
}

void
og_batch_find(og_rows in, uint16_t mask, uint16_t value, bool *out,
              int64_t begin, int64_t end)
{
    og_cpu_kernels()->find(in, mask, value, false, out, begin, end);
}

void
og_batch_any(og_rows in, bool inverse, bool *out, int64_t begin, int64_t end)
{
    og_cpu_kernels()->find(in, 0, 0, inverse, out, begin, end);
}

bool
og_batch_has_any(og_rows in, int64_t begin, int64_t end)
{
    return og_batch_has(in, 0, 0, begin, end);
}

bool
og_batch_has(og_rows in, uint16_t mask, uint16_t value, int64_t begin,
             int64_t end)
{
    const og_kernels *kernels = og_cpu_kernels();
    if (begin >= end) {
        return false;
    }
    bool dense = in.stride == og_row_bytes(in);
    int64_t step = dense ? end - begin : 1;
    bool found = false;
    for (int64_t r = begin; r < end && !found; r += step) {
        found =
            kernels->has(og_row_at(in, r), step * in.capacity, mask, value);
    }
    return found;
}

void
og_batch_count(og_rows in, int32_t *out, int64_t begin, int64_t end)
{
    og_cpu_kernels()->count(in, out, begin, end);
}

void
og_batch_max_severity(og_rows in, bool wide, void *out, int64_t begin,
                      int64_t end)
{
    og_cpu_kernels()->severity(in, wide, out, begin, end);
}
