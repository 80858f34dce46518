/* The boxed kernels of the flag ops; schemas are in library.c. A kernel owns
 * the handles on its stack: it gives them up, then ends, by torch's exception
 * when something was wrong. */
#include <stdlib.h>

#include "torch/flags.h"
#include "torch/ops.h"

static AtenTensorHandle
handle_at(const StableIValue *stack, int index)
{
    return (AtenTensorHandle)(uintptr_t)stack[index];
}

static void
drop(AtenTensorHandle tensor)
{
    (void)aoti_torch_delete_tensor_object(tensor);
}

static void
finish(og_status status, const og_error *err, const char *op)
{
    if (!OG_LIKELY(status == OG_OK)) {
        aoti_torch_check(false, op, __FILE__, __LINE__, err->message);
    }
}

/* Of one or two tensors, and a result. */
static void
finish_new(StableIValue *stack, int tensors, AtenTensorHandle out,
           og_status status, const og_error *err, const char *op)
{
    for (int i = 0; i < tensors; i++) {
        drop(handle_at(stack, i));
    }
    finish(status, err, op);
    stack[0] = (StableIValue)(uintptr_t)out;
}

/* The same, and nothing is returned. */
static void
finish_void(StableIValue *stack, int tensors, og_status status,
            const og_error *err, const char *op)
{
    for (int i = 0; i < tensors; i++) {
        drop(handle_at(stack, i));
    }
    finish(status, err, op);
}

void
og_op_flags_check(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status = og_flags_check_run(
        handle_at(stack, 1), handle_at(stack, 0), &out, (int64_t)stack[2],
        (int64_t)stack[3], (int64_t)stack[4], &err);
    finish_new(stack, 2, out, status, &err, "opguard::flags_check");
}

void
og_op_flags_check_(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle flags = handle_at(stack, 0);
    og_status status = og_flags_check_run(handle_at(stack, 1), flags, &flags,
                                          (int64_t)stack[2], (int64_t)stack[3],
                                          (int64_t)stack[4], &err);
    finish_void(stack, 2, status, &err, "opguard::flags_check_");
}

void
og_op_flags_check_new(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status =
        og_flags_check_run(handle_at(stack, 0), NULL, &out, (int64_t)stack[1],
                           (int64_t)stack[2], (int64_t)stack[3], &err);
    finish_new(stack, 1, out, status, &err, "opguard::flags_check_new");
}

void
og_op_flags_index(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status = og_flags_index_run(
        handle_at(stack, 1), handle_at(stack, 0), &out, NULL,
        (int64_t)stack[2], (int64_t)stack[3], (int64_t)stack[4], &err);
    finish_new(stack, 2, out, status, &err, "opguard::flags_index");
}

void
og_op_flags_index_new(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status = og_flags_index_run(
        handle_at(stack, 0), NULL, &out, NULL, (int64_t)stack[1],
        (int64_t)stack[2], (int64_t)stack[3], &err);
    finish_new(stack, 1, out, status, &err, "opguard::flags_index_new");
}

void
og_op_flags_index_clamp(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL, clamped = NULL;
    AtenTensorHandle flags = handle_at(stack, 0), ids = handle_at(stack, 1);
    og_status status = og_flags_empty_like(ids, &clamped, &err);
    if (status == OG_OK) {
        status =
            og_flags_index_run(ids, flags, &out, clamped, (int64_t)stack[2],
                               (int64_t)stack[3], (int64_t)stack[4], &err);
    }
    drop(flags);
    drop(ids);
    if (status != OG_OK && clamped != NULL) {
        drop(clamped);
    }
    finish(status, &err, "opguard::flags_index_clamp");
    stack[0] = (StableIValue)(uintptr_t)out;
    stack[1] = (StableIValue)(uintptr_t)clamped;
}

void
og_op_flags_push(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status =
        og_flags_push_run(handle_at(stack, 0), handle_at(stack, 1), &out,
                          (int64_t)stack[2], (int64_t)stack[3], &err);
    finish_new(stack, 2, out, status, &err, "opguard::flags_push");
}

void
og_op_flags_push_(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle flags = handle_at(stack, 0);
    og_status status =
        og_flags_push_run(flags, handle_at(stack, 1), &flags,
                          (int64_t)stack[2], (int64_t)stack[3], &err);
    finish_void(stack, 2, status, &err, "opguard::flags_push_");
}

void
og_op_flags_push_all(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status =
        og_flags_push_run(handle_at(stack, 0), NULL, &out, (int64_t)stack[1],
                          (int64_t)stack[2], &err);
    finish_new(stack, 1, out, status, &err, "opguard::flags_push_all");
}

