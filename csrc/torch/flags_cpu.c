/* Runs decoded flag calls on the host: the row functions of core over ranges
 * of rows, on torch's threads where there is enough to do. The callbacks do
 * not throw, so no exception crosses torch_parallel_for. */
#include <stdlib.h>
#include <string.h>

#include "torch/flags_read.h"

/* Findings of so many samples fit on the stack. */
enum { SMALL_BATCH = 4096 };

/* Bytes of rows that are worth a thread of their own: some 25 us, where waking
 * one takes a few. */
enum { GRAIN_BYTES = 1 << 18 };

typedef void (*range_function)(int64_t begin, int64_t end, void *call);

static og_status
each(int64_t count, int64_t grain, range_function function, const void *call,
     og_error *err)
{
    /* The callbacks only read the call. */
    void *context = (void *)(uintptr_t)call;
    if (count <= grain) {
        function(0, count, context);
        return OG_OK;
    }
    return og_shim_check(
        torch_parallel_for(0, count, grain, function, context),
        "running in parallel", err);
}

static og_status
each_row(const og_flags_rows *rows, range_function function, const void *call,
         og_error *err)
{
    int64_t grain = GRAIN_BYTES / (2 * (int64_t)rows->to.capacity);
    return each(rows->samples, grain < 1 ? 1 : grain, function, call, err);
}

/* A scan and where its findings go. */
typedef struct findings {
    og_scan scan;
    uint8_t *bits;
    uint8_t small[SMALL_BATCH];
} findings;

static void
scan_range(int64_t begin, int64_t end, void *context)
{
    const findings *f = context;
    og_scan_units(&f->scan, begin, end, f->bits);
}

/* bits: where to write, or NULL for memory that findings_free frees. */
static og_status
findings_run(findings *f, int64_t samples, uint8_t *bits, og_error *err)
{
    f->bits = bits;
    if (bits == NULL && samples <= SMALL_BATCH) {
        f->bits = f->small;
    }
    else if (bits == NULL) {
        f->bits = malloc((size_t)samples);
        if (f->bits == NULL) {
            return og_fail(err, OG_NO_MEMORY,
                           "no memory for the findings of %lld samples",
                           (long long)samples);
        }
    }
    memset(f->bits, 0, (size_t)samples);
    return each(f->scan.units, f->scan.grain, scan_range, f, err);
}

static void
findings_free(findings *f)
{
    if (f->bits != f->small) {
        free(f->bits);
    }
}

typedef struct check_context {
    const og_flags_check *call;
    const uint8_t *bits;
} check_context;

static void
check_range(int64_t begin, int64_t end, void *context)
{
    const check_context *c = context;
    const og_flags_rows *rows = &c->call->rows;
    og_batch_push_found(rows->from, rows->to, c->bits, c->call->checks,
                        c->call->location, rows->policy, begin, end);
}

static og_status
check(const og_flags_check *call, og_error *err)
{
    findings f;
    const og_tensor *x = &call->x;
    og_status status = og_scan_prepare(&f.scan, x->data, x->ndim, x->sizes,
                                       x->strides, call->kind, err);
    if (status != OG_OK) {
        return status;
    }
    status = findings_run(&f, call->rows.samples, call->bits, err);
    if (call->bits != NULL) {
        return status;
    }
    if (status == OG_OK) {
        check_context context = {call, f.bits};
        status = each_row(&call->rows, check_range, &context, err);
    }
    findings_free(&f);
    return status;
}

typedef struct index_context {
    const og_flags_index *call;
    const uint8_t *bits;
} index_context;

static void
index_range(int64_t begin, int64_t end, void *context)
{
    const index_context *c = context;
    const og_flags_rows *rows = &c->call->rows;
    og_batch_push(rows->from, rows->to, c->bits, 1, c->call->slot,
                  rows->policy, begin, end);
}

static og_status
run_index(const og_flags_index *call, og_error *err)
{
    findings f;
    const og_tensor *ids = &call->ids;
    og_status status =
        og_scan_prepare_ids(&f.scan, ids->data, ids->ndim, ids->sizes,
                            ids->strides, call->kind, call->size, err);
    if (status != OG_OK) {
        return status;
    }
    status = findings_run(&f, call->rows.samples, NULL, err);
    if (status == OG_OK) {
        index_context context = {call, f.bits};
        status = each_row(&call->rows, index_range, &context, err);
    }
    if (status == OG_OK && call->clamped != NULL) {
        og_flags_clamp(call);
    }
    findings_free(&f);
    return status;
}

static void
push_range(int64_t begin, int64_t end, void *context)
{
    const og_flags_push *call = context;
    const og_flags_rows *rows = &call->rows;
    og_batch_push(rows->from, rows->to, call->where, call->where_stride,
                  call->slot, rows->policy, begin, end);
}

