/* The batch of rows against slots.h row by row, on each instruction set: all
 * capacities, strides with gaps, in place and not, in buffers of exact size
 * whose gaps must stay as they were. */
#define _DEFAULT_SOURCE /* setenv */
#include "core/batch.h"

#include "tiers.h"

enum { MOST_ROWS = 40, MOST_SLOTS = 300, GAP = 0xA5 };

/* A batch in memory of its own: rows of capacity slots, `gap` bytes after
 * each but the last. */
typedef struct batch {
    og_rows rows;
    int64_t count;
    size_t bytes;
} batch;

static batch
batch_new(int64_t count, int32_t capacity, int64_t gap)
{
    batch b = {.count = count};
    b.rows.capacity = capacity;
    b.rows.stride = 2 * (int64_t)capacity + gap;
    b.bytes = count > 0 ? (size_t)(count * b.rows.stride - gap) : 0;
    b.rows.data = malloc(b.bytes + (b.bytes == 0));
    memset(b.rows.data, GAP, b.bytes);
    return b;
}

static uint16_t *
row_of(batch b, int64_t r)
{
    return (uint16_t *)(b.rows.data + r * b.rows.stride);
}

static uint16_t
random_slot(void)
{
    /* Few locations, so that they meet; some slots that do not count. */
    return below(30) == 0
               ? (uint16_t)next_random()
               : og_slot_make((int32_t)below(6), 1 + (int32_t)below(3),
                              1 + (int32_t)below(3));
}

/* Clean, a few errors, full, or with holes. */
static void
fill(batch b)
{
    for (int64_t r = 0; r < b.count; r++) {
        int64_t mode = below(8), capacity = b.rows.capacity;
        int64_t used = mode < 4    ? 0
                       : mode < 6  ? below(capacity + 1)
                       : mode == 6 ? capacity
                                   : below(capacity + 1);
        for (int64_t i = 0; i < capacity; i++) {
            uint16_t slot = i < used ? random_slot() : 0;
            row_of(b, r)[i] = mode == 7 && below(3) ? 0 : slot;
        }
    }
}

static batch
same_as(batch b)
{
    batch copy = b;
    copy.rows.data = malloc(b.bytes + (b.bytes == 0));
    memcpy(copy.rows.data, b.rows.data, b.bytes);
    return copy;
}

static bool
equal(batch a, batch b)
{
    for (int64_t r = 0; r < a.count; r++) {
        if (memcmp(row_of(a, r), row_of(b, r), 2 * (size_t)a.rows.capacity) !=
            0) {
            return false;
        }
    }
    return true;
}

static bool
gaps_kept(batch b)
{
    for (int64_t r = 0; r + 1 < b.count; r++) {
        const char *end = (char *)(row_of(b, r) + b.rows.capacity);
        for (; end < (char *)row_of(b, r + 1); end++) {
            if ((uint8_t)*end != GAP) {
                return false;
            }
        }
    }
    return true;
}

static og_policy
random_policy(int32_t capacity)
{
    og_policy p = {.num_slots = 1 + (int32_t)below(2 * capacity),
                   .priority = (int32_t)below(3),
                   .order = (int32_t)below(2),
                   .dedupe = (int32_t)below(4)};
    return p;
}

/* One writer's call: what it is given, by row. */
typedef struct change {
    int which;
    og_policy policy;
    uint8_t where[MOST_ROWS * 3];
    int64_t where_stride;
    bool everywhere;
    uint16_t slot;
    int32_t checks, location, severity, fallback, code;
    og_column codes;
    batch other;
} change;

static int64_t
code_of(const change *c, int64_t r)
{
    const char *at = (const char *)c->codes.data + r * c->codes.stride;
    switch (c->codes.bytes * (c->codes.is_signed ? -1 : 1)) {
        case -1:
            return *(const int8_t *)at;
        case 1:
            return *(const uint8_t *)at;
        case -2:
            return *(const int16_t *)at;
        case -4:
            return *(const int32_t *)at;
        default:
            return *(const int64_t *)at;
    }
}

