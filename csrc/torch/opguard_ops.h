/* The public C interface of libopguard_ops.so. Loading the library registers
 * torch.ops.opguard.*; nothing has to be called for that.
 *
 * opguard._C does not link against it: it fetches the table below, so that
 * the parts that need no torch also work where there is none. */
#ifndef OPGUARD_OPS_H
#define OPGUARD_OPS_H

#include "core/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Grows at its end only; callers look at size before they use a newer field.
 * A tensor is given as the at::TensorImpl * that torch.Tensor._cdata holds. */
typedef struct og_ops {
    size_t size; /* sizeof(og_ops) of the library */
    /* Bytes of the storage, bytes of the elements, device type as torch
     * numbers it. OG_TORCH_FAILED for tensors without a storage (sparse). */
    og_status (*tensor_extent)(void *impl, int64_t *storage_bytes,
                               int64_t *element_bytes, int32_t *device_type);
    int32_t device_type_cpu;
    const char *(*cpu_isa)(void);
    /* OG_OK when the CUDA kernels can be loaded; err says why not. */
    og_status (*cuda_ready)(og_error *err);
    /* Address of the first byte of the storage, NULL where there is none. */
    og_status (*tensor_storage)(void *impl, void **data);
} og_ops;

/* A static table, never NULL; any thread. */
OG_EXPORT const og_ops *
og_ops_table(void);

/* OG_OK when loading registered the ops; err says why not. */
OG_EXPORT og_status
og_ops_registered(og_error *err);

#ifdef __cplusplus
}
#endif
#endif
