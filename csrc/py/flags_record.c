/* What writes errors into flags: check, index, push, merge and new. */
#include "py/flags_work.h"

static og_status
call(const og_ops *ops, const og_flags_work *job, og_error *err)
{
    switch (job->kind) {
        case OG_WORK_CHECK:
            return ops->flags_check(job->other, job->inputs[0], job->out,
                                    job->place, job->number, job->key, err);
        case OG_WORK_INDEX:
            return ops->flags_index(job->other, job->inputs[0], job->out, NULL,
                                    job->number, job->place, job->key, err);
        case OG_WORK_PUSH:
            return ops->flags_push(job->inputs[0], job->other, job->out,
                                   job->place, job->key, err);
        case OG_WORK_GATHER:
            return ops->flags_gather(job->inputs[0], job->other, job->out,
                                     job->key, err);
        default:
            return ops->flags_merge(job->inputs, job->count, job->out,
                                    job->key, err);
    }
}

og_status
og_flags_run(og_state *state, const og_flags_work *job, og_error *err)
{
    const og_ops *ops = state->ops.table;
    og_status status;
    if (job->elements < OG_FLAGS_LET_GO) {
        return call(ops, job, err);
    }
    Py_BEGIN_ALLOW_THREADS
        status = call(ops, job, err);
    Py_END_ALLOW_THREADS
    return status;
}

static og_status
run(og_state *state, const og_flags_work *job)
{
    og_error err;
    return og_flags_run(state, job, &err);
}

/* Into flags that are there. */
static int
run_in_place(og_state *state, og_flags_work *job, PyObject *flags,
             PyObject **result)
{
    job->out = job->inputs[0];
    if (run(state, job) != OG_OK) {
        return OG_ROAD_LONG;
    }
    *result = Py_NewRef(flags);
    return OG_ROAD_SHORT;
}

/* Into a tensor like flags. */
static int
run_like(og_state *state, og_flags_work *job, const og_look *look,
         PyObject *flags, PyObject **result)
{
    og_flags_out out = {NULL, NULL};
    OG_FLAGS_STEP(og_flags_make_like(state, look, flags, &out));
    job->out = out.impl;
    return og_flags_done(run(state, job), out, result);
}

/* --- check and index: (x, location, f or None, checks, key) --- */

typedef struct data_args {
    PyObject *data;
    PyObject *location;
    PyObject *flags;
    PyObject *number;
    PyObject *key;
} data_args;

static int
on_data(og_state *state, const data_args *args, og_flags_work *job,
        bool in_place, PyObject **result)
{
    og_look data, flags;
    og_flags_out out = {NULL, NULL};
    OG_FLAGS_STEP(og_flags_location(state, args->location, &job->place));
    OG_FLAGS_STEP(og_flags_int(args->number, &job->number));
    OG_FLAGS_STEP(og_flags_int(args->key, &job->key));
    OG_FLAGS_STEP(og_flags_clear_road(state));
    OG_FLAGS_STEP(og_flags_look(state, args->data, &job->other, &data));
    job->elements = data.numel;
    if (in_place) {
        OG_FLAGS_STEP(og_flags_impl(state, args->flags, &job->inputs[0]));
        return run_in_place(state, job, args->flags, result);
    }
    if (args->flags == Py_None) {
        OG_FLAGS_STEP(
            og_flags_make_new(state, job->key, &data, args->data, &out));
        job->out = out.impl;
        return og_flags_done(run(state, job), out, result);
    }
    OG_FLAGS_STEP(og_flags_look(state, args->flags, &job->inputs[0], &flags));
    return run_like(state, job, &flags, args->flags, result);
}

PyDoc_STRVAR(flags_check_doc,
             "flags_check($module, x, location, f, checks, key, /)\n--\n\n"
             "opguard.flags._engine.check by the shortest road.");

static PyObject *
flags_check(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    og_flags_work job = {.kind = OG_WORK_CHECK};
    int road = OG_ROAD_LONG;
    if (count == 5) {
        data_args given = {args[0], args[1], args[2], args[3], args[4]};
        road = on_data(state, &given, &job, false, &result);
    }
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.check, args, count);
}