static void
expect_row(const change *c, uint16_t *row, int32_t capacity, int64_t r)
{
    const og_policy p = c->policy;
    uint8_t found = c->where[r];
    int64_t code;
    switch (c->which) {
        case 0:
            if (c->everywhere || c->where[r * c->where_stride] != 0) {
                og_row_push(row, capacity, p, c->slot);
            }
            break;
        case 1:
            if ((found & c->checks & 1) != 0) {
                og_row_push(row, capacity, p, og_slot_make(c->location, 1, 3));
            }
            if ((found & c->checks & 6) != 0) {
                og_row_push(row, capacity, p, og_slot_make(c->location, 2, 3));
            }
            break;
        case 2:
            code = code_of(c, r);
            if (code >= 0 && code <= 15) {
                int32_t level =
                    c->severity < 0
                        ? og_code_severity((int32_t)code, c->fallback)
                        : c->severity;
                og_row_push(row, capacity, p,
                            og_slot_make(c->location, (int32_t)code, level));
            }
            break;
        case 3:
            og_row_merge(row, row_of(c->other, r), capacity, p);
            break;
        default:
            og_row_clear(row, capacity, c->code);
    }
}

static void
apply(const change *c, og_rows in, og_rows out, int64_t begin, int64_t end)
{
    int64_t bad;
    switch (c->which) {
        case 0:
            og_batch_push(in, out, c->everywhere ? NULL : c->where,
                          c->where_stride, c->slot, c->policy, begin, end);
            break;
        case 1:
            og_batch_push_found(in, out, c->where, c->checks, c->location,
                                c->policy, begin, end);
            break;
        case 2:
            bad = og_batch_push_codes(in, out, c->codes, c->location,
                                      c->severity, c->fallback, c->policy,
                                      begin, end);
            for (int64_t r = begin; r < end; r++) {
                int64_t code = code_of(c, r);
                if (code < 0 || code > 15) {
                    CHECK(bad == r);
                    bad = -1;
                    break;
                }
            }
            CHECK(bad == -1);
            break;
        case 3:
            og_batch_merge(in, c->other.rows, out, c->policy, begin, end);
            break;
        default:
            og_batch_clear(in, out, c->code, begin, end);
    }
}

static void
random_change(change *c, batch like)
{
    static int64_t codes[MOST_ROWS];
    const int32_t widths[] = {1, 1, 2, 4, 8};
    int64_t quiet = below(3);
    c->which = (int)below(5);
    c->policy = random_policy(like.rows.capacity);
    c->where_stride = below(3);
    c->everywhere = below(3) == 0;
    for (size_t i = 0; i < sizeof c->where; i++) {
        c->where[i] = below(8) < quiet * 4 ? (uint8_t)below(8) : 0;
    }
    c->slot = random_slot();
    c->checks = (int32_t)below(8);
    c->location = (int32_t)below(OG_LOCATION_MAX + 1);
    c->severity = (int32_t)below(5) - 1;
    c->fallback = (int32_t)below(4);
    c->code = (int32_t)below(16);
    int kind = (int)below(5);
    int32_t bytes = widths[kind];
    for (int64_t r = 0; r < like.count; r++) {
        int64_t code = below(20) ? below(16) : below(400) - 200;
        memcpy((char *)codes + r * bytes, &code, (size_t)bytes);
    }
    c->codes = (og_column){codes, below(4) ? bytes : 0, bytes, kind != 1};
    c->other = batch_new(like.count, like.rows.capacity, 4 * below(3));
    fill(c->other);
}

static void
writers(void)
{
    const og_rows nothing = {NULL, 0, 0};
    for (int round = 0; round < 30000; round++) {
        int32_t capacity = 2 * (1 + (int32_t)below(below(9) ? 12 : 150));
        int64_t count = below(MOST_ROWS + 1), begin = below(count + 1);
        int64_t end = begin + below(count - begin + 1);
        batch in = batch_new(count, capacity, 4 * below(3)), into = in;
        bool fresh = below(4) == 0, in_place = !fresh && below(2);
        fill(in);
        change c;
        random_change(&c, in);
        if (!in_place) {
            into = batch_new(count, capacity, 4 * below(3));
            fill(into);
        }
        batch expected = same_as(into), before = same_as(in);
        for (int64_t r = begin; r < end; r++) {
            size_t bytes = 2 * (size_t)capacity;
            if (fresh) {
                memset(row_of(expected, r), 0, bytes);
            }
            else {
                memcpy(row_of(expected, r), row_of(in, r), bytes);
            }
            expect_row(&c, row_of(expected, r), capacity, r);
        }
        apply(&c, fresh ? nothing : in.rows, into.rows, begin, end);
        CHECK(equal(into, expected) && gaps_kept(into));
        CHECK(in_place || equal(in, before));
        if (!in_place) {
            free(into.rows.data);
        }
        free(in.rows.data);
        free(before.rows.data);
        free(expected.rows.data);
        free(c.other.rows.data);
    }
}

