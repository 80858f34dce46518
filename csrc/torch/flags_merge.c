/* Merging flags, and reading them: calls with many flags or none to write. */
#include <stdlib.h>

#include "torch/flags_read.h"

/* So many flags are merged without an allocation. */
enum { FEW = 8 };

typedef struct crowd {
    og_flags_view *views; /* of the younger flags */
    og_rows *rows;
    size_t count;
    og_flags_view few_views[FEW];
    og_rows few_rows[FEW];
    void *heap; /* NULL, or where views and rows are */
} crowd;

static og_status
crowd_reserve(crowd *all, size_t count, og_error *err)
{
    all->views = all->few_views;
    all->rows = all->few_rows;
    all->heap = NULL;
    all->count = 0;
    if (count > FEW) {
        all->heap = calloc(count, sizeof *all->views + sizeof *all->rows);
        if (all->heap == NULL) {
            return og_fail(err, OG_NO_MEMORY, "no memory for %zu flags",
                           count);
        }
        all->views = all->heap;
        all->rows = (og_rows *)(void *)(all->views + count);
    }
    return OG_OK;
}

static bool
rows_overlap(const og_flags_view *a, const og_flags_view *b)
{
    if (a->samples == 0) {
        return false;
    }
    const char *a_end = a->rows.data + (a->samples - 1) * a->rows.stride +
                        a->rows.capacity * 2;
    const char *b_end = b->rows.data + (b->samples - 1) * b->rows.stride +
                        b->rows.capacity * 2;
    return a->rows.data < b_end && b->rows.data < a_end;
}

static og_status
crowd_add(crowd *all, AtenTensorHandle flags, const og_flags_view *to,
          og_error *err)
{
    og_flags_view *view = &all->views[all->count];
    *view = (og_flags_view){.given = NULL};
    all->count++;
    og_status status = og_flags_open(view, flags, false, "flags", err);
    if (status != OG_OK) {
        return status;
    }
    if (view->samples != to->samples) {
        return og_fail(err, OG_BAD_BATCH,
                       "expected flags of the same batch to merge, got %lld "
                       "and %lld samples; flags belong to the samples they "
                       "were made with",
                       (long long)to->samples, (long long)view->samples);
    }
    if (view->rows.capacity != to->rows.capacity) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected flags of equally many slots to merge, got "
                       "%d and %d; make both with one num_slots",
                       (int)to->rows.capacity, (int)view->rows.capacity);
    }
    if (view->device_type != to->device_type ||
        view->device_index != to->device_index) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected flags on one device to merge, they are on "
                       "two; move some with .to");
    }
    if (rows_overlap(view, to)) {
        status = og_flags_set_aside(view, err);
    }
    all->rows[all->count - 1] = view->rows;
    return status;
}

static og_status
crowd_free(crowd *all, og_status status, og_error *err)
{
    for (size_t i = 0; i < all->count; i++) {
        status = og_flags_close(&all->views[i], status, err);
    }
    free(all->heap);
    return status;
}

og_status
og_flags_merge_run(const AtenTensorHandle *flags, size_t count,
                   AtenTensorHandle *out, int64_t key, og_error *err)
{
    crowd others;
    og_flags_pair pair = {.out = NULL};
    og_policy policy;
    og_status status = og_check_key(key, &policy, err);
    if (status == OG_OK && count == 0) {
        status =
            og_fail(err, OG_BAD_ARGUMENT, "expected flags to merge, got none");
    }
    if (status == OG_OK) {
        status = crowd_reserve(&others, count - 1, err);
    }
    if (status != OG_OK) {
        return status;
    }
    status = og_flags_pair_open(&pair, flags[0], out, 0, NULL, policy, err);
    for (size_t i = 1; status == OG_OK && i < count; i++) {
        status = crowd_add(&others, flags[i], &pair.to, err);
    }
    if (status == OG_OK && pair.to.samples > 0) {
        og_flags_merge call = {og_flags_pair_rows(&pair, policy), others.rows,
                               count - 1};
        status = og_runner_of(pair.to.device_type)->merge(&call, err);
    }
    status = crowd_free(&others, status, err);
    return og_flags_pair_close(&pair, status, err);
}

/* dtype of a query's result. */
static int32_t
answer_dtype(og_flags_what what, int32_t flags_dtype)
{
    switch (what) {
        case OG_FLAGS_COUNT:
            return OG_DTYPE_INT32;
        case OG_FLAGS_MAX_SEVERITY:
            return og_dtype_slots(flags_dtype) == 4 ? OG_DTYPE_INT64
                                                    : OG_DTYPE_INT32;
        default:
            return OG_DTYPE_BOOL;
    }
}

