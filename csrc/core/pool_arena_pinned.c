/* Pinned blocks, and the ring that pageable memory is copied through.
 *
 * The ring belongs to a device and serves one copy at a time, under its lock.
 * A slot that a copy uses has an event recorded behind it: whoever wants the
 * slot next waits for that. */
#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */
#include "core/pool_arena_pinned.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE (INT64_C(2) << 20)
#define BLOCK 4096
#define SLOTS 4

typedef struct slot {
    og_cu_event event;
    bool busy; /* a copy was queued that the event stands behind */
} slot;

struct og_ring {
    pthread_mutex_t lock;
    int64_t chunk; /* bytes of a slot */
    og_pinned *memory;
    slot slots[SLOTS];
};

/* --- pinned blocks ------------------------------------------------------- */

static int64_t
round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* A map that begins where a huge page may; what was too much is cut off. */
static char *
map_memory(int64_t nbytes)
{
    size_t size = (size_t)nbytes;
    size_t spare = nbytes >= HUGE_PAGE ? (size_t)HUGE_PAGE : 0;
    char *memory = mmap(NULL, size + spare, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return NULL;
    }
    size_t cut = spare == 0 ? 0 : (spare - (uintptr_t)memory % spare) % spare;
    if (cut > 0) {
        (void)munmap(memory, cut);
    }
    if (spare - cut > 0) {
        (void)munmap(memory + cut + size, spare - cut);
    }
#ifdef MADV_HUGEPAGE
    (void)madvise(memory + cut, size, MADV_HUGEPAGE);
#endif
    /* After a fork whoever writes first gets another page, and a device goes
     * on with the one that was pinned. A child has no use for it. */
    (void)madvise(memory + cut, size, MADV_DONTFORK);
    return memory + cut;
}

og_status
og_pinned_new(og_device *device, int64_t nbytes, og_pinned **out,
              og_error *err)
{
    if (nbytes <= 0 || nbytes > INT64_MAX - 2 * HUGE_PAGE) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected pinned memory of at least one byte, got "
                       "%lld",
                       (long long)nbytes);
    }
    int64_t pages = round_up(nbytes, sysconf(_SC_PAGESIZE));
    og_pinned *pinned = calloc(1, sizeof *pinned);
    char *memory = pinned == NULL ? NULL : map_memory(pages);
    if (memory == NULL) {
        free(pinned);
        return og_fail(err, OG_NO_MEMORY,
                       "no host memory for a pinned block of %lld bytes",
                       (long long)nbytes);
    }
    og_scope scope;
    og_status status = og_device_enter(device, &scope, err);
    if (status == OG_OK) {
        status = og_device_outcome(
            device, device->cu.pin(memory, (size_t)pages, OG_CU_PORTABLE),
            "pinning host memory", err);
        og_device_leave(&scope);
    }
    if (status != OG_OK) {
        (void)munmap(memory, (size_t)pages);
        free(pinned);
        return status;
    }
    *pinned = (og_pinned){device, memory, nbytes};
    *out = pinned;
    return OG_OK;
}

void
og_pinned_free(og_pinned *pinned)
{
    og_scope scope;
    if (pinned == NULL) {
        return;
    }
    bool gone = false;
    if (og_device_enter(pinned->device, &scope, NULL) == OG_OK) {
        const og_cu_table *cu = &pinned->device->cu;
        int code = cu->stream_finish(pinned->device->copies);
        if (code == 0) {
            code = cu->unpin(pinned->memory);
        }
        /* Pages that a device may still read are left alone. */
        gone = code == 0 || code == OG_CU_DEINITIALIZED;
        og_device_leave(&scope);
    }
    if (gone) {
        int64_t pages = round_up(pinned->nbytes, sysconf(_SC_PAGESIZE));
        (void)munmap(pinned->memory, (size_t)pages);
    }
    free(pinned);
}

/* --- copies from and to pinned blocks ------------------------------------ */

static og_status
check(const og_arena *arena, int64_t start, const og_pinned *pinned,
      int64_t at, int64_t nbytes, og_error *err)
{
    if (at < 0 || nbytes < 0 || at > pinned->nbytes ||
        nbytes > pinned->nbytes - at) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %lld bytes from %lld to lie in a pinned "
                       "block of %lld",
                       (long long)nbytes, (long long)at,
                       (long long)pinned->nbytes);
    }
    return og_arena_check(arena, start, nbytes, err);
}

