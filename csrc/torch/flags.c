/* The flag ops on tensors: each reads its arguments, says in one sentence
 * what is wrong with them, and runs on the device where they lie. */
#include "torch/flags.h"

#include "torch/flags_read.h"

og_status
og_check_key(int64_t key, og_policy *policy, og_error *err)
{
    if (!og_policy_key_ok(key)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected the key of a configuration, got %lld; take "
                       "ErrorConfig(...).key",
                       (long long)key);
    }
    *policy = og_policy_of(key);
    return OG_OK;
}

static og_status
check_location(int64_t location, og_error *err)
{
    if (location < 0 || location > OG_LOCATION_MAX) {
        return og_fail(err, OG_BAD_LOCATION,
                       "expected a location of 0..%d, got %lld; "
                       "ErrorLocation.register gives a name one",
                       OG_LOCATION_MAX, (long long)location);
    }
    return OG_OK;
}

static og_status
check_severity(int64_t severity, int64_t least, const char *name,
               og_error *err)
{
    if (severity < least || severity > OG_SEVERITY_CRITICAL) {
        return og_fail(err, OG_BAD_SEVERITY,
                       "expected %s of 0..%d, got %lld; take one of Severity",
                       name, OG_SEVERITY_CRITICAL, (long long)severity);
    }
    return OG_OK;
}

static og_status
check_code(int64_t code, og_error *err)
{
    if (code < 0 || code > OG_CODE_MASK >> OG_CODE_SHIFT) {
        return og_fail(err, OG_BAD_CODE,
                       "expected a code of 0..%d, got %lld; take one of "
                       "ErrorCode",
                       OG_CODE_MASK >> OG_CODE_SHIFT, (long long)code);
    }
    return OG_OK;
}

og_status
og_check_word(int64_t value, const char *name, og_error *err)
{
    if (value < 0 || value > OG_SLOT_MASK) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s of 16 bits (severity | code << 2 | "
                       "location << 6), got %lld",
                       name, (long long)value);
    }
    return OG_OK;
}

/* A tensor that goes with flags: as many samples, on the same device. */
og_status
og_check_goes_with(const og_tensor *t, const og_flags_view *flags,
                   const char *name, og_error *err)
{
    if (t->device_type != flags->device_type ||
        t->device_index != flags->device_index) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s on the device of flags, it is on another; "
                       "move one of them with .to",
                       name);
    }
    if (t->sizes[0] != flags->samples) {
        return og_fail(err, OG_BAD_BATCH,
                       "expected %s of %lld samples as flags have, got %lld; "
                       "make flags for this batch",
                       name, (long long)flags->samples,
                       (long long)t->sizes[0]);
    }
    return OG_OK;
}

og_status
og_flags_check_run(AtenTensorHandle x, AtenTensorHandle flags,
                   AtenTensorHandle *out, int64_t location, int64_t checks,
                   int64_t key, og_error *err)
{
    const int32_t all = OG_FOUND_NAN | OG_FOUND_POS_INF | OG_FOUND_NEG_INF;
    og_flags_check call;
    og_flags_pair pair = {.out = NULL};
    og_policy policy;
    og_status status = og_check_key(key, &policy, err);
    if (status == OG_OK) {
        status = check_location(location, err);
    }
    if (status == OG_OK && (checks & ~(int64_t)all) != 0) {
        status = og_fail(err, OG_BAD_ARGUMENT,
                         "expected checks of 1 (NaN) | 2 (+Inf) | 4 (-Inf), "
                         "got %lld",
                         (long long)checks);
    }
    if (status == OG_OK) {
        status = og_tensor_read(&call.x, x, false, "x", err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_flags_pair_open(&pair, flags, out, call.x.sizes[0], &call.x,
                                policy, err);
    if (status == OG_OK) {
        status = og_check_goes_with(&call.x, &pair.to, "x", err);
    }
    if (status == OG_OK) {
        call.rows = og_flags_pair_rows(&pair, policy);
        call.kind = og_dtype_kind(call.x.dtype);
        call.checks = (int32_t)checks;
        call.location = (int32_t)location;
        call.bits = NULL;
        status = og_runner_of(call.x.device_type)->check(&call, err);
    }
    return og_flags_pair_close(&pair, status, err);
}

/* The kinds of ids that torch's own index ops take, and some more. */
static og_status
read_ids(og_flags_index *call, AtenTensorHandle ids, int64_t size,
         og_error *err)
{
    og_status status = og_tensor_read(&call->ids, ids, false, "ids", err);
    if (status != OG_OK) {
        return status;
    }
    switch (call->ids.dtype) {
        case OG_DTYPE_UINT8:
            call->kind = OG_ID_U8;
            break;
        case OG_DTYPE_INT8:
            call->kind = OG_ID_I8;
            break;
        case OG_DTYPE_INT16:
            call->kind = OG_ID_I16;
            break;
        case OG_DTYPE_INT32:
            call->kind = OG_ID_I32;
            break;
        case OG_DTYPE_INT64:
            call->kind = OG_ID_I64;
            break;
        default:
            return og_fail(err, OG_BAD_ARGUMENT,
                           "expected ids of int64, int32, int16, int8 or "
                           "uint8, got %s; convert them with .long()",
                           og_dtype_name(call->ids.dtype));
    }
    if (size < 0) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a size of 0 or more, got %lld",
                       (long long)size);
    }
    return OG_OK;
}