void
og_op_flags_push_all_(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle flags = handle_at(stack, 0);
    og_status status = og_flags_push_run(
        flags, NULL, &flags, (int64_t)stack[1], (int64_t)stack[2], &err);
    finish_void(stack, 1, status, &err, "opguard::flags_push_all_");
}

void
og_op_flags_push_codes(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status = og_flags_codes_run(
        handle_at(stack, 0), handle_at(stack, 1), &out, (int64_t)stack[2],
        (int64_t)stack[3], (int64_t)stack[4], (int64_t)stack[5], &err);
    finish_new(stack, 2, out, status, &err, "opguard::flags_push_codes");
}

void
og_op_flags_merge(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL, few[8], *all = few;
    StableListHandle list = (StableListHandle)(uintptr_t)stack[0];
    size_t count = 0, taken = 0;
    og_status status =
        og_shim_check(torch_list_size(list, &count), "flags", &err);
    if (status == OG_OK && count > sizeof few / sizeof *few) {
        all = calloc(count, sizeof *all);
        if (all == NULL) {
            status =
                og_fail(&err, OG_NO_MEMORY, "no memory for %zu flags", count);
        }
    }
    /* What is in the list is ours whatever becomes of it. */
    for (StableIValue one = 0;
         taken < count && torch_list_get_item(list, taken, &one) == 0;
         taken++) {
        if (all != NULL) {
            all[taken] = (AtenTensorHandle)(uintptr_t)one;
        }
        else {
            drop((AtenTensorHandle)(uintptr_t)one);
        }
    }
    if (status == OG_OK && taken < count) {
        status = og_fail(&err, OG_TORCH_FAILED,
                         "expected a list of %zu flags, torch gave %zu", count,
                         taken);
    }
    (void)torch_delete_list(list);
    if (status == OG_OK) {
        status = og_flags_merge_run(all, taken, &out, (int64_t)stack[1], &err);
    }
    for (size_t i = 0; all != NULL && i < taken; i++) {
        drop(all[i]);
    }
    if (all != few) {
        free(all);
    }
    finish(status, &err, "opguard::flags_merge");
    stack[0] = (StableIValue)(uintptr_t)out;
}

void
og_op_flags_merge_(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    const AtenTensorHandle both[2] = {handle_at(stack, 0),
                                      handle_at(stack, 1)};
    AtenTensorHandle flags = both[0];
    og_status status =
        og_flags_merge_run(both, 2, &flags, (int64_t)stack[2], &err);
    finish_void(stack, 2, status, &err, "opguard::flags_merge_");
}

void
og_op_flags_gather(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status =
        og_flags_gather_run(handle_at(stack, 0), handle_at(stack, 1), &out,
                            (int64_t)stack[2], &err);
    finish_new(stack, 2, out, status, &err, "opguard::flags_gather");
}

void
og_op_flags_clear(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status =
        og_flags_clear_run(handle_at(stack, 0), (int64_t)stack[1], &out, &err);
    finish_new(stack, 1, out, status, &err, "opguard::flags_clear");
}

static void
query(StableIValue *stack, og_flags_what what, int64_t mask, int64_t value,
      const char *op)
{
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status =
        og_flags_query_run(handle_at(stack, 0), what, mask, value, &out, &err);
    finish_new(stack, 1, out, status, &err, op);
}

void
og_op_flags_find(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    query(stack, OG_FLAGS_FIND, (int64_t)stack[1], (int64_t)stack[2],
          "opguard::flags_find");
}

void
og_op_flags_ok(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    query(stack, OG_FLAGS_OK, 0, 0, "opguard::flags_ok");
}

void
og_op_flags_err(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    query(stack, OG_FLAGS_ERR, 0, 0, "opguard::flags_err");
}

void
og_op_flags_count(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    query(stack, OG_FLAGS_COUNT, 0, 0, "opguard::flags_count");
}

void
og_op_flags_max_severity(StableIValue *stack, uint64_t inputs,
                         uint64_t outputs)
{
    (void)inputs, (void)outputs;
    query(stack, OG_FLAGS_MAX_SEVERITY, 0, 0, "opguard::flags_max_severity");
}

void
og_op_row_findings(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err;
    AtenTensorHandle out = NULL;
    og_status status = og_flags_findings_run(handle_at(stack, 0), &out, &err);
    finish_new(stack, 1, out, status, &err, "opguard::row_findings");
}
