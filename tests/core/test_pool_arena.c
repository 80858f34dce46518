/* What arenas do without a driver: errors said whole, and copies that touch
 * only what differs. With one, tests/torchfree/test_pool_arena.py. */
#include "core/pool_arena_pinned.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

static void
check_opening(void)
{
    og_error err = {OG_OK, ""};
    og_device *device = NULL;
    CHECK(og_device_open("/nowhere/libcuda.so", 0, 1 << 20, &device, &err) ==
          OG_NOT_FOUND);
    CHECK(device == NULL && err.status == OG_NOT_FOUND);
    CHECK(strstr(err.message, "/nowhere/libcuda.so") != NULL);
    CHECK(og_device_open("libm.so.6", 0, 1 << 20, &device, &err) ==
          OG_NOT_FOUND);
    CHECK(device == NULL && strstr(err.message, "cuInit") != NULL);
    og_device_close(NULL);
    og_arena_free(NULL);
    og_pinned_free(NULL);
}

static void
check_rings(void)
{
    og_ring *ring = NULL;
    og_error err = {OG_OK, ""};
    CHECK(og_ring_new(4095, &ring, &err) == OG_BAD_ARGUMENT && ring == NULL);
    CHECK(og_ring_new(1 << 16, &ring, &err) == OG_OK && ring != NULL);
    og_device device = {.ring = ring};
    og_ring_free(&device, false);
    CHECK(device.ring == NULL);
}

static void
check_parts(void)
{
    og_error err = {OG_OK, ""};
    og_arena_part parts[] = {{0, 4096}, {8192, 16384}};
    og_device device = {.granularity = 4096};
    og_arena arena = {
        .device = &device, .nbytes = 16384, .parts = parts, .count = 2};
    CHECK(og_arena_check(&arena, 0, 4096, &err) == OG_OK);
    CHECK(og_arena_check(&arena, 8200, 100, &err) == OG_OK);
    CHECK(og_arena_check(&arena, 16384, 0, &err) == OG_OK);
    CHECK(og_arena_check(&arena, 4000, 97, &err) == OG_BAD_ARGUMENT);
    CHECK(og_arena_check(&arena, 0, INT64_MAX, &err) == OG_BAD_ARGUMENT);
    CHECK(og_arena_check(&arena, 0, -1, &err) == OG_BAD_ARGUMENT);
    CHECK(og_arena_map(&arena, 4096, 12288, &err) == OG_BAD_ARGUMENT);
    CHECK(og_arena_map(&arena, 100, 4096, &err) == OG_BAD_ARGUMENT);
    CHECK(og_arena_map(&arena, 4096, 32768, &err) == OG_BAD_ARGUMENT);
    CHECK(og_arena_unmap(&arena, 8192, 12288, &err) == OG_BAD_ARGUMENT);
}

static void
check_changed(void)
{
    char to[10000], from[10000];
    memset(to, 1, sizeof to);
    memset(from, 1, sizeof from);
    CHECK(og_copy_changed(to, from, sizeof to) == 0);
    from[5000] = 2;
    CHECK(og_copy_changed(to, from, sizeof to) == 4096);
    from[9999] = 3;
    CHECK(og_copy_changed(to, from, sizeof to) == 10000 - 8192);
    CHECK(memcmp(to, from, sizeof to) == 0);
    CHECK(og_copy_changed(to, from, 0) == 0);
}

int
main(void)
{
    check_opening();
    check_rings();
    check_parts();
    check_changed();
    return failures != 0;
}