/* A tensor, and how many dimensions it has in truth, 0 included. */
static og_status
read_with_dims(og_tensor *t, int64_t *ndim, AtenTensorHandle handle,
               const char *name, og_error *err)
{
    og_status status =
        og_shim_check(aoti_torch_get_dim(handle, ndim), name, err);
    return status != OG_OK ? status
                           : og_tensor_read(t, handle, false, name, err);
}

og_status
og_flags_empty_like(AtenTensorHandle ids, AtenTensorHandle *out, og_error *err)
{
    int64_t strides[OG_SCAN_DIMS], step = 1, ndim = 0;
    og_tensor t;
    og_status status = read_with_dims(&t, &ndim, ids, "ids", err);
    if (status == OG_OK && ndim > OG_SCAN_DIMS) {
        status = og_fail(err, OG_BAD_ARGUMENT,
                         "expected ids of at most %d dimensions, got %lld",
                         OG_SCAN_DIMS, (long long)ndim);
    }
    if (status != OG_OK) {
        return status;
    }
    for (int64_t d = ndim - 1; d >= 0; d--) {
        strides[d] = step;
        step *= t.sizes[d] > 1 ? t.sizes[d] : 1;
    }
    return og_shim_check(
        aoti_torch_empty_strided(ndim, t.sizes, strides, t.dtype,
                                 t.device_type, t.device_index, out),
        "allocating clamped ids", err);
}

/* Where clamped ids go: the caller's contiguous tensor of ids' shape. */
static og_status
read_clamped(og_flags_index *call, AtenTensorHandle clamped, og_error *err)
{
    og_tensor t;
    bool same = true;
    int64_t step = 1;
    og_status status = og_tensor_read(&t, clamped, true, "clamped", err);
    if (status != OG_OK) {
        return status;
    }
    same = t.ndim == call->ids.ndim && t.dtype == call->ids.dtype &&
           t.device_type == call->ids.device_type &&
           t.device_index == call->ids.device_index;
    for (int64_t d = t.ndim - 1; same && d >= 0; d--) {
        same = t.sizes[d] == call->ids.sizes[d] &&
               (t.sizes[d] <= 1 || t.strides[d] == step);
        step *= t.sizes[d] > 1 ? t.sizes[d] : 1;
    }
    if (!same) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected clamped to be contiguous, of the shape, "
                       "dtype and device of ids");
    }
    call->clamped = t.data;
    return OG_OK;
}

