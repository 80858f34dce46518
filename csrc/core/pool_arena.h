/* An arena: addresses on a GPU that are reserved once, exactly as many as a
 * model needs, and have memory behind them only while the model is there. A
 * pointer into it therefore stays the same for good.
 *
 * Memory comes and goes in parts. Of one arena one call runs at a time; the
 * caller sees to that, and that nothing queued still uses what it unmaps. */
#ifndef OPGUARD_CORE_POOL_ARENA_H
#define OPGUARD_CORE_POOL_ARENA_H

#include "core/pool_arena_driver.h"

typedef struct og_arena_part {
    int64_t start, end;
} og_arena_part;

typedef struct og_arena {
    og_device *device; /* borrowed; outlives the arena */
    og_cu_address address;
    int64_t nbytes; /* a multiple of the device's granularity */
    int64_t mapped; /* bytes that have memory */
    og_arena_part *parts;
    size_t count, capacity;
} og_arena;

/* nbytes > 0 is rounded up. The arena is the caller's, who frees it. */
og_status
og_arena_new(og_device *device, int64_t nbytes, og_arena **out, og_error *err);

/* NULL is nothing. Waits for all that is queued, then unmaps what is left;
 * where that cannot be waited for, memory that may be in use stays. */
void
og_arena_free(og_arena *arena);

/* Memory behind [start, end), multiples of the granularity, in one piece;
 * its contents are anything. OG_NO_MEMORY where the GPU has none; nothing is
 * mapped after a failure. */
og_status
og_arena_map(og_arena *arena, int64_t start, int64_t end, og_error *err);

/* Gives a part back that was mapped by the same numbers. */
og_status
og_arena_unmap(og_arena *arena, int64_t start, int64_t end, og_error *err);

/* OG_BAD_ARGUMENT unless [start, start + nbytes) lies in one mapped part. */
og_status
og_arena_check(const og_arena *arena, int64_t start, int64_t nbytes,
               og_error *err);

#endif