og_status
og_arena_copy_in(og_arena *arena, int64_t start, const og_pinned *from,
                 int64_t at, int64_t nbytes, og_error *err)
{
    const og_device *device = arena->device;
    og_scope scope;
    og_status status = check(arena, start, from, at, nbytes, err);
    if (status == OG_OK) {
        status = og_device_enter(device, &scope, err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_device_outcome(
        device,
        device->cu.copy_in(arena->address + (og_cu_address)start,
                           from->memory + at, (size_t)nbytes, device->copies),
        "copying to the device", err);
    og_device_leave(&scope);
    return status;
}

og_status
og_arena_copy_out(const og_arena *arena, int64_t start, og_pinned *to,
                  int64_t at, int64_t nbytes, og_error *err)
{
    const og_device *device = arena->device;
    og_scope scope;
    og_status status = check(arena, start, to, at, nbytes, err);
    if (status == OG_OK) {
        status = og_device_enter(device, &scope, err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_device_outcome(
        device,
        device->cu.copy_out(to->memory + at,
                            arena->address + (og_cu_address)start,
                            (size_t)nbytes, device->copies),
        "copying from the device", err);
    og_device_leave(&scope);
    return status;
}

int64_t
og_copy_changed(void *to, const void *from, int64_t nbytes)
{
    int64_t changed = 0;
    for (int64_t at = 0; at < nbytes; at += BLOCK) {
        size_t size = (size_t)(nbytes - at < BLOCK ? nbytes - at : BLOCK);
        if (memcmp((char *)to + at, (const char *)from + at, size) != 0) {
            memcpy((char *)to + at, (const char *)from + at, size);
            changed += (int64_t)size;
        }
    }
    return changed;
}

/* --- the ring ------------------------------------------------------------ */

og_status
og_ring_new(int64_t nbytes, og_ring **out, og_error *err)
{
    if (nbytes < SLOTS * BLOCK) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a ring of at least %d bytes, got %lld",
                       SLOTS * BLOCK, (long long)nbytes);
    }
    og_ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL || pthread_mutex_init(&ring->lock, NULL) != 0) {
        free(ring);
        return og_fail(err, OG_NO_MEMORY, "no memory for a ring");
    }
    ring->chunk = nbytes / SLOTS / BLOCK * BLOCK;
    *out = ring;
    return OG_OK;
}

void
og_ring_free(og_device *device, bool inside)
{
    og_ring *ring = device->ring;
    if (ring == NULL) {
        return;
    }
    for (int i = 0; inside && i < SLOTS; i++) {
        if (ring->slots[i].event != NULL) {
            (void)device->cu.event_free(ring->slots[i].event);
        }
    }
    og_pinned_free(ring->memory);
    pthread_mutex_destroy(&ring->lock);
    free(ring);
    device->ring = NULL;
}

/* Memory and events of the ring, at its first use; under its lock. */
static og_status
ready_ring(og_device *device, og_error *err)
{
    og_ring *ring = device->ring;
    og_status status = OG_OK;
    if (ring->memory == NULL) {
        status =
            og_pinned_new(device, ring->chunk * SLOTS, &ring->memory, err);
    }
    for (int i = 0; status == OG_OK && i < SLOTS; i++) {
        if (ring->slots[i].event == NULL) {
            status =
                og_device_outcome(device,
                                  device->cu.event_new(&ring->slots[i].event,
                                                       OG_CU_SLEEP_NO_TIMING),
                                  "making an event", err);
        }
    }
    return status;
}

static char *
slot_memory(const og_ring *ring, int which)
{
    return ring->memory->memory + which * ring->chunk;
}

static og_status
await_slot(const og_device *device, slot *one, og_error *err)
{
    if (!one->busy) {
        return OG_OK;
    }
    one->busy = false;
    return og_device_outcome(device, device->cu.event_finish(one->event),
                             "waiting for a copy", err);
}

static og_status
mark_slot(const og_device *device, slot *one, og_error *err)
{
    og_status status = og_device_outcome(
        device, device->cu.event_record(one->event, device->copies),
        "recording an event", err);
    one->busy = status == OG_OK;
    return status;
}

static int64_t
chunk_at(const og_ring *ring, int64_t at, int64_t nbytes)
{
    return nbytes - at < ring->chunk ? nbytes - at : ring->chunk;
}

static og_status
push_chunks(og_arena *arena, int64_t start, const char *from, int64_t nbytes,
            og_error *err)
{
    og_device *device = arena->device;
    og_ring *ring = device->ring;
    og_status status = ready_ring(device, err);
    int which = 0;
    for (int64_t at = 0; status == OG_OK && at < nbytes; at += ring->chunk) {
        slot *one = &ring->slots[which];
        int64_t size = chunk_at(ring, at, nbytes);
        status = await_slot(device, one, err);
        if (status != OG_OK) {
            break;
        }
        memcpy(slot_memory(ring, which), from + at, (size_t)size);
        status = og_device_outcome(
            device,
            device->cu.copy_in(arena->address + (og_cu_address)(start + at),
                               slot_memory(ring, which), (size_t)size,
                               device->copies),
            "copying to the device", err);
        if (status == OG_OK) {
            status = mark_slot(device, one, err);
        }
        which = (which + 1) % SLOTS;
    }
    return status;
}

/* Slots that a copy may still use after a failure are waited for, so that
 * whoever comes next finds a ring at rest. */
static void
settle_ring(const og_device *device)
{
    (void)device->cu.stream_finish(device->copies);
    for (int i = 0; i < SLOTS; i++) {
        device->ring->slots[i].busy = false;
    }
}

static og_status
begin_chunk(const og_arena *arena, int64_t start, int64_t index,
            int64_t nbytes, og_error *err)
{
    const og_device *device = arena->device;
    og_ring *ring = device->ring;
    int which = (int)(index % SLOTS);
    int64_t at = index * ring->chunk;
    og_status status = await_slot(device, &ring->slots[which], err);
    if (status == OG_OK) {
        status = og_device_outcome(
            device,
            device->cu.copy_out(slot_memory(ring, which),
                                arena->address + (og_cu_address)(start + at),
                                (size_t)chunk_at(ring, at, nbytes),
                                device->copies),
            "copying from the device", err);
    }
    return status == OG_OK ? mark_slot(device, &ring->slots[which], err)
                           : status;
}

/* One chunk that has arrived, to where it belongs. */
static og_status
take_chunk(const og_device *device, int64_t index, char *to, int64_t nbytes,
           int64_t *changed, og_error *err)
{
    og_ring *ring = device->ring;
    int which = (int)(index % SLOTS);
    int64_t at = index * ring->chunk;
    og_status status = await_slot(device, &ring->slots[which], err);
    if (status == OG_OK) {
        *changed += og_copy_changed(to + at, slot_memory(ring, which),
                                    chunk_at(ring, at, nbytes));
    }
    return status;
}

static og_status
pull_chunks(const og_arena *arena, int64_t start, char *to, int64_t nbytes,
            int64_t *changed, og_error *err)
{
    og_device *device = arena->device;
    og_status status = ready_ring(device, err);
    int64_t count = (nbytes + device->ring->chunk - 1) / device->ring->chunk;
    int64_t begun = 0, taken = 0;
    while (status == OG_OK && taken < count) {
        if (begun < count && begun - taken < SLOTS) {
            status = begin_chunk(arena, start, begun++, nbytes, err);
        }
        else {
            status = take_chunk(device, taken++, to, nbytes, changed, err);
        }
    }
    return status;
}

/* Checks, enters and takes the ring; OG_OK means that all three are held. */
static og_status
open_ring(const og_arena *arena, int64_t start, int64_t nbytes,
          og_scope *scope, og_error *err)
{
    og_status status = og_arena_check(arena, start, nbytes, err);
    if (status == OG_OK) {
        status = og_device_enter(arena->device, scope, err);
    }
    if (status == OG_OK) {
        pthread_mutex_lock(&arena->device->ring->lock);
    }
    return status;
}

static void
close_ring(const og_arena *arena, og_scope *scope, og_status status)
{
    if (status != OG_OK) {
        settle_ring(arena->device);
    }
    pthread_mutex_unlock(&arena->device->ring->lock);
    og_device_leave(scope);
}

og_status
og_arena_stage_in(og_arena *arena, int64_t start, const void *from,
                  int64_t nbytes, og_error *err)
{
    og_scope scope;
    og_status status = open_ring(arena, start, nbytes, &scope, err);
    if (status == OG_OK) {
        status = push_chunks(arena, start, from, nbytes, err);
        close_ring(arena, &scope, status);
    }
    return status;
}

og_status
og_arena_stage_out(const og_arena *arena, int64_t start, void *to,
                   int64_t nbytes, int64_t *changed, og_error *err)
{
    og_scope scope;
    int64_t written = 0;
    og_status status = open_ring(arena, start, nbytes, &scope, err);
    if (status == OG_OK) {
        status = pull_chunks(arena, start, to, nbytes, &written, err);
        close_ring(arena, &scope, status);
    }
    if (status == OG_OK) {
        *changed = written;
    }
    return status;
}