static og_status
push(const og_flags_push *call, og_error *err)
{
    return each_row(&call->rows, push_range, call, err);
}

typedef struct codes_context {
    const og_flags_codes *call;
    _Atomic int64_t bad; /* a row whose code is none, -1 */
} codes_context;

static void
codes_range(int64_t begin, int64_t end, void *context)
{
    codes_context *c = context;
    const og_flags_codes *call = c->call;
    const og_flags_rows *rows = &call->rows;
    int64_t bad = og_batch_push_codes(
        rows->from, rows->to, call->codes, call->location, call->severity,
        call->default_severity, rows->policy, begin, end);
    if (bad >= 0) {
        c->bad = bad;
    }
}

static og_status
push_codes(const og_flags_codes *call, og_error *err)
{
    codes_context context = {call, -1};
    og_status status = each_row(&call->rows, codes_range, &context, err);
    if (status == OG_OK && context.bad >= 0) {
        return og_fail(err, OG_BAD_CODE,
                       "expected codes of 0..15, sample %lld has another; "
                       "take them from ErrorCode",
                       (long long)context.bad);
    }
    return status;
}

static void
merge_range(int64_t begin, int64_t end, void *context)
{
    const og_flags_merge *call = context;
    const og_flags_rows *rows = &call->rows;
    if (call->count == 0) {
        og_batch_copy(rows->from, rows->to, begin, end);
        return;
    }
    og_batch_merge(rows->from, call->others[0], rows->to, rows->policy, begin,
                   end);
    for (size_t i = 1; i < call->count; i++) {
        og_batch_merge(rows->to, call->others[i], rows->to, rows->policy,
                       begin, end);
    }
}

static og_status
merge(const og_flags_merge *call, og_error *err)
{
    return each_row(&call->rows, merge_range, call, err);
}

typedef struct gather_context {
    const og_flags_gather *call;
    _Atomic int64_t bad; /* a row with a pick that is none, -1 */
} gather_context;

/* So many picks are told apart without memory. */
enum { FEW_PICKS = 32 };

static void
gather_range(int64_t begin, int64_t end, void *context)
{
    gather_context *c = context;
    const og_flags_gather *call = c->call;
    uint64_t *seen = NULL;
    if (call->picks.count > FEW_PICKS) {
        /* Without it the same is done, slower. */
        seen = calloc((size_t)call->rows / 64 + 1, sizeof *seen);
    }
    int64_t bad = og_batch_gather(call->from, call->rows, call->picks,
                                  call->to, seen, call->policy, begin, end);
    free(seen);
    if (bad >= 0) {
        c->bad = bad;
    }
}

static og_status
gather(const og_flags_gather *call, og_error *err)
{
    gather_context context = {call, -1};
    int64_t picks = call->picks.count > 1 ? call->picks.count : 1;
    int64_t grain = GRAIN_BYTES / (2 * (int64_t)call->to.capacity) / picks;
    og_status status = each(call->samples, grain < 1 ? 1 : grain, gather_range,
                            &context, err);
    if (status == OG_OK && context.bad >= 0) {
        return og_fail(
            err, OG_BAD_ARGUMENT,
            "expected index to name one of the %lld rows, or -1 for "
            "none, its row %lld has another number",
            (long long)call->rows, (long long)context.bad);
    }
    return status;
}

static void
clear_range(int64_t begin, int64_t end, void *context)
{
    const og_flags_clear *call = context;
    og_batch_clear(call->rows.from, call->rows.to, call->code, begin, end);
}

static og_status
clear(const og_flags_clear *call, og_error *err)
{
    return each_row(&call->rows, clear_range, call, err);
}

static void
query_range(int64_t begin, int64_t end, void *context)
{
    const og_flags_query *call = context;
    switch (call->what) {
        case OG_FLAGS_FIND:
            og_batch_find(call->rows, call->mask, call->value, call->out,
                          begin, end);
            break;
        case OG_FLAGS_OK:
        case OG_FLAGS_ERR:
            og_batch_any(call->rows, call->what == OG_FLAGS_OK, call->out,
                         begin, end);
            break;
        case OG_FLAGS_COUNT:
            og_batch_count(call->rows, call->out, begin, end);
            break;
        case OG_FLAGS_MAX_SEVERITY:
            og_batch_max_severity(call->rows, call->out_bytes == 8, call->out,
                                  begin, end);
            break;
    }
}

static og_status
query(const og_flags_query *call, og_error *err)
{
    int64_t grain = GRAIN_BYTES / (2 * (int64_t)call->rows.capacity);
    return each(call->samples, grain < 1 ? 1 : grain, query_range, call, err);
}

const og_flags_runner og_flags_cpu = {
    .check = check,
    .index = run_index,
    .push = push,
    .push_codes = push_codes,
    .merge = merge,
    .gather = gather,
    .clear = clear,
    .query = query,
};
