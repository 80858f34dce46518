/* What is asked of flags, (N,) answers: find, is_ok, is_err, count,
 * max_severity; and new, flags without an error. */
#include "py/flags_road.h"

typedef struct question {
    og_flags_what what;
    int64_t mask;
    int64_t value;
} question;

static int32_t
answer_dtype(og_flags_what what, int32_t flags_dtype)
{
    switch (what) {
        case OG_FLAGS_COUNT:
            return OG_TORCH_INT32;
        case OG_FLAGS_MAX_SEVERITY:
            return og_flags_slots(flags_dtype) == 2 ? OG_TORCH_INT32
                                                    : OG_TORCH_INT64;
        default:
            return OG_TORCH_BOOL;
    }
}

static int
ask(og_state *state, PyObject *flags, question asked, PyObject **result)
{
    void *impl = NULL;
    og_look look;
    og_error err;
    og_status status;
    og_flags_out out = {NULL, NULL};
    OG_FLAGS_STEP(og_flags_clear_road(state));
    OG_FLAGS_STEP(og_flags_look(state, flags, &impl, &look));
    if (look.ndim != 2 || og_flags_slots(look.dtype) == 0) {
        return OG_ROAD_LONG;
    }
    OG_FLAGS_STEP(og_flags_make(state, look.sizes[0], -1,
                                answer_dtype(asked.what, look.dtype), &look,
                                flags, &out));
    const og_ops *ops = state->ops.table;
    if (look.numel < OG_FLAGS_LET_GO) {
        status = ops->flags_query(impl, asked.what, asked.mask, asked.value,
                                  out.impl, &err);
    }
    else {
        Py_BEGIN_ALLOW_THREADS
            status = ops->flags_query(impl, asked.what, asked.mask,
                                      asked.value, out.impl, &err);
        Py_END_ALLOW_THREADS
    }
    return og_flags_done(status, out, result);
}

static PyObject *
ask_one(PyObject *module, PyObject *flags, og_flags_what what,
        PyObject *function)
{
    PyObject *result = NULL;
    int road =
        ask(og_state_get(module), flags, (question){.what = what}, &result);
    return og_flags_end(road, result, function, &flags, 1);
}

PyDoc_STRVAR(flags_find_doc,
             "flags_find($module, f, mask, value, /)\n--\n\n"
             "opguard.flags._engine.find by the shortest road.");

static PyObject *
flags_find(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    question asked = {.what = OG_FLAGS_FIND};
    int road = OG_ROAD_LONG;
    if (count == 3 && og_flags_int(args[1], &asked.mask) == OG_ROAD_SHORT &&
        og_flags_int(args[2], &asked.value) == OG_ROAD_SHORT) {
        road = ask(state, args[0], asked, &result);
    }
    return og_flags_end(road, result, state->flags.find, args, count);
}

PyDoc_STRVAR(flags_is_ok_doc,
             "flags_is_ok($module, f, /)\n--\n\n"
             "opguard.flags._engine.is_ok by the shortest road.");

static PyObject *
flags_is_ok(PyObject *module, PyObject *flags)
{
    return ask_one(module, flags, OG_FLAGS_OK,
                   og_state_get(module)->flags.is_ok);
}

PyDoc_STRVAR(flags_is_err_doc,
             "flags_is_err($module, f, /)\n--\n\n"
             "opguard.flags._engine.is_err by the shortest road.");

static PyObject *
flags_is_err(PyObject *module, PyObject *flags)
{
    return ask_one(module, flags, OG_FLAGS_ERR,
                   og_state_get(module)->flags.is_err);
}

PyDoc_STRVAR(flags_count_doc,
             "flags_count($module, f, /)\n--\n\n"
             "opguard.flags._engine.count by the shortest road.");

static PyObject *
flags_count(PyObject *module, PyObject *flags)
{
    return ask_one(module, flags, OG_FLAGS_COUNT,
                   og_state_get(module)->flags.count);
}

PyDoc_STRVAR(flags_max_severity_doc,
             "flags_max_severity($module, f, /)\n--\n\n"
             "opguard.flags._engine.max_severity by the shortest road.");

static PyObject *
flags_max_severity(PyObject *module, PyObject *flags)
{
    return ask_one(module, flags, OG_FLAGS_MAX_SEVERITY,
                   og_state_get(module)->flags.max_severity);
}

/* --- new: (samples, device or None, key) --- */

static int
make_zero(og_state *state, PyObject *const *args, PyObject **result)
{
    int64_t samples = 0, key = 0;
    if (args[1] != Py_None || state->flags.api == NULL) {
        return OG_ROAD_LONG;
    }
    OG_FLAGS_STEP(og_flags_int(args[0], &samples));
    OG_FLAGS_STEP(og_flags_int(args[2], &key));
    if (samples < 0 || !og_policy_key_ok(key)) {
        return OG_ROAD_LONG;
    }
    OG_FLAGS_STEP(og_flags_clear_road(state));
    og_policy policy = og_policy_of(key);
    int slots =
        policy.carrier == OG_INT32 || policy.carrier == OG_FLOAT32 ? 2 : 4;
    int code = policy.carrier == OG_FLOAT32 || policy.carrier == OG_FLOAT64
                   ? OG_DLPACK_FLOAT
                   : OG_DLPACK_INT;
    *result = og_dlpack_new(state->flags.api, samples,
                            (policy.num_slots + slots - 1) / slots, code,
                            16 * slots, true);
    return *result == NULL ? OG_ROAD_FAILED : OG_ROAD_SHORT;
}

PyDoc_STRVAR(flags_new_doc,
             "flags_new($module, samples, device, key, /)\n--\n\n"
             "opguard.flags._engine.new by the shortest road.");

static PyObject *
flags_new(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    og_state *state = og_state_get(module);
    PyObject *result = NULL;
    int road = count == 3 ? make_zero(state, args, &result) : OG_ROAD_LONG;
    result = og_flags_told(state, road, result);
    return og_flags_end(road, result, state->flags.new, args, count);
}

PyMethodDef og_flags_query_methods[] = {
    {"flags_find", (PyCFunction)(void (*)(void))flags_find, METH_FASTCALL,
     flags_find_doc},
    {"flags_is_ok", flags_is_ok, METH_O, flags_is_ok_doc},
    {"flags_is_err", flags_is_err, METH_O, flags_is_err_doc},
    {"flags_count", flags_count, METH_O, flags_count_doc},
    {"flags_max_severity", flags_max_severity, METH_O, flags_max_severity_doc},
    {"flags_new", (PyCFunction)(void (*)(void))flags_new, METH_FASTCALL,
     flags_new_doc},
    {NULL, NULL, 0, NULL},
};