static void
check_readers(batch b, int64_t begin, int64_t end)
{
    uint16_t mask = below(3) ? OG_CODE_MASK : (uint16_t)next_random();
    uint16_t value = below(3) ? random_slot() & mask : 0;
    bool find[MOST_ROWS + 1], any[MOST_ROWS + 1], none[MOST_ROWS + 1];
    int32_t count[MOST_ROWS + 1], narrow[MOST_ROWS + 1];
    int64_t wide[MOST_ROWS + 1];
    bool has = false, has_any = false;
    memset(find, 2, sizeof find);
    memset(count, 0x77, sizeof count);
    memset(wide, 0x77, sizeof wide);
    og_batch_find(b.rows, mask, value, find, begin, end);
    og_batch_any(b.rows, false, any, begin, end);
    og_batch_any(b.rows, true, none, begin, end);
    og_batch_count(b.rows, count, begin, end);
    og_batch_max_severity(b.rows, true, wide, begin, end);
    og_batch_max_severity(b.rows, false, narrow, begin, end);
    for (int64_t r = 0; r < b.count; r++) {
        int32_t slots = 0, highest = 0;
        bool found = false;
        if (r < begin || r >= end) {
            uint8_t raw;
            memcpy(&raw, &find[r], 1);
            CHECK(raw == 2 && count[r] == 0x77777777);
            CHECK(wide[r] == 0x7777777777777777);
            continue;
        }
        for (int32_t i = 0; i < b.rows.capacity; i++) {
            uint16_t slot = row_of(b, r)[i];
            int32_t severity = og_slot_severity(slot);
            slots += slot != 0;
            highest = severity > highest ? severity : highest;
            found = found || (slot != 0 && (slot & mask) == value);
        }
        CHECK(find[r] == found && any[r] == (slots > 0));
        CHECK(none[r] == !any[r] && count[r] == slots);
        CHECK(wide[r] == highest && narrow[r] == highest);
        has = has || found;
        has_any = has_any || slots > 0;
    }
    CHECK(og_batch_has(b.rows, mask, value, begin, end) == has);
    CHECK(og_batch_has_any(b.rows, begin, end) == has_any);
}

static void
readers(void)
{
    for (int round = 0; round < 30000; round++) {
        int32_t capacity =
            2 * (1 + (int32_t)below(below(4) ? 20 : MOST_SLOTS / 2));
        int64_t count = below(below(3) ? 5 : MOST_ROWS + 1);
        int64_t begin = below(count + 1), end = begin;
        batch b = batch_new(count, capacity, 4 * below(3));
        end += below(count - begin + 1);
        fill(b);
        if (below(3) == 0) { /* one error, anywhere */
            for (int64_t r = 0; r < count; r++) {
                memset(row_of(b, r), 0, 2 * (size_t)capacity);
            }
            if (count > 0) {
                row_of(b, below(count))[below(capacity)] = random_slot();
            }
        }
        check_readers(b, begin, end);
        CHECK(gaps_kept(b));
        free(b.rows.data);
    }
}

static void
expanded(void)
{
    uint16_t slots[4] = {0, og_slot_make(3, 1, 3), 0, 0};
    const og_rows one = {(char *)slots, 0, 4};
    int32_t count[3];
    og_batch_count(one, count, 0, 3);
    CHECK(count[0] == 1 && count[1] == 1 && count[2] == 1);
    uint16_t copy[3][4];
    const og_rows out = {(char *)copy, 8, 4};
    og_batch_copy(one, out, 0, 3);
    CHECK(memcmp(copy[2], slots, sizeof slots) == 0);
}

static void
severities(void)
{
    const int32_t expected[] = {0, 3, 3, 2, 7, 2, 2, 2,
                                7, 1, 1, 1, 7, 1, 1, 7};
    for (int32_t code = 0; code < 16; code++) {
        CHECK(og_code_severity(code, 7) == expected[code]);
    }
}

static void
all(void)
{
    severities();
    expanded();
    readers();
    writers();
}

int
main(void)
{
    return for_each_tier(all);
}
