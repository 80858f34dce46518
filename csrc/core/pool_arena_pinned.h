/* Host memory that a GPU copies from and to by itself, and copies through it.
 *
 * A pinned block is of our own mmap and of exactly the size asked for; torch's
 * pinned allocator rounds up to a power of two. Pageable memory (a map of a
 * file) is never pinned, which would copy its pages: it goes through a small
 * ring of pinned chunks, one being filled while others are on their way.
 *
 * Forked children do not have a block: its addresses are nothing there. */
#ifndef OPGUARD_CORE_POOL_ARENA_PINNED_H
#define OPGUARD_CORE_POOL_ARENA_PINNED_H

#include "core/pool_arena.h"

typedef struct og_pinned {
    og_device *device; /* borrowed; outlives the block */
    char *memory;
    int64_t nbytes; /* as asked for; the map is of whole pages */
} og_pinned;

og_status
og_pinned_new(og_device *device, int64_t nbytes, og_pinned **out,
              og_error *err);

/* NULL is nothing. Waits for the copies that are queued. */
void
og_pinned_free(og_pinned *pinned);

/* Queues one copy on the side stream; the bytes of both sides must stay until
 * an event says that it is done. Ranges are checked. */
og_status
og_arena_copy_in(og_arena *arena, int64_t start, const og_pinned *from,
                 int64_t at, int64_t nbytes, og_error *err);

og_status
og_arena_copy_out(const og_arena *arena, int64_t start, og_pinned *to,
                  int64_t at, int64_t nbytes, og_error *err);

/* From pageable memory through the ring. The last copies may still be under
 * way when it returns; from is not read any more. */
og_status
og_arena_stage_in(og_arena *arena, int64_t start, const void *from,
                  int64_t nbytes, og_error *err);

/* To pageable memory through the ring, writing only blocks that differ, so
 * that unchanged pages of a private map stay the file's. *changed: bytes of
 * the blocks written. All is done when it returns. */
og_status
og_arena_stage_out(const og_arena *arena, int64_t start, void *to,
                   int64_t nbytes, int64_t *changed, og_error *err);

/* Writes the 4096-byte blocks of from that differ; returns their bytes. */
int64_t
og_copy_changed(void *to, const void *from, int64_t nbytes);

/* --- for pool_arena_driver.c --------------------------------------------- */

og_status
og_ring_new(int64_t nbytes, og_ring **out, og_error *err);

/* inside: the device is entered and alive. */
void
og_ring_free(og_device *device, bool inside);

#endif
