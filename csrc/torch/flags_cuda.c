/* The flag ops on a CUDA device: brings the strides of a call into as few
 * dimensions as they have, and launches on torch's current stream. */
#include "torch/flags.h"

#include <stdlib.h>

#include "cuda/opguard_cuda.h"

/* Where and with what a call is launched. */
typedef struct launcher {
    const og_cuda_table *cuda;
    og_cuda_place place;
} launcher;

static og_status
launcher_open(launcher *l, int32_t device, og_error *err)
{
    og_status status = og_cuda_functions(&l->cuda, err);
    l->place.device = device;
    return status != OG_OK
               ? status
               : og_shim_cuda_stream(device, &l->place.stream, err);
}

static og_cuda_rows
rows_of(const og_flags_rows *rows)
{
    return (og_cuda_rows){
        .samples = rows->samples,
        .from = rows->from.data,
        .from_stride = rows->from.stride,
        .to = rows->to.data,
        .to_stride = rows->to.stride,
        .capacity = rows->to.capacity,
        .policy = rows->policy,
    };
}

/* --- values: dimensions and strides ---------------------------------------
 */

/* Moves the last dimension to where its stride belongs, greatest first. */
static void
sort_last(og_cuda_values *v)
{
    int64_t size = v->sizes[v->ndim - 1], stride = v->strides[v->ndim - 1];
    int at = v->ndim - 1;
    for (; at > 0 && v->strides[at - 1] < stride; at--) {
        v->sizes[at] = v->sizes[at - 1];
        v->strides[at] = v->strides[at - 1];
    }
    v->sizes[at] = size;
    v->strides[at] = stride;
}

/* Joins dimensions that are one to memory. */
static void
join(og_cuda_values *v)
{
    int used = v->ndim > 0;
    for (int d = 1; d < v->ndim; d++) {
        if (v->strides[used - 1] == v->strides[d] * v->sizes[d]) {
            v->sizes[used - 1] *= v->sizes[d];
            v->strides[used - 1] = v->strides[d];
        }
        else {
            v->sizes[used] = v->sizes[d];
            v->strides[used++] = v->strides[d];
        }
    }
    v->ndim = used;
}

/* Makes 16 bytes the unit where all of a tensor can be read so. */
static void
widen(og_cuda_values *v)
{
    int last = v->ndim - 1, each = 16 / v->unit;
    bool fits = v->strides[last] == v->unit && v->sizes[last] % each == 0 &&
                (uintptr_t)v->data % 16 == 0 && v->row_stride % 16 == 0;
    for (int d = 0; d < last; d++) {
        fits = fits && v->strides[d] % 16 == 0;
    }
    if (fits) {
        v->sizes[last] /= each;
        v->strides[last] = 16;
        v->count /= each;
        v->unit = 16;
    }
}

/* The samples of t in elements of so many bytes, `pair` of which (1 or 2) are
 * one element of t. in_order keeps the dimensions' order and every element;
 * otherwise each place in memory need be seen only once, in any order. */
static void
values_of(og_cuda_values *v, const og_tensor *t, int32_t bytes, int32_t pair,
          bool in_order)
{
    v->data = t->data;
    v->row_stride = og_tensor_step(t, (int64_t)bytes * pair);
    v->count = pair;
    v->unit = bytes;
    v->ndim = 0;
    for (int64_t d = 1; d <= t->ndim; d++) {
        bool inside = d == t->ndim; /* the numbers of a complex one */
        int64_t size = inside ? pair : t->sizes[d];
        if (size == 1) {
            continue; /* its stride may be any number */
        }
        int64_t stride = inside ? bytes : t->strides[d] * bytes * pair;
        if (stride == 0 && size > 0 && !in_order) {
            continue;
        }
        v->count *= inside ? 1 : size;
        v->sizes[v->ndim] = size;
        v->strides[v->ndim++] = stride;
        if (!in_order) {
            sort_last(v);
        }
    }
    join(v);
    if (v->count == 0 || (v->ndim == 1 && v->strides[0] == bytes)) {
        v->ndim = 0;
    }
    else if (v->ndim > 0 && !in_order) {
        widen(v);
    }
}

