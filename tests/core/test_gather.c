/* Rows gathered by number against slots.h, one row and one slot at a time: all
 * capacities and policies, rows with gaps, picks of both widths in any order
 * of memory, with and without bits to remember by. */
#define _DEFAULT_SOURCE /* setenv */
#include "core/batch.h"

#include "tiers.h"

enum { MOST_ROWS = 90, MOST_PICKS = 70, GAP = 0xA5 };

/* Rows in memory of exactly their size. */
typedef struct batch {
    og_rows rows;
    int64_t count;
    size_t bytes;
} batch;

static batch
batch_new(int64_t count, int32_t capacity)
{
    int64_t gap = 4 * below(3);
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

static void
fill(batch b, int64_t rare)
{
    for (int64_t r = 0; r < b.count; r++) {
        int64_t used = below(rare) ? 0 : below(b.rows.capacity + 1);
        bool holes = below(6) == 0;
        for (int64_t i = 0; i < b.rows.capacity; i++) {
            uint16_t slot = og_slot_make((int32_t)below(6), (int32_t)below(4),
                                         (int32_t)below(4));
            row_of(b, r)[i] = i < used && !(holes && below(2)) ? slot : 0;
        }
    }
}

/* Picks in memory of their own; which ones, at wanted. */
static og_picks
picks_new(int64_t samples, int64_t count, int64_t rows, int64_t *wanted)
{
    int64_t bytes = below(2) ? 8 : 4, order = below(4);
    og_picks p = {.count = count, .wide = bytes == 8};
    p.stride = bytes * (1 + below(2));
    p.row_stride = p.stride * (count > 0 ? count : 1);
    if (order == 0) { /* one row of picks seen by all */
        p.row_stride = 0;
    }
    else if (order == 1) { /* side by side the other way */
        p.row_stride = p.stride;
        p.stride *= samples;
    }
    bool ascending = below(3) == 0;
    size_t size = (size_t)(samples * count * 2 * bytes + 16);
    char *data = malloc(size);
    p.data = data;
    for (int64_t r = 0; r < samples; r++) {
        for (int64_t k = 0; k < count; k++) {
            int64_t pick = below(8) == 0 ? -1 : below(rows + (rows == 0));
            pick = rows == 0               ? -1
                   : ascending && k < rows ? k
                   : below(150) == 0       ? (below(2) ? rows + below(3) : -2)
                                           : pick;
            char *at = data + r * p.row_stride + k * p.stride;
            memcpy(at, &pick, (size_t)bytes);
        }
    }
    for (int64_t r = 0; r < samples; r++) {
        for (int64_t k = 0; k < count; k++) {
            const char *at = data + r * p.row_stride + k * p.stride;
            int32_t narrow;
            memcpy(&narrow, at, 4);
            wanted[r * count + k] = narrow;
        }
    }
    return p;
}

static bool
empty(const uint16_t *row, int32_t capacity)
{
    for (int32_t i = 0; i < capacity; i++) {
        if (row[i] != 0) {
            return false;
        }
    }
    return true;
}

/* What the picks make of row r; whether all of them were right. */
static bool
expect(batch in, const int64_t *picks, int64_t count, uint16_t *row,
       og_policy p)
{
    int32_t capacity = in.rows.capacity;
    bool begun = false, right = true;
    p.num_slots = capacity;
    memset(row, 0, 2 * (size_t)capacity);
    for (int64_t k = 0; k < count; k++) {
        bool again = false;
        if (picks[k] < 0 || picks[k] >= in.count) {
            right = right && picks[k] == -1;
            continue;
        }
        for (int64_t before = 0; before < k; before++) {
            again = again || picks[before] == picks[k];
        }
        const uint16_t *from = row_of(in, picks[k]);
        if (again || empty(from, capacity)) {
            continue;
        }
        if (begun) {
            og_row_merge(row, from, capacity, p);
        }
        else {
            memcpy(row, from, 2 * (size_t)capacity);
        }
        begun = true;
    }
    return right;
}

static void
round_of_gather(void)
{
    static int64_t wanted[MOST_ROWS * MOST_PICKS];
    static uint16_t row[400];
    int32_t capacity = 2 * (1 + (int32_t)below(below(9) ? 20 : 150));
    int64_t rows = below(MOST_ROWS), samples = below(MOST_ROWS);
    int64_t count = below(3) ? 1 + below(4) : below(MOST_PICKS);
    int64_t begin = below(samples + 1), end = begin, bad = -1;
    end += below(samples - begin + 1);
    og_policy p = {.num_slots = 1 + (int32_t)below(capacity),
                   .priority = (int32_t)below(3),
                   .order = (int32_t)below(2),
                   .dedupe = (int32_t)below(4)};
    batch in = batch_new(rows, capacity), out = batch_new(samples, capacity);
    fill(in, 1 + below(5));
    og_picks picks = picks_new(samples, count, rows, wanted);
    uint64_t *seen = calloc(MOST_ROWS / 64 + 1, sizeof *seen);
    memset(out.rows.data, GAP, out.bytes);
    int64_t got = og_batch_gather(in.rows, rows, picks, out.rows,
                                  below(2) ? seen : NULL, p, begin, end);
    for (int64_t r = 0; r < samples; r++) {
        if (r < begin || r >= end) {
            memset(row, GAP, sizeof row);
        }
        else if (!expect(in, wanted + r * count, count, row, p)) {
            bad = bad < 0 ? r : bad;
        }
        CHECK(memcmp(row, row_of(out, r), 2 * (size_t)capacity) == 0);
        const char *gap = (char *)(row_of(out, r) + capacity);
        for (; r + 1 < samples && gap < (char *)row_of(out, r + 1); gap++) {
            CHECK((uint8_t)*gap == GAP);
        }
    }
    CHECK(got == bad);
    for (int64_t i = 0; i <= MOST_ROWS / 64; i++) {
        CHECK(seen[i] == 0);
    }
    free(seen);
    free((void *)(uintptr_t)picks.data);
    free(in.rows.data);
    free(out.rows.data);
}

static void
all(void)
{
    for (int round = 0; round < 6000; round++) {
        round_of_gather();
    }
}

int
main(void)
{
    return for_each_tier(all);
}