PyDoc_STRVAR(flags_check_in_doc,
             "flags_check_($module, x, location, f, checks, key, /)\n--\n\n"
             "opguard.flags._engine.check_ by the shortest road.");

static PyObject *
flags_check_in(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    og_flags_work job = {.kind = OG_WORK_CHECK};
    int road = OG_ROAD_LONG;
    if (count == 5) {
        data_args given = {args[0], args[1], args[2], args[3], args[4]};
        road = on_data(state, &given, &job, true, &result);
    }
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.check_, args, count);
}

PyDoc_STRVAR(flags_index_doc,
             "flags_index($module, ids, size, location, f, key, /)\n--\n\n"
             "opguard.flags._engine.index by the shortest road.");

static PyObject *
flags_index(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    og_flags_work job = {.kind = OG_WORK_INDEX};
    int road = OG_ROAD_LONG;
    if (count == 5) {
        data_args given = {args[0], args[2], args[3], args[1], args[4]};
        road = on_data(state, &given, &job, false, &result);
    }
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.index, args, count);
}

/* --- push: (f, where, code, location, severity, key[, default_severity]) */

static int
push(og_state *state, PyObject *const *args, Py_ssize_t count, bool in_place,
     PyObject **result)
{
    og_flags_work job = {.kind = OG_WORK_PUSH};
    og_look look, mask;
    int64_t otherwise = OG_SEVERITY_ERROR;
    if (count == 7) {
        OG_FLAGS_STEP(og_flags_int(args[6], &otherwise));
    }
    else if (count != 6) {
        return OG_ROAD_LONG;
    }
    OG_FLAGS_STEP(og_flags_slot(state, args[3], args[2], args[4], otherwise,
                                &job.place));
    OG_FLAGS_STEP(og_flags_int(args[5], &job.key));
    OG_FLAGS_STEP(og_flags_clear_road(state));
    OG_FLAGS_STEP(og_flags_look(state, args[0], &job.inputs[0], &look));
    job.elements = look.numel;
    if (args[1] != Py_None) {
        OG_FLAGS_STEP(og_flags_look(state, args[1], &job.other, &mask));
        if (mask.ndim != 1 || mask.dtype != OG_TORCH_BOOL) {
            return OG_ROAD_LONG;
        }
    }
    return in_place ? run_in_place(state, &job, args[0], result)
                    : run_like(state, &job, &look, args[0], result);
}

PyDoc_STRVAR(flags_push_doc,
             "flags_push($module, f, where, code, location, severity, key, "
             "default_severity=2, /)\n--\n\n"
             "opguard.flags._engine.push by the shortest road.");

static PyObject *
flags_push(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    int road = push(state, args, count, false, &result);
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.push, args, count);
}

PyDoc_STRVAR(flags_push_in_doc,
             "flags_push_($module, f, where, code, location, severity, key, "
             "default_severity=2, /)\n--\n\n"
             "opguard.flags._engine.push_ by the shortest road.");

static PyObject *
flags_push_in(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    int road = push(state, args, count, true, &result);
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.push_, args, count);
}

/* --- merge: (list or tuple of flags, key) and (f, g, key) --- */

static PyObject *
item(PyObject *list, Py_ssize_t i)
{
    return PyList_CheckExact(list) ? PyList_GetItem(list, i)
                                   : PyTuple_GetItem(list, i);
}

static int
merge(og_state *state, PyObject *const *args, PyObject **result)
{
    og_flags_work job = {.kind = OG_WORK_MERGE};
    og_look first;
    Py_ssize_t count = PyList_CheckExact(args[0])    ? PyList_Size(args[0])
                       : PyTuple_CheckExact(args[0]) ? PyTuple_Size(args[0])
                                                     : 0;
    if (count < 2 || count > OG_FLAGS_MERGED) {
        return OG_ROAD_LONG;
    }
    OG_FLAGS_STEP(og_flags_int(args[1], &job.key));
    OG_FLAGS_STEP(og_flags_clear_road(state));
    job.count = (size_t)count;
    for (Py_ssize_t i = 1; i < count; i++) {
        OG_FLAGS_STEP(og_flags_impl(state, item(args[0], i), &job.inputs[i]));
    }
    PyObject *flags = item(args[0], 0);
    OG_FLAGS_STEP(og_flags_look(state, flags, &job.inputs[0], &first));
    job.elements = first.numel * (int64_t)count;
    return run_like(state, &job, &first, flags, result);
}