static og_cuda_format
format_of(og_scan_kind kind)
{
    switch (kind) {
        case OG_SCAN_F16:
        case OG_SCAN_C32:
            return (og_cuda_format){0, 0x7FFF, 0x7C00, 2, true, false};
        case OG_SCAN_BF16:
            return (og_cuda_format){0, 0x7FFF, 0x7F80, 2, true, false};
        case OG_SCAN_F32:
        case OG_SCAN_C64:
            return (og_cuda_format){0, 0x7FFFFFFF, 0x7F800000, 4, true, false};
        case OG_SCAN_F64:
        case OG_SCAN_C128:
            return (og_cuda_format){
                0, (uint64_t)INT64_MAX, (uint64_t)0x7FF << 52, 8, true, false};
        case OG_SCAN_F8_E5M2:
            return (og_cuda_format){0, 0x7F, 0x7C, 1, true, false};
        case OG_SCAN_F8_E4M3FN:
            return (og_cuda_format){0, 0x7F, 0x7E, 1, false, false};
        case OG_SCAN_F8_FNUZ:
            return (og_cuda_format){0x7F, 0xFF, 0xFE, 1, false, true};
        default: /* OG_SCAN_F8_E8M0, and OG_SCAN_NONE, which is not read */
            return (og_cuda_format){0, 0xFF, 0xFE, 1, false, true};
    }
}

/* --- the calls ------------------------------------------------------------
 */

/* Memory of torch's allocator: safe to let go when the launch is queued, as
 * it is given out again only behind it on the stream. */
static og_status
scratch_new(int64_t bytes, int32_t device, AtenTensorHandle *scratch,
            void **data, og_error *err)
{
    const int64_t stride = 1;
    og_status status =
        og_shim_check(aoti_torch_empty_strided(
                          1, &bytes, &stride, aoti_torch_dtype_uint8(),
                          aoti_torch_device_type_cuda(), device, scratch),
                      "allocating room for a check", err);
    if (status == OG_OK) {
        status = og_shim_check(aoti_torch_get_data_ptr(*scratch, data),
                               "room for a check", err);
    }
    return status;
}

static og_status
launch_check(const launcher *l, og_cuda_check *check, og_error *err)
{
    AtenTensorHandle scratch = NULL;
    int64_t bytes = 0;
    og_status status = og_cuda_outcome(
        l->cuda, l->cuda->check_scratch(check, &l->place, &bytes),
        "checking a tensor", err);
    if (status == OG_OK && bytes > 0) {
        status = scratch_new(bytes, l->place.device, &scratch, &check->scratch,
                             err);
    }
    if (status == OG_OK) {
        status =
            og_cuda_outcome(l->cuda, l->cuda->launch_check(check, &l->place),
                            "checking a tensor", err);
    }
    if (scratch != NULL) {
        (void)aoti_torch_delete_tensor_object(scratch);
    }
    return status;
}

static og_status
cuda_check(const og_flags_check *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->rows.device_index, err);
    if (status != OG_OK || call->rows.samples == 0) {
        return status;
    }
    og_cuda_check check;
    bool pairs = call->kind == OG_SCAN_C32 || call->kind == OG_SCAN_C64 ||
                 call->kind == OG_SCAN_C128;
    check.rows = rows_of(&call->rows);
    check.format = format_of(call->kind);
    values_of(&check.x, &call->x, check.format.bytes, pairs ? 2 : 1, false);
    if (call->kind == OG_SCAN_NONE) {
        check.x.count = check.x.ndim = 0;
    }
    check.checks = call->checks;
    check.nan =
        og_slot_make(call->location, OG_CODE_NAN, OG_SEVERITY_CRITICAL);
    check.inf =
        og_slot_make(call->location, OG_CODE_INF, OG_SEVERITY_CRITICAL);
    check.findings = call->bits;
    check.scratch = NULL;
    return launch_check(&l, &check, err);
}

static og_status
cuda_index(const og_flags_index *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->rows.device_index, err);
    if (status != OG_OK || call->rows.samples == 0) {
        return status;
    }
    og_cuda_index index;
    int32_t bytes = 8;
    if (call->kind != OG_ID_I64) {
        bytes = call->kind == OG_ID_I32 ? 4 : call->kind == OG_ID_I16 ? 2 : 1;
    }
    index.rows = rows_of(&call->rows);
    values_of(&index.ids, &call->ids, bytes, 1, true);
    index.is_signed = call->kind != OG_ID_U8;
    index.size = call->size;
    index.slot = call->slot;
    index.clamped = call->clamped;
    return og_cuda_outcome(l.cuda, l.cuda->launch_index(&index, &l.place),
                           "checking ids", err);
}

