/* The arithmetic of packed buffers. */
#include "core/layout.h"

int64_t
og_pack_stride(int64_t bytes)
{
    if (bytes < 0 || bytes > INT64_MAX - OG_PACK_ALIGN) {
        return -1;
    }
    return (bytes + OG_PACK_ALIGN - 1) / OG_PACK_ALIGN * OG_PACK_ALIGN;
}

bool
og_is_block(int64_t ndim, const int64_t *sizes, const int64_t *strides,
            int64_t numel)
{
    if (numel <= 1) {
        return true;
    }
    int64_t span = 1;
    for (int64_t d = 0; d < ndim; d++) {
        int64_t reach = 0;
        if (strides[d] < 0 ||
            __builtin_mul_overflow(sizes[d] - 1, strides[d], &reach) ||
            __builtin_add_overflow(span, reach, &span)) {
            return false;
        }
    }
    return span == numel;
}