PyDoc_STRVAR(flags_merge_doc,
             "flags_merge($module, fs, key, /)\n--\n\n"
             "opguard.flags._engine.merge by the shortest road.");

static PyObject *
flags_merge(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    int road = count == 2 ? merge(state, args, &result) : OG_ROAD_LONG;
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.merge, args, count);
}

static int
merge_in(og_state *state, PyObject *const *args, PyObject **result)
{
    og_flags_work job = {.kind = OG_WORK_MERGE, .count = 2};
    og_look look;
    OG_FLAGS_STEP(og_flags_int(args[2], &job.key));
    OG_FLAGS_STEP(og_flags_clear_road(state));
    OG_FLAGS_STEP(og_flags_look(state, args[0], &job.inputs[0], &look));
    OG_FLAGS_STEP(og_flags_impl(state, args[1], &job.inputs[1]));
    job.elements = look.numel;
    return run_in_place(state, &job, args[0], result);
}

PyDoc_STRVAR(flags_merge_in_doc,
             "flags_merge_($module, f, g, key, /)\n--\n\n"
             "opguard.flags._engine.merge_ by the shortest road.");

static PyObject *
flags_merge_in(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    int road = count == 3 ? merge_in(state, args, &result) : OG_ROAD_LONG;
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.merge_, args, count);
}

/* --- gather: (f, index, key) --- */

static int
gather(og_state *state, PyObject *const *args, PyObject **result)
{
    og_flags_work job = {.kind = OG_WORK_GATHER};
    og_look flags, index;
    og_flags_out out = {NULL, NULL};
    OG_FLAGS_STEP(og_flags_int(args[2], &job.key));
    OG_FLAGS_STEP(og_flags_clear_road(state));
    OG_FLAGS_STEP(og_flags_look(state, args[0], &job.inputs[0], &flags));
    OG_FLAGS_STEP(og_flags_look(state, args[1], &job.other, &index));
    if (flags.ndim != 2 || og_flags_slots(flags.dtype) == 0 ||
        index.ndim < 1) {
        return OG_ROAD_LONG;
    }
    OG_FLAGS_STEP(og_flags_make(state, index.sizes[0], flags.sizes[1],
                                flags.dtype, &flags, args[0], &out));
    job.out = out.impl;
    job.elements = index.numel * flags.sizes[1];
    return og_flags_done(run(state, &job), out, result);
}

PyDoc_STRVAR(flags_gather_doc,
             "flags_gather($module, f, index, key, /)\n--\n\n"
             "opguard.flags._engine.gather by the shortest road.");

static PyObject *
flags_gather(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    int road = count == 3 ? gather(state, args, &result) : OG_ROAD_LONG;
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.gather, args, count);
}

PyMethodDef og_flags_record_methods[] = {
    {"flags_check", (PyCFunction)(void (*)(void))flags_check, METH_FASTCALL,
     flags_check_doc},
    {"flags_check_", (PyCFunction)(void (*)(void))flags_check_in,
     METH_FASTCALL, flags_check_in_doc},
    {"flags_index", (PyCFunction)(void (*)(void))flags_index, METH_FASTCALL,
     flags_index_doc},
    {"flags_push", (PyCFunction)(void (*)(void))flags_push, METH_FASTCALL,
     flags_push_doc},
    {"flags_push_", (PyCFunction)(void (*)(void))flags_push_in, METH_FASTCALL,
     flags_push_in_doc},
    {"flags_merge", (PyCFunction)(void (*)(void))flags_merge, METH_FASTCALL,
     flags_merge_doc},
    {"flags_merge_", (PyCFunction)(void (*)(void))flags_merge_in,
     METH_FASTCALL, flags_merge_in_doc},
    {"flags_gather", (PyCFunction)(void (*)(void))flags_gather, METH_FASTCALL,
     flags_gather_doc},
    {NULL, NULL, 0, NULL},
};
