/* From tensors to what the flag runners take: reading, checking, allocating.
 * Nothing here throws; what is wrong is a status and one sentence. */
#ifndef OPGUARD_TORCH_FLAGS_READ_H
#define OPGUARD_TORCH_FLAGS_READ_H

#include "torch/flags.h"

/* Flags (N, W) with the words of a row side by side. */
typedef struct og_flags_view {
    AtenTensorHandle given; /* borrowed; NULL: nothing was opened */
    AtenTensorHandle copy;  /* owned; NULL unless given's words lie apart */
    og_rows rows;
    int64_t samples;
    int64_t words;
    int32_t dtype;
    int32_t device_type;
    int32_t device_index;
    bool writable;
} og_flags_view;

/* Reads flags; writable ones must have no two rows in one place. Words that
 * lie apart are copied, and copied back by closing a writable view. name is
 * for the sentence. view must be all zero; it is to be closed in any case. */
og_status
og_flags_open(og_flags_view *view, AtenTensorHandle flags, bool writable,
              const char *name, og_error *err);

/* Works on a contiguous copy from now on. */
og_status
og_flags_set_aside(og_flags_view *view, og_error *err);

/* status is the call's so far; it is returned unless closing itself fails. */
og_status
og_flags_close(og_flags_view *view, og_status status, og_error *err);

/* Where rows come from and go to. */
typedef struct og_flags_pair {
    og_flags_view from; /* given is NULL for no flags and in place */
    og_flags_view to;
    AtenTensorHandle *out;
    bool in_place;
    bool fresh; /* *out was made here */
} og_flags_pair;

/* Opens flags and *out. *out NULL: it is made, like flags, or, flags being
 * NULL, (samples, W) of the policy's carrier on the device of like. The two
 * being the same handle means in place. To be closed in any case, which
 * deletes a fresh *out when status is an error. pair must be all zero. */
og_status
og_flags_pair_open(og_flags_pair *pair, AtenTensorHandle flags,
                   AtenTensorHandle *out, int64_t samples,
                   const og_tensor *like, og_policy policy, og_error *err);
og_status
og_flags_pair_close(og_flags_pair *pair, og_status status, og_error *err);

/* What a runner takes. */
og_flags_rows
og_flags_pair_rows(const og_flags_pair *pair, og_policy policy);

/* A strided tensor; ndim 0 is seen as one sample. */
og_status
og_tensor_read(og_tensor *tensor, AtenTensorHandle handle, bool writable,
               const char *name, og_error *err);

bool
og_tensor_has_elements(const og_tensor *tensor);

/* A new contiguous tensor of ndim <= 2 dimensions. */
og_status
og_tensor_new(int64_t ndim, const int64_t *sizes, int32_t dtype,
              int32_t device_type, int32_t device_index, AtenTensorHandle *out,
              og_error *err);

/* flags.c: what several ops ask of their arguments. */
og_status
og_check_key(int64_t key, og_policy *policy, og_error *err);
/* 16 bits. */
og_status
og_check_word(int64_t value, const char *name, og_error *err);
/* As many samples as flags, on the same device. */
og_status
og_check_goes_with(const og_tensor *tensor, const og_flags_view *flags,
                   const char *name, og_error *err);

/* flags_clamp.c: fills call->clamped in host memory. */
void
og_flags_clamp(const og_flags_index *call);

static inline const og_flags_runner *
og_runner_of(int32_t device_type)
{
    return device_type == OG_DEVICE_CUDA ? &og_flags_cuda : &og_flags_cpu;
}

/* As in torch, "another dtype" for those that are not listed. */
const char *
og_dtype_name(int32_t dtype);
/* Slots in one word of a carrier, 0 when dtype is none. */
int32_t
og_dtype_slots(int32_t dtype);
og_scan_kind
og_dtype_kind(int32_t dtype);
/* Bytes of an integer dtype, 0 for all others, bool included. */
int32_t
og_dtype_integer(int32_t dtype, bool *is_signed);

/* OG_OK when this torch numbers its dtypes as flags.h does. */
og_status
og_dtypes_agree(og_error *err);

#endif
