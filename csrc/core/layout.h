/* Where each leaf lies in a packed buffer, and whether a tensor's elements
 * fill one block of memory. One definition for the CPU and CUDA kernels and
 * for taking the buffer apart again. */
#ifndef OPGUARD_CORE_LAYOUT_H
#define OPGUARD_CORE_LAYOUT_H

#include "core/base.h"

/* Leaves begin at multiples of this many bytes: whole 16-byte vectors, and
 * every dtype aligned. */
#define OG_PACK_ALIGN 64

/* Bytes rounded up to the next leaf's beginning; -1 on overflow or bytes < 0.
 */
int64_t
og_pack_stride(int64_t bytes);

/* True when the elements span exactly as many places as there are elements:
 * contiguous in some order of the dimensions, so that their bytes can be
 * copied as one block. sizes and strides have ndim entries, in elements. */
bool
og_is_block(int64_t ndim, const int64_t *sizes, const int64_t *strides,
            int64_t numel);

#endif