og_status
og_flags_index_run(AtenTensorHandle ids, AtenTensorHandle flags,
                   AtenTensorHandle *out, AtenTensorHandle clamped,
                   int64_t size, int64_t location, int64_t key, og_error *err)
{
    og_flags_index call;
    og_flags_pair pair = {.out = NULL};
    og_policy policy;
    og_status status = og_check_key(key, &policy, err);
    if (status == OG_OK) {
        status = check_location(location, err);
    }
    if (status == OG_OK) {
        status = read_ids(&call, ids, size, err);
    }
    call.clamped = NULL;
    if (status == OG_OK && clamped != NULL) {
        status = read_clamped(&call, clamped, err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_flags_pair_open(&pair, flags, out, call.ids.sizes[0],
                                &call.ids, policy, err);
    if (status == OG_OK) {
        status = og_check_goes_with(&call.ids, &pair.to, "ids", err);
    }
    if (status == OG_OK) {
        call.rows = og_flags_pair_rows(&pair, policy);
        call.size = size;
        call.slot = og_slot_make((int32_t)location, OG_CODE_OUT_OF_BOUNDS,
                                 OG_SEVERITY_ERROR);
        status = og_runner_of(call.ids.device_type)->index(&call, err);
    }
    return og_flags_pair_close(&pair, status, err);
}

/* One dimension of bytes that are 0 or not. */
static og_status
read_where(og_flags_push *call, AtenTensorHandle where,
           const og_flags_view *flags, og_error *err)
{
    og_tensor t;
    int64_t ndim = 0;
    og_status status = read_with_dims(&t, &ndim, where, "where", err);
    if (status == OG_OK && (ndim != 1 || t.dtype != OG_DTYPE_BOOL)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected where of shape (N,) and bool, got %lld "
                       "dimensions of %s",
                       (long long)ndim, og_dtype_name(t.dtype));
    }
    if (status == OG_OK) {
        status = og_check_goes_with(&t, flags, "where", err);
    }
    if (status == OG_OK) {
        call->where = t.data;
        call->where_stride = og_tensor_step(&t, 1);
    }
    return status;
}

og_status
og_flags_push_run(AtenTensorHandle flags, AtenTensorHandle where,
                  AtenTensorHandle *out, int64_t slot, int64_t key,
                  og_error *err)
{
    og_flags_push call = {.where = NULL};
    og_flags_pair pair = {.out = NULL};
    og_policy policy;
    og_status status = og_check_key(key, &policy, err);
    if (status == OG_OK) {
        status = og_check_word(slot, "a slot", err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_flags_pair_open(&pair, flags, out, 0, NULL, policy, err);
    if (status == OG_OK && where != NULL) {
        status = read_where(&call, where, &pair.to, err);
    }
    if (status == OG_OK && pair.to.samples > 0) {
        call.rows = og_flags_pair_rows(&pair, policy);
        call.slot = (uint16_t)slot;
        status = og_runner_of(pair.to.device_type)->push(&call, err);
    }
    return og_flags_pair_close(&pair, status, err);
}

static og_status
read_codes(og_flags_codes *call, AtenTensorHandle codes,
           const og_flags_view *flags, og_error *err)
{
    og_tensor t;
    int64_t ndim = 0;
    og_status status = read_with_dims(&t, &ndim, codes, "codes", err);
    if (status != OG_OK) {
        return status;
    }
    call->codes.bytes = og_dtype_integer(t.dtype, &call->codes.is_signed);
    if (ndim != 1 || call->codes.bytes == 0) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected codes of shape (N,) and an integer dtype, "
                       "got %lld dimensions of %s",
                       (long long)ndim, og_dtype_name(t.dtype));
    }
    call->codes.data = t.data;
    call->codes.stride = og_tensor_step(&t, call->codes.bytes);
    return og_check_goes_with(&t, flags, "codes", err);
}

og_status
og_flags_codes_run(AtenTensorHandle flags, AtenTensorHandle codes,
                   AtenTensorHandle *out, int64_t location, int64_t severity,
                   int64_t default_severity, int64_t key, og_error *err)
{
    og_flags_codes call = {.location = 0};
    og_flags_pair pair = {.out = NULL};
    og_policy policy;
    og_status status = og_check_key(key, &policy, err);
    if (status == OG_OK) {
        status = check_location(location, err);
    }
    if (status == OG_OK) {
        status = check_severity(severity, -1, "a severity", err);
    }
    if (status == OG_OK) {
        status = check_severity(default_severity, 0, "default_severity", err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_flags_pair_open(&pair, flags, out, 0, NULL, policy, err);
    if (status == OG_OK) {
        status = read_codes(&call, codes, &pair.to, err);
    }
    if (status == OG_OK && pair.to.samples > 0) {
        call.rows = og_flags_pair_rows(&pair, policy);
        call.location = (int32_t)location;
        call.severity = (int32_t)severity;
        call.default_severity = (int32_t)default_severity;
        status = og_runner_of(pair.to.device_type)->push_codes(&call, err);
    }
    return og_flags_pair_close(&pair, status, err);
}

og_status
og_flags_clear_run(AtenTensorHandle flags, int64_t code, AtenTensorHandle *out,
                   og_error *err)
{
    og_flags_pair pair = {.out = NULL};
    og_policy policy = {.num_slots = 1};
    og_status status = check_code(code, err);
    if (status != OG_OK) {
        return status;
    }
    status = og_flags_pair_open(&pair, flags, out, 0, NULL, policy, err);
    if (status == OG_OK && pair.to.samples > 0) {
        og_flags_clear call = {og_flags_pair_rows(&pair, policy),
                               (int32_t)code};
        status = og_runner_of(pair.to.device_type)->clear(&call, err);
    }
    return og_flags_pair_close(&pair, status, err);
}
