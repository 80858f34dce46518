/* Rows of flags by their numbers: copied, or several merged into one. */
#include "torch/flags_read.h"

/* (M,) or (M, K) of int64 or int32. */
static og_status
read_picks(og_picks *picks, int64_t *samples, AtenTensorHandle index,
           const og_flags_view *flags, og_error *err)
{
    og_tensor t;
    int64_t ndim = 0;
    og_status status =
        og_shim_check(aoti_torch_get_dim(index, &ndim), "index", err);
    if (status == OG_OK) {
        status = og_tensor_read(&t, index, false, "index", err);
    }
    if (status != OG_OK) {
        return status;
    }
    picks->wide = t.dtype == OG_DTYPE_INT64;
    if (ndim < 1 || ndim > 2 || (!picks->wide && t.dtype != OG_DTYPE_INT32)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected index of shape (M,) or (M, K) and int64 or "
                       "int32, got %lld dimensions of %s",
                       (long long)ndim, og_dtype_name(t.dtype));
    }
    if (t.device_type != flags->device_type ||
        t.device_index != flags->device_index) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected index on the device of flags, it is on "
                       "another; move one of them with .to");
    }
    int64_t bytes = picks->wide ? 8 : 4;
    *samples = t.sizes[0];
    picks->data = t.data;
    picks->count = ndim == 2 ? t.sizes[1] : 1;
    picks->row_stride = og_tensor_step(&t, bytes);
    picks->stride = picks->count > 1 ? t.strides[1] * bytes : 0;
    return OG_OK;
}

/* Makes *out, `samples` rows like those of flags, or checks the caller's. */
static og_status
open_out(og_flags_view *to, const og_flags_view *from, int64_t samples,
         AtenTensorHandle *out, og_error *err)
{
    og_status status = OG_OK;
    if (*out == NULL) {
        const int64_t sizes[2] = {samples, from->words};
        status = og_tensor_new(2, sizes, from->dtype, from->device_type,
                               from->device_index, out, err);
    }
    if (status == OG_OK) {
        status = og_flags_open(to, *out, true, "out", err);
    }
    if (status == OG_OK &&
        (to->samples != samples || to->words != from->words ||
         to->dtype != from->dtype || to->device_type != from->device_type ||
         to->device_index != from->device_index)) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected out of %lld rows like those of flags, %lld "
                       "words of %s on their device",
                       (long long)samples, (long long)from->words,
                       og_dtype_name(from->dtype));
    }
    return status;
}

og_status
og_flags_gather_run(AtenTensorHandle flags, AtenTensorHandle index,
                    AtenTensorHandle *out, int64_t key, og_error *err)
{
    og_flags_view from = {.given = NULL}, to = {.given = NULL};
    og_flags_gather call = {.picks = {.data = NULL}};
    bool fresh = *out == NULL;
    int64_t samples = 0;
    og_status status = og_check_key(key, &call.policy, err);
    if (status == OG_OK) {
        status = og_flags_open(&from, flags, false, "flags", err);
    }
    if (status == OG_OK) {
        status = read_picks(&call.picks, &samples, index, &from, err);
    }
    if (status == OG_OK) {
        status = open_out(&to, &from, samples, out, err);
    }
    if (status == OG_OK && samples > 0) {
        call.samples = samples;
        call.rows = from.samples;
        call.from = from.rows;
        call.to = to.rows;
        call.device_index = to.device_index;
        status = og_runner_of(to.device_type)->gather(&call, err);
    }
    status = og_flags_close(&from, status, err);
    status = og_flags_close(&to, status, err);
    if (status != OG_OK && fresh && *out != NULL) {
        (void)aoti_torch_delete_tensor_object(*out);
        *out = NULL;
    }
    return status;
}
