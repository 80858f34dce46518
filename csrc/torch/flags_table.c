/* Table functions: an at::Tensor is one pointer to its impl, and a handle the
 * address of an at::Tensor, so the address of an impl is a handle. */
#include "torch/flags_table.h"

#include <stdlib.h>

#include "torch/flags.h"

enum { FEW = 8 };

static AtenTensorHandle
handle_of(void **impl)
{
    return *impl == NULL ? NULL : (AtenTensorHandle)(void *)impl;
}

/* In place is told by the same handle. */
static AtenTensorHandle
out_of(void **out, void **flags)
{
    return *out == *flags ? handle_of(flags) : handle_of(out);
}

static og_status
need_out(const void *out, og_error *err)
{
    if (out == NULL) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a tensor to write to, got none");
    }
    return OG_OK;
}

og_status
og_table_flags_check(void *x, void *flags, void *out, int64_t location,
                     int64_t checks, int64_t key, og_error *err)
{
    AtenTensorHandle to = out_of(&out, &flags);
    og_status status = need_out(out, err);
    return status != OG_OK
               ? status
               : og_flags_check_run(handle_of(&x), handle_of(&flags), &to,
                                    location, checks, key, err);
}

og_status
og_table_flags_index(void *ids, void *flags, void *out, void *clamped,
                     int64_t size, int64_t location, int64_t key,
                     og_error *err)
{
    AtenTensorHandle to = out_of(&out, &flags);
    og_status status = need_out(out, err);
    return status != OG_OK
               ? status
               : og_flags_index_run(handle_of(&ids), handle_of(&flags), &to,
                                    handle_of(&clamped), size, location, key,
                                    err);
}

og_status
og_table_flags_push(void *flags, void *where, void *out, int64_t slot,
                    int64_t key, og_error *err)
{
    AtenTensorHandle to = out_of(&out, &flags);
    og_status status = need_out(out, err);
    return status != OG_OK
               ? status
               : og_flags_push_run(handle_of(&flags), handle_of(&where), &to,
                                   slot, key, err);
}

og_status
og_table_flags_push_codes(void *flags, void *codes, void *out,
                          int64_t location, int64_t severity,
                          int64_t default_severity, int64_t key, og_error *err)
{
    AtenTensorHandle to = out_of(&out, &flags);
    og_status status = need_out(out, err);
    return status != OG_OK
               ? status
               : og_flags_codes_run(handle_of(&flags), handle_of(&codes), &to,
                                    location, severity, default_severity, key,
                                    err);
}

og_status
og_table_flags_merge(void *const *flags, size_t count, void *out, int64_t key,
                     og_error *err)
{
    void *few_impls[FEW];
    AtenTensorHandle few[FEW];
    og_status status = need_out(out, err);
    if (status != OG_OK) {
        return status;
    }
    void **impls = few_impls;
    AtenTensorHandle *handles = few;
    void *heap = NULL;
    if (count > FEW) {
        heap = calloc(count, sizeof *impls + sizeof *handles);
        if (heap == NULL) {
            return og_fail(err, OG_NO_MEMORY, "no memory for %zu flags",
                           count);
        }
        impls = heap;
        handles = (AtenTensorHandle *)(void *)(impls + count);
    }
    for (size_t i = 0; i < count; i++) {
        impls[i] = flags[i];
        handles[i] = handle_of(&impls[i]);
    }
    AtenTensorHandle to =
        count > 0 ? out_of(&out, &impls[0]) : handle_of(&out);
    status = og_flags_merge_run(handles, count, &to, key, err);
    free(heap);
    return status;
}

og_status
og_table_flags_gather(void *flags, void *index, void *out, int64_t key,
                      og_error *err)
{
    AtenTensorHandle to = handle_of(&out);
    og_status status = need_out(out, err);
    return status != OG_OK
               ? status
               : og_flags_gather_run(handle_of(&flags), handle_of(&index), &to,
                                     key, err);
}

og_status
og_table_flags_query(void *flags, og_flags_what what, int64_t mask,
                     int64_t value, void *out, og_error *err)
{
    AtenTensorHandle to = handle_of(&out);
    og_status status = need_out(out, err);
    return status != OG_OK ? status
                           : og_flags_query_run(handle_of(&flags), what, mask,
                                                value, &to, err);
}

og_status
og_table_flags_clear(void *flags, int64_t code, void *out, og_error *err)
{
    AtenTensorHandle to = out_of(&out, &flags);
    og_status status = need_out(out, err);
    return status != OG_OK
               ? status
               : og_flags_clear_run(handle_of(&flags), code, &to, err);
}

og_status
og_table_flags_read(void *flags, int64_t row, uint16_t *slots,
                    int64_t capacity, int64_t *used, og_error *err)
{
    return og_flags_slots_read(handle_of(&flags), row, slots, capacity, used,
                               err);
}
