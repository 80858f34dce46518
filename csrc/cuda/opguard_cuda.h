/* The whole interface to the CUDA kernels: raw device pointers, sizes, a
 * stream. The kernels live in libopguard_cuda.so, which load.c opens at the
 * first use; a machine without CUDA never loads it.
 *
 * Kernels launch and never synchronise or allocate, so a CUDA graph can
 * capture them. */
#ifndef OPGUARD_CUDA_H
#define OPGUARD_CUDA_H

#include "core/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One block of bytes to copy to an offset of a packed buffer. */
typedef struct og_cuda_span {
    const void *source; /* device memory, readable for bytes */
    int64_t offset;     /* a multiple of OG_PACK_ALIGN (core/layout.h) */
    int64_t bytes;      /* 0 allowed */
} og_cuda_span;

/* What libopguard_cuda.so exports; each returns cudaError_t as int. spans is
 * host memory and may be freed on return. */
OG_EXPORT int
og_cuda_launch_pack(void *packed, const og_cuda_span *spans, size_t count,
                    int device, void *stream);
/* A static text; never NULL. */
OG_EXPORT const char *
og_cuda_error_text(int code);

/* What load.c offers the layers above: the same, loaded on demand. */
og_status
og_cuda_ready(og_error *err);
og_status
og_cuda_pack(void *packed, const og_cuda_span *spans, size_t count, int device,
             void *stream, og_error *err);

#ifdef __cplusplus
}
#endif
#endif