static og_status
cuda_push(const og_flags_push *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->rows.device_index, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_push push = {.rows = rows_of(&call->rows),
                         .where = call->where,
                         .where_stride = call->where_stride,
                         .slot = call->slot};
    return og_cuda_outcome(l.cuda, l.cuda->launch_push(&push, &l.place),
                           "pushing an error", err);
}

static og_status
cuda_push_codes(const og_flags_codes *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->rows.device_index, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_codes codes = {.rows = rows_of(&call->rows),
                           .codes = call->codes.data,
                           .codes_stride = call->codes.stride,
                           .codes_bytes = call->codes.bytes,
                           .is_signed = call->codes.is_signed,
                           .location = call->location};
    for (int32_t code = 0; code < 16; code++) {
        int32_t severity =
            call->severity >= 0
                ? call->severity
                : og_code_severity(code, call->default_severity);
        codes.severities |= (uint32_t)severity << 2 * code;
    }
    return og_cuda_outcome(l.cuda, l.cuda->launch_codes(&codes, &l.place),
                           "pushing codes", err);
}

static og_status
cuda_merge(const og_flags_merge *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->rows.device_index, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_other *others = calloc(call->count + 1, sizeof *others);
    if (others == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for %zu flags",
                       call->count);
    }
    for (size_t i = 0; i < call->count; i++) {
        others[i].data = call->others[i].data;
        others[i].stride = call->others[i].stride;
    }
    og_cuda_merge merge = {
        .rows = rows_of(&call->rows), .others = others, .count = call->count};
    status = og_cuda_outcome(l.cuda, l.cuda->launch_merge(&merge, &l.place),
                             "merging flags", err);
    free(others);
    return status;
}

static og_status
cuda_gather(const og_flags_gather *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->device_index, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_gather gather = {.samples = call->samples,
                             .rows = call->rows,
                             .from = call->from.data,
                             .from_stride = call->from.stride,
                             .to = call->to.data,
                             .to_stride = call->to.stride,
                             .picks = call->picks.data,
                             .picks_row_stride = call->picks.row_stride,
                             .picks_stride = call->picks.stride,
                             .count = call->picks.count,
                             .capacity = call->to.capacity,
                             .wide = call->picks.wide,
                             .policy = call->policy};
    return og_cuda_outcome(l.cuda, l.cuda->launch_gather(&gather, &l.place),
                           "gathering flags", err);
}

static og_status
cuda_clear(const og_flags_clear *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->rows.device_index, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_clear clear = {.rows = rows_of(&call->rows), .code = call->code};
    return og_cuda_outcome(l.cuda, l.cuda->launch_clear(&clear, &l.place),
                           "clearing a code", err);
}

static og_cuda_what
what_of(og_flags_what what)
{
    switch (what) {
        case OG_FLAGS_FIND:
            return OG_CUDA_FIND;
        case OG_FLAGS_OK:
            return OG_CUDA_OK;
        case OG_FLAGS_ERR:
            return OG_CUDA_ERR;
        case OG_FLAGS_COUNT:
            return OG_CUDA_COUNT;
        default:
            return OG_CUDA_MAX_SEVERITY;
    }
}

static og_status
cuda_query(const og_flags_query *call, og_error *err)
{
    launcher l;
    og_status status = launcher_open(&l, call->device_index, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_query query = {.samples = call->samples,
                           .data = call->rows.data,
                           .stride = call->rows.stride,
                           .capacity = call->rows.capacity,
                           .what = what_of(call->what),
                           .mask = call->mask,
                           .value = call->value,
                           .out = call->out,
                           .out_bytes = 1};
    if (call->what == OG_FLAGS_COUNT) {
        query.out_bytes = 4;
    }
    if (call->what == OG_FLAGS_MAX_SEVERITY) {
        query.out_bytes = call->out_bytes;
    }
    return og_cuda_outcome(l.cuda, l.cuda->launch_query(&query, &l.place),
                           "reading flags", err);
}

const og_flags_runner og_flags_cuda = {
    .check = cuda_check,
    .index = cuda_index,
    .push = cuda_push,
    .push_codes = cuda_push_codes,
    .merge = cuda_merge,
    .gather = cuda_gather,
    .clear = cuda_clear,
    .query = cuda_query,
};
