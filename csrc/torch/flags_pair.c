/* The two sides of a call that writes flags: the rows that were, and the rows
 * that will be. */
#include "torch/flags_read.h"

static int32_t
carrier_dtype(og_policy policy)
{
    static const int32_t carriers[4] = {
        [OG_INT64] = OG_DTYPE_INT64,
        [OG_INT32] = OG_DTYPE_INT32,
        [OG_FLOAT64] = OG_DTYPE_FLOAT64,
        [OG_FLOAT32] = OG_DTYPE_FLOAT32,
    };
    return carriers[policy.carrier];
}

/* Makes *pair->out and describes it without asking torch again. */
static og_status
make_out(og_flags_pair *pair, int64_t samples, const og_tensor *like,
         og_policy policy, og_error *err)
{
    og_flags_view *to = &pair->to;
    const og_flags_view *from = &pair->from;
    void *data = NULL;
    if (from->given != NULL) {
        *to = *from;
    }
    else {
        to->dtype = carrier_dtype(policy);
        int32_t slots = og_dtype_slots(to->dtype);
        to->samples = samples;
        to->words = (policy.num_slots + slots - 1) / slots;
        to->device_type = like->device_type;
        to->device_index = like->device_index;
        to->rows.capacity = (int32_t)to->words * slots;
    }
    to->copy = NULL;
    to->writable = true;
    to->rows.stride = 2 * (int64_t)to->rows.capacity;
    const int64_t sizes[2] = {to->samples, to->words};
    og_status status = og_tensor_new(2, sizes, to->dtype, to->device_type,
                                     to->device_index, pair->out, err);
    if (status != OG_OK) {
        return status;
    }
    pair->fresh = true;
    to->given = *pair->out;
    status = og_shim_check(torch_get_mutable_data_ptr(*pair->out, &data),
                           "reading a result's address", err);
    to->rows.data = data;
    return status;
}

/* The tensor the caller allocated must be like flags. */
static og_status
check_out(const og_flags_pair *pair, og_error *err)
{
    const og_flags_view *from = &pair->from, *to = &pair->to;
    if (from->given != NULL &&
        (from->samples != to->samples || from->words != to->words ||
         from->dtype != to->dtype)) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected out of the shape and dtype of flags, %lld x "
                       "%lld %s; allocate it with torch.empty_like(flags)",
                       (long long)from->samples, (long long)from->words,
                       og_dtype_name(from->dtype));
    }
    return OG_OK;
}

og_status
og_flags_pair_open(og_flags_pair *pair, AtenTensorHandle flags,
                   AtenTensorHandle *out, int64_t samples,
                   const og_tensor *like, og_policy policy, og_error *err)
{
    og_status status = OG_OK;
    pair->out = out;
    if (flags != NULL && flags == *out) {
        pair->in_place = true;
        return og_flags_open(&pair->to, flags, true, "flags", err);
    }
    if (flags != NULL) {
        status = og_flags_open(&pair->from, flags, false, "flags", err);
    }
    if (status != OG_OK) {
        return status;
    }
    if (*out == NULL) {
        return make_out(pair, samples, like, policy, err);
    }
    status = og_flags_open(&pair->to, *out, true, "out", err);
    return status == OG_OK ? check_out(pair, err) : status;
}

og_status
og_flags_pair_close(og_flags_pair *pair, og_status status, og_error *err)
{
    status = og_flags_close(&pair->from, status, err);
    status = og_flags_close(&pair->to, status, err);
    if (status != OG_OK && pair->fresh) {
        (void)aoti_torch_delete_tensor_object(*pair->out);
        *pair->out = NULL;
        pair->fresh = false;
    }
    return status;
}

og_flags_rows
og_flags_pair_rows(const og_flags_pair *pair, og_policy policy)
{
    og_flags_rows rows = {
        .samples = pair->to.samples,
        .from = pair->from.rows,
        .to = pair->to.rows,
        .policy = policy,
        .device_index = pair->to.device_index,
    };
    rows.from.capacity = rows.to.capacity;
    if (pair->in_place) {
        rows.from = rows.to;
    }
    return rows;
}
