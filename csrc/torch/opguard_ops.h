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

/* What flags_query asks of each sample. */
typedef enum og_flags_what {
    OG_FLAGS_FIND,        /* any non-zero slot with slot & mask == value */
    OG_FLAGS_OK,          /* no slot in use */
    OG_FLAGS_ERR,         /* some slot in use */
    OG_FLAGS_COUNT,       /* slots in use */
    OG_FLAGS_MAX_SEVERITY /* of all slots */
} og_flags_what;

/* What tensor_look tells. sizes are borrowed from the tensor; dtype and
 * device_type as torch numbers them; data is NULL where there is nothing to
 * read, in a fake tensor as in one without elements. */
typedef struct og_look {
    int64_t ndim;
    int64_t numel;
    const int64_t *sizes;
    const void *data;
    int32_t dtype;
    int32_t device_type;
} og_look;

/* What a step of flags_chain does to register `to`, 0..15; 0 is the result.
 * from: a register, or -1 for samples without errors. */
typedef enum og_step_kind {
    OG_STEP_LOAD,  /* to = tensor `other`, flags like the result */
    OG_STEP_CHECK, /* of tensor `other`; place: location, number: checks */
    OG_STEP_PUSH,  /* where tensor `other` says so, -1: all; place: the slot */
    OG_STEP_MERGE  /* of register `from` and the younger register `other` */
} og_step_kind;

typedef struct og_flags_step {
    int64_t kind;
    int64_t to;
    int64_t from;
    int64_t other;
    int64_t place;
    int64_t number;
    int64_t key;
} og_flags_step;

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

    /* The flag ops (schemas in library.c, semantics in core/slots.h). Every
     * tensor is borrowed; CPU or CUDA, all on one device. What is wrong with
     * an argument comes back as a status with one sentence in err, nothing
     * is written then. flags: (N, W) of int64, int32, float64 or float32,
     * NULL for samples without errors. out: allocated by the caller; flags
     * themselves for in place, else (N, W) contiguous, of flags' dtype. The
     * caller answers for what torch would do on the way: functorch, dispatch
     * modes, fake tensors (data NULL is refused), autograd of float flags.
     *
     * checks: 1 NaN, 2 +Inf, 4 -Inf; x without the conj or neg bit, unless 2
     * and 4 come together. */
    og_status (*flags_check)(void *x, void *flags, void *out, int64_t location,
                             int64_t checks, int64_t key, og_error *err);
    /* clamped: ids' shape and dtype, contiguous; NULL when not wanted. */
    og_status (*flags_index)(void *ids, void *flags, void *out, void *clamped,
                             int64_t size, int64_t location, int64_t key,
                             og_error *err);
    /* where: (N,) bool, NULL for every sample. */
    og_status (*flags_push)(void *flags, void *where, void *out, int64_t slot,
                            int64_t key, og_error *err);
    /* codes: (N,) integers; severity -1: by code, default_severity for codes
     * without one of their own. When a code is none, OG_BAD_CODE comes back
     * after the other samples' have been recorded in out. */
    og_status (*flags_push_codes)(void *flags, void *codes, void *out,
                                  int64_t location, int64_t severity,
                                  int64_t default_severity, int64_t key,
                                  og_error *err);
    /* count >= 1, eldest first; out may be the first of them. */
    og_status (*flags_merge)(void *const *flags, size_t count, void *out,
                             int64_t key, og_error *err);
    /* out: (N,) contiguous; bool for FIND, OK, ERR, int32 for COUNT, int64 or
     * int32 for MAX_SEVERITY. mask and value are for FIND alone. */
    og_status (*flags_query)(void *flags, og_flags_what what, int64_t mask,
                             int64_t value, void *out, og_error *err);
    og_status (*flags_clear)(void *flags, int64_t code, void *out,
                             og_error *err);
    /* The slots in use of one sample in host memory: at most capacity are
     * written, *used is how many there are. */
    og_status (*flags_read)(void *flags, int64_t row, uint16_t *slots,
                            int64_t capacity, int64_t *used, og_error *err);
    /* OG_TORCH_FAILED for tensors without strides or memory. */
    og_status (*tensor_look)(void *impl, og_look *look);
    /* Some of the above as one call, in host memory, at most 64 tensors; out
     * is none of them. */
    og_status (*flags_chain)(void *const *tensors, size_t tensor_count,
                             const og_flags_step *steps, size_t count,
                             void *out, og_error *err);
    /* index: (M,) or (M, K) of int64 or int32; out: (M, W) like flags, apart
     * from them. Row m is rows index[m] merged in their order; -1 is none. */
    og_status (*flags_gather)(void *flags, void *index, void *out, int64_t key,
                              og_error *err);
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
