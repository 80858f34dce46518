/* The rows of slots.h by the batch: one function a verb over a range of rows
 * of raw memory.
 *
 * Rows are absolute numbers: every array that goes with the rows (where,
 * found, codes, out) is indexed by the row, not from `begin`, so threads take
 * disjoint ranges of the same call. Nothing here allocates, fails or keeps a
 * pointer. Writers take `in` and `out`: `in.data == NULL` means rows of zeros
 * (new flags), `in` equal to `out` in data and stride means in place, and
 * otherwise they may not overlap; both have the same capacity. */
#ifndef OPGUARD_CORE_BATCH_H
#define OPGUARD_CORE_BATCH_H

#include "core/base.h"
#include "core/slots.h"

/* Borrowed memory: row r begins at data + r * stride, its slots lie side by
 * side, and it is aligned as its words are (4 bytes at least). */
typedef struct og_rows {
    char *data;
    int64_t stride;   /* bytes from row to row; 0 for one row seen many times
                         (readers only) */
    int32_t capacity; /* slots a row, even, 2..2**31-2 */
} og_rows;

/* One value a row: row r's is `bytes` wide at data + r * stride. */
typedef struct og_column {
    const void *data;
    int64_t stride; /* bytes; 0 for one value in all rows */
    int32_t bytes;  /* 1, 2, 4 or 8 */
    bool is_signed;
} og_column;

/* The severity of a code that came without one; fallback is for codes that
 * have none of their own (4, 8, 12, 15), 0 for code 0. */
int32_t
og_code_severity(int32_t code, int32_t fallback);

/* out = in. */
void
og_batch_copy(og_rows in, og_rows out, int64_t begin, int64_t end);

/* out = in with slot recorded where the mask says so. where is one byte a
 * row, row r's at where + r * where_stride, any non-zero value is true; NULL
 * for all rows. A slot that does not count records nothing. */
void
og_batch_push(og_rows in, og_rows out, const uint8_t *where,
              int64_t where_stride, uint16_t slot, og_policy p, int64_t begin,
              int64_t end);

/* out = in with what a scan found recorded: NAN, then INF, both CRITICAL.
 * found is OG_FOUND_* bits by row (scan.h); only those in checks count. */
void
og_batch_push_found(og_rows in, og_rows out, const uint8_t *found,
                    int32_t checks, int32_t location, og_policy p,
                    int64_t begin, int64_t end);

/* out = in with each row's own code recorded; code 0 records nothing.
 * severity is 0..3, or -1 for the code's own, where fallback is for the codes
 * that have none. Returns -1, or the first row whose code is not 0..15: such
 * rows record nothing, all others do. */
int64_t
og_batch_push_codes(og_rows in, og_rows out, og_column codes, int32_t location,
                    int32_t severity, int32_t fallback, og_policy p,
                    int64_t begin, int64_t end);

/* out = in with the errors of other (the younger) recorded. other has the
 * same capacity and must not overlap out, not even as its very same rows. */
void
og_batch_merge(og_rows in, og_rows other, og_rows out, og_policy p,
               int64_t begin, int64_t end);

/* Which rows of another batch make up each row: `count` integers a row, each
 * `stride` bytes behind the one before. */
typedef struct og_picks {
    const void *data;
    int64_t row_stride; /* bytes from row to row */
    int64_t stride;     /* bytes from pick to pick */
    int64_t count;      /* 0 or more */
    bool wide;          /* int64, else int32 */
} og_picks;

/* Row r of out = the rows of `in`, 0..rows-1, that r's picks name, in their
 * order: the first that holds anything as it is, then the errors of the others
 * recorded, a row that is named twice only once. -1 names none. All slots of
 * out are used, whatever p.num_slots says. out must not overlap in. seen:
 * NULL, or a bit for each row of `in`, all 0 before and after, which makes
 * many picks in any order quick. Returns -1, or the first row with a pick that
 * names no row and is not -1; such a pick is left out. */
int64_t
og_batch_gather(og_rows in, int64_t rows, og_picks picks, og_rows out,
                uint64_t *seen, og_policy p, int64_t begin, int64_t end);

/* out = in without the slots of this code, holes closed. */
void
og_batch_clear(og_rows in, og_rows out, int32_t code, int64_t begin,
               int64_t end);

/* out[r] = whether a non-zero slot of row r has slot & mask == value. */
void
og_batch_find(og_rows in, uint16_t mask, uint16_t value, bool *out,
              int64_t begin, int64_t end);

/* out[r] = whether row r holds an error, or, with `inverse`, whether not. */
void
og_batch_any(og_rows in, bool inverse, bool *out, int64_t begin, int64_t end);

/* Whether any of the rows holds an error. Stops at the first. */
bool
og_batch_has_any(og_rows in, int64_t begin, int64_t end);

/* Whether og_batch_find would say true of any of the rows. */
bool
og_batch_has(og_rows in, uint16_t mask, uint16_t value, int64_t begin,
             int64_t end);

/* out[r] = how many slots of row r are non-zero. */
void
og_batch_count(og_rows in, int32_t *out, int64_t begin, int64_t end);

/* The highest severity bits of any slot of row r, 0 for a clean row, written
 * to out[r], out being int64_t where wide, else int32_t. */
void
og_batch_max_severity(og_rows in, bool wide, void *out, int64_t begin,
                      int64_t end);

#endif
