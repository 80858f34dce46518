/* Several flag ops as one call, for compiled code with small tensors: what a
 * call costs there is its way in and the memory of its result, not its work.
 * The results between the ops are registers, memory of this call alone. */
#include <stdlib.h>

#include "torch/flags_read.h"
#include "torch/flags_table.h"

enum { REGISTERS = 16, TENSORS = 64, SMALL = 4096 };

typedef struct chain {
    og_flags_view out;
    og_rows registers[REGISTERS]; /* the first is out */
    AtenTensorHandle *tensors;
    size_t count;
    _Alignas(64) char small[SMALL];
    void *heap; /* NULL, or where the other registers are */
} chain;

static og_status
refuse(og_error *err)
{
    return og_fail(err, OG_BAD_ARGUMENT,
                   "expected steps that name tensors and registers of their "
                   "call; compile the program anew");
}

static og_status
make_registers(chain *c, const og_flags_step *steps, size_t count,
               og_error *err)
{
    int64_t most = 0;
    for (size_t i = 0; i < count; i++) {
        if (steps[i].to < 0 || steps[i].to >= REGISTERS) {
            return refuse(err);
        }
        most = steps[i].to > most ? steps[i].to : most;
    }
    int64_t stride = 2 * (int64_t)c->out.rows.capacity;
    size_t bytes = (size_t)(stride * c->out.samples);
    char *memory = c->small;
    if (bytes * (size_t)most > SMALL) {
        memory = c->heap = malloc(bytes * (size_t)most);
        if (memory == NULL) {
            return og_fail(err, OG_NO_MEMORY, "no memory for flags");
        }
    }
    for (int64_t i = 0; i < REGISTERS; i++) {
        c->registers[i] = c->out.rows;
        if (i > 0 && i <= most) {
            c->registers[i].data = memory + (size_t)(i - 1) * bytes;
            c->registers[i].stride = stride;
        }
    }
    return OG_OK;
}

static bool
is_register(int64_t place)
{
    return place >= 0 && place < REGISTERS;
}

static og_status
read_tensor(const chain *c, int64_t place, og_tensor *t, og_error *err)
{
    if (place < 0 || place >= (int64_t)c->count) {
        return refuse(err);
    }
    og_status status = og_tensor_read(t, c->tensors[place], false, "x", err);
    return status == OG_OK ? og_check_goes_with(t, &c->out, "x", err) : status;
}

/* Flags from outside go into their register first. */
static og_status
load(const chain *c, const og_flags_step *step, og_error *err)
{
    og_flags_view given = {.given = NULL};
    if (step->other < 0 || step->other >= (int64_t)c->count) {
        return refuse(err);
    }
    og_status status =
        og_flags_open(&given, c->tensors[step->other], false, "flags", err);
    if (status == OG_OK &&
        (given.samples != c->out.samples || given.words != c->out.words ||
         given.dtype != c->out.dtype ||
         given.device_type != c->out.device_type)) {
        status = refuse(err);
    }
    if (status == OG_OK && given.samples > 0) {
        og_batch_copy(given.rows, c->registers[step->to], 0, given.samples);
    }
    return og_flags_close(&given, status, err);
}

static og_status
check(const chain *c, const og_flags_step *step, og_flags_rows rows,
      og_error *err)
{
    const int32_t all = OG_FOUND_NAN | OG_FOUND_POS_INF | OG_FOUND_NEG_INF;
    og_flags_check call = {.rows = rows};
    og_status status = read_tensor(c, step->other, &call.x, err);
    if (status != OG_OK) {
        return status;
    }
    if (step->place < 0 || step->place > OG_LOCATION_MAX ||
        (step->number & ~(int64_t)all) != 0) {
        return refuse(err);
    }
    call.kind = og_dtype_kind(call.x.dtype);
    call.checks = (int32_t)step->number;
    call.location = (int32_t)step->place;
    return og_flags_cpu.check(&call, err);
}

static og_status
push(const chain *c, const og_flags_step *step, og_flags_rows rows,
     og_error *err)
{
    og_flags_push call = {.rows = rows, .slot = (uint16_t)step->place};
    og_status status = og_check_word(step->place, "a slot", err);
    if (status == OG_OK && step->other >= 0) {
        og_tensor where;
        status = read_tensor(c, step->other, &where, err);
        if (status == OG_OK &&
            (where.ndim != 1 || where.dtype != OG_DTYPE_BOOL)) {
            status = refuse(err);
        }
        call.where = status == OG_OK ? where.data : NULL;
        call.where_stride = status == OG_OK ? where.strides[0] : 0;
    }
    return status == OG_OK ? og_flags_cpu.push(&call, err) : status;
}

static og_status
run_step(const chain *c, const og_flags_step *step, og_error *err)
{
    og_flags_rows rows = {.samples = c->out.samples,
                          .to = c->registers[step->to]};
    og_flags_merge call;
    og_status status = og_check_key(step->key, &rows.policy, err);
    if (status != OG_OK) {
        return status;
    }
    rows.from = is_register(step->from)
                    ? c->registers[step->from]
                    : (og_rows){.capacity = rows.to.capacity};
    switch (step->kind) {
        case OG_STEP_LOAD:
            return load(c, step, err);
        case OG_STEP_CHECK:
            return check(c, step, rows, err);
        case OG_STEP_PUSH:
            return push(c, step, rows, err);
        case OG_STEP_MERGE:
            if (!is_register(step->other) || step->other == step->to ||
                !is_register(step->from)) {
                return refuse(err);
            }
            call = (og_flags_merge){rows, &c->registers[step->other], 1};
            return og_flags_cpu.merge(&call, err);
        default:
            return refuse(err);
    }
}

static og_status
run(chain *c, AtenTensorHandle out, const og_flags_step *steps, size_t count,
    og_error *err)
{
    og_status status = og_flags_open(&c->out, out, true, "out", err);
    if (status == OG_OK && c->out.device_type != OG_DEVICE_CPU) {
        status = refuse(err);
    }
    if (status == OG_OK) {
        status = make_registers(c, steps, count, err);
    }
    for (size_t i = 0; status == OG_OK && i < count; i++) {
        if (c->out.samples > 0) {
            status = run_step(c, &steps[i], err);
        }
    }
    free(c->heap);
    return og_flags_close(&c->out, status, err);
}

og_status
og_table_flags_chain(void *const *impls, size_t tensors,
                     const og_flags_step *steps, size_t count, void *out,
                     og_error *err)
{
    AtenTensorHandle handles[TENSORS];
    void *held[TENSORS];
    chain c;
    if (tensors > TENSORS || out == NULL) {
        return refuse(err);
    }
    for (size_t i = 0; i < tensors; i++) {
        held[i] = impls[i];
        handles[i] = (AtenTensorHandle)(void *)&held[i];
    }
    c.out = (og_flags_view){.given = NULL};
    c.tensors = handles;
    c.count = tensors;
    c.heap = NULL;
    return run(&c, (AtenTensorHandle)(void *)&out, steps, count, err);
}