/* Makes *out, (N,), or checks that the caller's is so; *data is its place. */
static og_status
answer_open(const og_flags_view *flags, int32_t dtype, AtenTensorHandle *out,
            void **data, og_error *err)
{
    og_tensor t;
    if (*out == NULL) {
        og_status made =
            og_tensor_new(1, &flags->samples, dtype, flags->device_type,
                          flags->device_index, out, err);
        return made != OG_OK
                   ? made
                   : og_shim_check(torch_get_mutable_data_ptr(*out, data),
                                   "reading a result's address", err);
    }
    og_status status = og_tensor_read(&t, *out, true, "out", err);
    if (status == OG_OK &&
        (t.ndim != 1 || t.sizes[0] != flags->samples || t.dtype != dtype ||
         (t.sizes[0] > 1 && t.strides[0] != 1) ||
         t.device_type != flags->device_type ||
         t.device_index != flags->device_index)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected out to be contiguous, of shape (%lld,), %s, "
                       "on the device of flags",
                       (long long)flags->samples, og_dtype_name(dtype));
    }
    *data = t.data;
    return status;
}

og_status
og_flags_query_run(AtenTensorHandle flags, og_flags_what what, int64_t mask,
                   int64_t value, AtenTensorHandle *out, og_error *err)
{
    og_flags_view view = {.given = NULL};
    og_flags_query call = {.what = what};
    bool fresh = *out == NULL;
    og_status status = og_flags_open(&view, flags, false, "flags", err);
    if (status == OG_OK) {
        status = og_check_word(mask, "a mask", err);
    }
    if (status == OG_OK) {
        status = og_check_word(value, "a value", err);
    }
    if (status == OG_OK) {
        int32_t dtype = answer_dtype(what, view.dtype);
        call.out_bytes = dtype == OG_DTYPE_INT64   ? 8
                         : dtype == OG_DTYPE_INT32 ? 4
                                                   : 1;
        status = answer_open(&view, dtype, out, &call.out, err);
    }
    if (status == OG_OK && view.samples > 0) {
        call.samples = view.samples;
        call.rows = view.rows;
        call.device_index = view.device_index;
        call.mask = (uint16_t)mask;
        call.value = (uint16_t)value;
        status = og_runner_of(view.device_type)->query(&call, err);
    }
    status = og_flags_close(&view, status, err);
    if (status != OG_OK && fresh && *out != NULL) {
        (void)aoti_torch_delete_tensor_object(*out);
        *out = NULL;
    }
    return status;
}

og_status
og_flags_findings_run(AtenTensorHandle x, AtenTensorHandle *out, og_error *err)
{
    og_flags_check call = {.checks = OG_FOUND_NAN | OG_FOUND_POS_INF |
                                     OG_FOUND_NEG_INF};
    void *data = NULL;
    og_status status = og_tensor_read(&call.x, x, false, "x", err);
    if (status != OG_OK) {
        return status;
    }
    status = og_tensor_new(1, call.x.sizes, OG_DTYPE_UINT8, call.x.device_type,
                           call.x.device_index, out, err);
    if (status == OG_OK) {
        status = og_shim_check(torch_get_mutable_data_ptr(*out, &data),
                               "reading a result's address", err);
    }
    if (status == OG_OK && call.x.sizes[0] > 0) {
        call.kind = og_dtype_kind(call.x.dtype);
        call.rows.samples = call.x.sizes[0];
        call.rows.device_index = call.x.device_index;
        call.bits = data;
        status = og_runner_of(call.x.device_type)->check(&call, err);
    }
    if (status != OG_OK && *out != NULL) {
        (void)aoti_torch_delete_tensor_object(*out);
        *out = NULL;
    }
    return status;
}

og_status
og_flags_slots_read(AtenTensorHandle flags, int64_t row, uint16_t *slots,
                    int64_t capacity, int64_t *used, og_error *err)
{
    og_flags_view view = {.given = NULL};
    og_status status = og_flags_open(&view, flags, false, "flags", err);
    if (status == OG_OK && view.device_type != OG_DEVICE_CPU) {
        status = og_fail(err, OG_BAD_ARGUMENT,
                         "expected flags in host memory to read slots, they "
                         "are on a device; call .cpu() first");
    }
    if (status == OG_OK && (row < 0 || row >= view.samples)) {
        status = og_fail(err, OG_BAD_BATCH,
                         "expected a sample of 0..%lld, got %lld",
                         (long long)view.samples - 1, (long long)row);
    }
    if (status == OG_OK) {
        const uint16_t *from =
            (const uint16_t *)(const void *)(view.rows.data +
                                             row * view.rows.stride);
        int64_t count = 0;
        for (int32_t i = 0; i < view.rows.capacity; i++) {
            if (from[i] != 0) {
                if (count < capacity) {
                    slots[count] = from[i];
                }
                count++;
            }
        }
        *used = count;
    }
    return og_flags_close(&view, status, err);
}
