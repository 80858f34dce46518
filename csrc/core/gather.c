/* Rows made of other rows: copied where there is one, merged where there are
 * several. Rows without errors, nearly all, are looked at and passed over. */
#include "core/rows.h"

/* Rows that one word of `seen` is about. */
enum { SEEN_BITS = 64 };

static int64_t
pick_at(og_picks picks, int64_t r, int64_t k)
{
    const char *at =
        (const char *)picks.data + r * picks.row_stride + k * picks.stride;
    int64_t wide;
    int32_t narrow;
    if (picks.wide) {
        memcpy(&wide, at, sizeof wide);
        return wide;
    }
    memcpy(&narrow, at, sizeof narrow);
    return narrow;
}

/* Whether a pick names a row; -1 and what is out of range do not. */
static bool
names_row(int64_t pick, int64_t rows)
{
    return (uint64_t)pick < (uint64_t)rows;
}

/* One pick a row: `bytes` is a constant where this is inlined. */
static inline int64_t
copy_picked(og_rows in, int64_t rows, og_picks picks, og_rows out,
            size_t bytes, int64_t begin, int64_t end)
{
    int64_t bad = -1;
    for (int64_t r = begin; r < end; r++) {
        int64_t pick = pick_at(picks, r, 0);
        if (OG_LIKELY(names_row(pick, rows))) {
            memcpy(og_row_at(out, r), og_row_at(in, pick), bytes);
            continue;
        }
        memset(og_row_at(out, r), 0, bytes);
        if (pick != -1 && bad < 0) {
            bad = r;
        }
    }
    return bad;
}

static int64_t
copy_rows(og_rows in, int64_t rows, og_picks picks, og_rows out, int64_t begin,
          int64_t end)
{
    switch (out.capacity) {
        case 4:
            return copy_picked(in, rows, picks, out, 8, begin, end);
        case 8:
            return copy_picked(in, rows, picks, out, 16, begin, end);
        case 16:
            return copy_picked(in, rows, picks, out, 32, begin, end);
        case 32:
            return copy_picked(in, rows, picks, out, 64, begin, end);
        default:
            return copy_picked(in, rows, picks, out, (size_t)og_row_bytes(out),
                               begin, end);
    }
}

/* Whether one of the picks before k is this one too. */
static bool
named_before(og_picks picks, int64_t r, int64_t k, int64_t pick)
{
    for (int64_t i = 0; i < k; i++) {
        if (pick_at(picks, r, i) == pick) {
            return true;
        }
    }
    return false;
}

/* A row in the making. */
typedef struct fold {
    int64_t highest; /* of the rows taken so far, -1 */
    uint64_t *seen;  /* the rows taken so far */
    bool marked;     /* a bit is set in it */
} fold;

/* Whether this row is to be taken, once: ascending picks need no memory. */
static bool
take(fold *f, og_picks picks, int64_t r, int64_t k, int64_t pick)
{
    bool known = false;
    uint64_t bit = (uint64_t)1 << pick % SEEN_BITS;
    if (pick <= f->highest) {
        known = f->seen != NULL ? (f->seen[pick / SEEN_BITS] & bit) != 0
                                : named_before(picks, r, k, pick);
    }
    if (!known && f->seen != NULL) {
        f->seen[pick / SEEN_BITS] |= bit;
        f->marked = true;
    }
    f->highest = pick > f->highest ? pick : f->highest;
    return !known;
}

/* Makes row r; whether all of its picks were right. */
static bool
fold_row(og_rows in, int64_t rows, og_picks picks, og_rows out, uint64_t *seen,
         og_policy p, int64_t r)
{
    fold f = {.highest = -1, .seen = seen};
    const og_rows to = {(char *)og_row_at(out, r), 0, out.capacity};
    bool right = true;
    memset(to.data, 0, (size_t)og_row_bytes(out));
    for (int64_t k = 0; k < picks.count; k++) {
        int64_t pick = pick_at(picks, r, k);
        if (!names_row(pick, rows)) {
            right = right && pick == -1;
            continue;
        }
        const uint16_t *row = og_row_at(in, pick);
        if (OG_LIKELY(og_row_is_clean(row, in.capacity))) {
            continue;
        }
        bool first = f.highest < 0;
        if (take(&f, picks, r, k, pick)) {
            const og_rows from = {(char *)(uintptr_t)row, 0, in.capacity};
            if (first) {
                og_batch_copy(from, to, 0, 1);
            }
            else {
                og_batch_merge(to, from, to, p, 0, 1);
            }
        }
    }
    for (int64_t k = 0; f.marked && k < picks.count; k++) {
        int64_t pick = pick_at(picks, r, k);
        if (names_row(pick, rows)) {
            seen[pick / SEEN_BITS] = 0;
        }
    }
    return right;
}

int64_t
og_batch_gather(og_rows in, int64_t rows, og_picks picks, og_rows out,
                uint64_t *seen, og_policy p, int64_t begin, int64_t end)
{
    int64_t bad = -1;
    p.num_slots = out.capacity;
    if (picks.count == 1) {
        return copy_rows(in, rows, picks, out, begin, end);
    }
    for (int64_t r = begin; r < end; r++) {
        if (!fold_row(in, rows, picks, out, seen, p, r) && bad < 0) {
            bad = r;
        }
    }
    return bad;
}
