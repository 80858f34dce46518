/* Reserving addresses, and mapping memory behind them and away. */
#define _POSIX_C_SOURCE 199309L /* nanosleep */
#include "core/pool_arena.h"

#include <stdlib.h>
#include <time.h>

/* Milliseconds to wait for the end of a capture where nobody can be told. */
#define PATIENCE 1000

static bool
is_whole(const og_arena *arena, int64_t start, int64_t end)
{
    int64_t unit = arena->device->granularity;
    return start >= 0 && start < end && end <= arena->nbytes &&
           start % unit == 0 && end % unit == 0;
}

static og_status
reserve(og_arena *arena, og_error *err)
{
    const og_device *device = arena->device;
    og_scope scope;
    og_status status = og_device_enter(device, &scope, err);
    if (status != OG_OK) {
        return status;
    }
    og_cu_address address = 0;
    status = og_device_outcome(
        device,
        device->cu.reserve(&address, (size_t)arena->nbytes,
                           (size_t)device->granularity, 0, 0),
        "reserving addresses", err);
    og_device_leave(&scope);
    arena->address = address;
    return status;
}

og_status
og_arena_new(og_device *device, int64_t nbytes, og_arena **out, og_error *err)
{
    int64_t unit = device->granularity;
    if (unit <= 0) {
        return og_fail(err, OG_CUDA_FAILED,
                       "expected a GPU that maps memory at run time, GPU %d "
                       "does not",
                       device->ordinal);
    }
    if (nbytes <= 0 || nbytes > INT64_MAX - unit) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected an arena of at least one byte, got %lld",
                       (long long)nbytes);
    }
    og_arena *arena = calloc(1, sizeof *arena);
    if (arena == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for an arena");
    }
    arena->device = device;
    arena->nbytes = (nbytes + unit - 1) / unit * unit;
    og_status status = reserve(arena, err);
    if (status != OG_OK) {
        free(arena);
        return status;
    }
    *out = arena;
    return OG_OK;
}

/* Whether all that was queued is done by now. */
static bool
rest(const og_device *device)
{
    const struct timespec moment = {.tv_nsec = 1000000};
    for (int i = 0; og_device_captures(device); i++) {
        if (i == PATIENCE) {
            return false;
        }
        (void)nanosleep(&moment, NULL);
    }
    return device->cu.synchronize() == 0;
}

void
og_arena_free(og_arena *arena)
{
    og_scope scope;
    if (arena == NULL) {
        return;
    }
    if (og_device_enter(arena->device, &scope, NULL) == OG_OK) {
        const og_cu_table *cu = &arena->device->cu;
        int code = arena->count > 0 && !rest(arena->device);
        for (size_t i = 0; i < arena->count && code == 0; i++) {
            og_arena_part part = arena->parts[i];
            code = cu->unmap(arena->address + (og_cu_address)part.start,
                             (size_t)(part.end - part.start));
        }
        /* Addresses that still have memory are nobody else's. */
        if (code == 0) {
            (void)cu->unreserve(arena->address, (size_t)arena->nbytes);
        }
        og_device_leave(&scope);
    }
    free(arena->parts);
    free(arena);
}

/* The handle is given up at once: the mapping alone keeps the memory. */
static og_status
map_part(const og_arena *arena, og_cu_address at, size_t size, og_error *err)
{
    const og_device *device = arena->device;
    const og_cu_table *cu = &device->cu;
    og_cu_location here = {OG_CU_ON_DEVICE, device->ordinal};
    og_cu_property property = {.type = OG_CU_PINNED, .location = here};
    og_cu_access access = {here, OG_CU_READ_WRITE};
    og_cu_handle handle = 0;
    og_status status = og_device_outcome(
        device, cu->create(&handle, size, &property, 0), "making memory", err);
    if (status != OG_OK) {
        return status;
    }
    status = og_device_outcome(device, cu->map(at, size, 0, handle, 0),
                               "mapping memory", err);
    bool mapped = status == OG_OK;
    if (mapped) {
        status = og_device_outcome(device, cu->allow(at, size, &access, 1),
                                   "allowing access", err);
    }
    if (mapped && status != OG_OK) {
        (void)cu->unmap(at, size);
    }
    (void)cu->discard(handle);
    return status;
}

static og_status
grow(og_arena *arena, og_error *err)
{
    if (arena->count < arena->capacity) {
        return OG_OK;
    }
    size_t capacity = arena->capacity * 2 + 4;
    og_arena_part *parts =
        realloc(arena->parts, capacity * sizeof *arena->parts);
    if (parts == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for a part of an arena");
    }
    arena->parts = parts;
    arena->capacity = capacity;
    return OG_OK;
}

og_status
og_arena_map(og_arena *arena, int64_t start, int64_t end, og_error *err)
{
    og_status status = OG_OK;
    if (!is_whole(arena, start, end)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a part of multiples of %lld within %lld "
                       "bytes, got [%lld, %lld)",
                       (long long)arena->device->granularity,
                       (long long)arena->nbytes, (long long)start,
                       (long long)end);
    }
    for (size_t i = 0; i < arena->count; i++) {
        if (start < arena->parts[i].end && arena->parts[i].start < end) {
            return og_fail(err, OG_BAD_ARGUMENT,
                           "expected a part without memory, [%lld, %lld) has "
                           "some already",
                           (long long)start, (long long)end);
        }
    }
    og_scope scope;
    status = grow(arena, err);
    if (status == OG_OK) {
        status = og_device_enter(arena->device, &scope, err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = map_part(arena, arena->address + (og_cu_address)start,
                      (size_t)(end - start), err);
    og_device_leave(&scope);
    if (status == OG_OK) {
        arena->parts[arena->count++] = (og_arena_part){start, end};
        arena->mapped += end - start;
    }
    return status;
}

og_status
og_arena_unmap(og_arena *arena, int64_t start, int64_t end, og_error *err)
{
    const og_device *device = arena->device;
    size_t at = 0;
    while (at < arena->count &&
           (arena->parts[at].start != start || arena->parts[at].end != end)) {
        at++;
    }
    if (at == arena->count) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a part as it was mapped, got [%lld, %lld)",
                       (long long)start, (long long)end);
    }
    og_scope scope;
    og_status status = og_device_enter(device, &scope, err);
    if (status != OG_OK) {
        return status;
    }
    status = og_device_outcome(
        device,
        device->cu.unmap(arena->address + (og_cu_address)start,
                         (size_t)(end - start)),
        "unmapping memory", err);
    og_device_leave(&scope);
    if (status == OG_OK) {
        arena->parts[at] = arena->parts[--arena->count];
        arena->mapped -= end - start;
    }
    return status;
}

og_status
og_arena_check(const og_arena *arena, int64_t start, int64_t nbytes,
               og_error *err)
{
    for (size_t i = 0; i < arena->count; i++) {
        og_arena_part part = arena->parts[i];
        if (start >= part.start && nbytes >= 0 && start <= part.end &&
            nbytes <= part.end - start) {
            return OG_OK;
        }
    }
    return og_fail(err, OG_BAD_ARGUMENT,
                   "expected %lld bytes from %lld to lie in one mapped part "
                   "of the arena",
                   (long long)nbytes, (long long)start);
}
