/* What the files of core that go through rows share. */
#ifndef OPGUARD_CORE_ROWS_H
#define OPGUARD_CORE_ROWS_H

#include <string.h>

#include "core/batch.h"

static inline uint16_t *
og_row_at(og_rows rows, int64_t r)
{
    return (uint16_t *)(rows.data + r * rows.stride);
}

static inline int64_t
og_row_bytes(og_rows rows)
{
    return 2 * (int64_t)rows.capacity;
}

/* The next eight bytes: rows are aligned to four. */
static inline uint64_t
og_row_word(const uint16_t *slots)
{
    uint64_t word;
    memcpy(&word, slots, sizeof word);
    return word;
}

static inline bool
og_row_is_clean(const uint16_t *row, int32_t capacity)
{
    uint64_t any = 0;
    int32_t i = 0;
    for (; i + 4 <= capacity; i += 4) {
        any |= og_row_word(row + i);
    }
    for (; i < capacity; i++) {
        any |= row[i];
    }
    return any == 0;
}

#endif
