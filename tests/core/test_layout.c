/* The arithmetic of packed buffers against counting places one by one. */
#include "core/layout.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { MOST_DIMS = 4, MOST_PLACES = 4096 };

static uint32_t
next_random(uint32_t *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 8;
}

/* Marks every place the elements take; true when they are 0..numel-1. */
static bool
fills_block(int64_t ndim, const int64_t *sizes, const int64_t *strides,
            int64_t numel)
{
    static char taken[MOST_PLACES];
    memset(taken, 0, sizeof taken);
    for (int64_t i = 0; i < numel; i++) {
        int64_t rest = i, place = 0;
        for (int64_t d = ndim - 1; d >= 0; d--) {
            place += rest % sizes[d] * strides[d];
            rest /= sizes[d];
        }
        if (place < 0 || place >= numel) {
            return false;
        }
        taken[place] = 1;
    }
    return memchr(taken, 0, (size_t)numel) == NULL;
}

/* Dense in a random order of the dimensions, sometimes with a stride off. */
static void
random_shapes(void)
{
    uint32_t seed = 1;
    int blocks = 0, others = 0;
    for (int round = 0; round < 20000; round++) {
        int64_t sizes[MOST_DIMS], strides[MOST_DIMS];
        int order[MOST_DIMS] = {0, 1, 2, 3};
        int64_t ndim = next_random(&seed) % (MOST_DIMS + 1), numel = 1;
        for (int i = MOST_DIMS - 1; i > 0; i--) {
            int j = (int)(next_random(&seed) % (uint32_t)(i + 1));
            int held = order[i];
            order[i] = order[j];
            order[j] = held;
        }
        for (int i = 0; i < MOST_DIMS; i++) {
            int d = order[i];
            if (d < ndim) {
                sizes[d] = 1 + next_random(&seed) % 5;
                strides[d] = numel;
                numel *= sizes[d];
            }
        }
        if (ndim > 0 && next_random(&seed) % 3 == 0) {
            strides[next_random(&seed) % ndim] += 1 + next_random(&seed) % 3;
        }
        bool is_block = og_is_block(ndim, sizes, strides, numel);
        bool fills = fills_block(ndim, sizes, strides, numel);
        /* A stride of a dimension of size 1 does not matter. */
        CHECK(is_block == fills);
        blocks += is_block;
        others += !is_block;
    }
    CHECK(blocks > 1000 && others > 1000);
}

static void
edges(void)
{
    const int64_t two[2] = {2, 3}, dense[2] = {3, 1}, wide[2] = {4, 1};
    const int64_t negative[2] = {-3, 1}, expanded[2] = {0, 1};
    const int64_t huge[2] = {INT64_MAX, INT64_MAX};
    CHECK(og_is_block(0, NULL, NULL, 1));
    CHECK(og_is_block(0, NULL, NULL, 0));
    CHECK(og_is_block(2, two, dense, 6));
    CHECK(!og_is_block(2, two, wide, 6));
    CHECK(!og_is_block(2, two, negative, 6));
    CHECK(!og_is_block(2, two, expanded, 6));
    CHECK(!og_is_block(2, two, huge, 6));
    CHECK(og_is_block(2, huge, huge, 0));
}

static void
rounding(void)
{
    CHECK(og_pack_stride(0) == 0);
    CHECK(og_pack_stride(1) == OG_PACK_ALIGN);
    CHECK(og_pack_stride(OG_PACK_ALIGN) == OG_PACK_ALIGN);
    CHECK(og_pack_stride(OG_PACK_ALIGN + 1) == 2 * OG_PACK_ALIGN);
    CHECK(og_pack_stride(-1) == -1);
    CHECK(og_pack_stride(INT64_MAX) == -1);
    CHECK(og_pack_stride(INT64_MIN) == -1);
    for (int64_t bytes = 0; bytes < 1000; bytes++) {
        int64_t stride = og_pack_stride(bytes);
        CHECK(stride >= bytes && stride < bytes + OG_PACK_ALIGN);
        CHECK(stride % OG_PACK_ALIGN == 0);
    }
}

int
main(void)
{
    rounding();
    edges();
    random_shapes();
    return failures != 0;
}
