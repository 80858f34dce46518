/* What compiled graphs call: the same calls with everything settled when the
 * graph was made. Inductor's code passes real tensors, ids and slots that
 * were checked, and the tensor to write (opguard.flags._lowering). */
#include <string.h>

#include "py/flags_work.h"

/* Ints of a call, from `at` on: the last is the key, before it the others. */
typedef struct shape {
    og_flags_kind kind;
    int tensors; /* before the ints; flags first when there are two */
    int ints;
} shape;

static int
take_ints(PyObject *const *args, const shape *of, og_flags_work *work)
{
    int64_t numbers[3] = {0, 0, 0};
    for (int i = 0; i < of->ints; i++) {
        OG_FLAGS_STEP(og_flags_int(args[i], &numbers[i]));
    }
    work->key = numbers[of->ints - 1];
    work->place = numbers[0];
    work->number = numbers[1];
    if (of->kind == OG_WORK_INDEX) {
        work->place = numbers[1];
        work->number = numbers[0];
    }
    return OG_ROAD_SHORT;
}

static int
take_tensors(og_state *state, PyObject *const *args, const shape *of,
             Py_ssize_t count, og_flags_work *work)
{
    og_look look = {.numel = 0};
    if (of->kind == OG_WORK_MERGE) {
        work->count = (size_t)count;
        for (Py_ssize_t i = 0; i < count; i++) {
            OG_FLAGS_STEP(og_flags_impl(state, args[i], &work->inputs[i]));
        }
        return OG_ROAD_SHORT;
    }
    if (of->tensors == 2) {
        OG_FLAGS_STEP(og_flags_impl(state, args[0], &work->inputs[0]));
    }
    bool push_all = of->kind == OG_WORK_PUSH && of->tensors == 1;
    OG_FLAGS_STEP(og_flags_look(state, args[of->tensors - 1],
                                push_all ? &work->inputs[0] : &work->other,
                                &look));
    work->elements = look.numel;
    return OG_ROAD_SHORT;
}

static PyObject *
run_out(PyObject *module, PyObject *const *args, Py_ssize_t count,
        PyObject *names, const shape *of)
{
    og_state *state = og_state_get(module);
    og_flags_work work = {.kind = of->kind};
    og_error err = {OG_BAD_ARGUMENT, "these are not its arguments"};
    Py_ssize_t tensors =
        of->kind == OG_WORK_MERGE ? count - of->ints : of->tensors;
    int road = OG_ROAD_LONG;
    if (names != NULL && PyTuple_Size(names) == 1 &&
        count == tensors + of->ints && tensors > 0 &&
        tensors <= OG_FLAGS_MERGED && state->ops.table != NULL &&
        og_leaf_bind(state) == 0) {
        road = take_tensors(state, args, of, tensors, &work);
    }
    if (road == OG_ROAD_SHORT) {
        road = take_ints(args + tensors, of, &work);
    }
    if (road == OG_ROAD_SHORT) {
        road = og_flags_impl(state, args[count], &work.out);
    }
    if (road == OG_ROAD_SHORT && og_flags_run(state, &work, &err) == OG_OK) {
        Py_RETURN_NONE;
    }
    if (PyErr_Occurred() == NULL) {
        PyErr_Format(PyExc_RuntimeError,
                     "a flag op in compiled code failed: %s", err.message);
    }
    return NULL;
}

#define OUT(name, kind, tensors, ints, signature)                            \
    PyDoc_STRVAR(flags_out_##name##_doc,                                     \
                 "flags_out_" #name "($module, /, " signature                \
                 ", out)\n--\n\n"                                            \
                 "For code that torch.compile makes: no argument is looked " \
                 "at twice.");                                               \
                                                                             \
    static PyObject *flags_out_##name(PyObject *module,                      \
                                      PyObject *const *args,                 \
                                      Py_ssize_t count, PyObject *names)     \
    {                                                                        \
        static const shape of = {kind, tensors, ints};                       \
        return run_out(module, args, count, names, &of);                     \
    }

OUT(check, OG_WORK_CHECK, 2, 3, "f, x, location, checks, key, *")
OUT(check_new, OG_WORK_CHECK, 1, 3, "x, location, checks, key, *")
OUT(index, OG_WORK_INDEX, 2, 3, "f, ids, size, location, key, *")
OUT(index_new, OG_WORK_INDEX, 1, 3, "ids, size, location, key, *")
OUT(push, OG_WORK_PUSH, 2, 2, "f, where, slot, key, *")
OUT(push_all, OG_WORK_PUSH, 1, 2, "f, slot, key, *")
OUT(merge, OG_WORK_MERGE, 0, 1, "*fs, key")

/* Most tensors and steps of one chain, as the ops library has them. */
enum { CHAIN_TENSORS = 64, CHAIN_STEPS = 32 };

PyDoc_STRVAR(flags_out_chain_doc,
             "flags_out_chain($module, /, *tensors, steps, out)\n--\n\n"
             "Several ops of compiled code with small tensors as one call.\n\n"
             "steps: bytes, og_flags_step of opguard_ops.h one by one. Raises "
             "RuntimeError for steps that are none.");

static int
chain(og_state *state, PyObject *const *args, Py_ssize_t tensors,
      og_error *err)
{
    void *impls[CHAIN_TENSORS], *out = NULL;
    og_flags_step steps[CHAIN_STEPS];
    char *bytes = NULL;
    Py_ssize_t size = 0;
    if (!PyBytes_Check(args[tensors])) {
        return OG_ROAD_LONG;
    }
    if (PyBytes_AsStringAndSize(args[tensors], &bytes, &size) < 0) {
        return OG_ROAD_FAILED;
    }
    if ((size_t)size > sizeof steps || (size_t)size % sizeof *steps != 0) {
        return OG_ROAD_LONG;
    }
    memcpy(steps, bytes, (size_t)size);
    for (Py_ssize_t i = 0; i < tensors; i++) {
        OG_FLAGS_STEP(og_flags_impl(state, args[i], &impls[i]));
    }
    OG_FLAGS_STEP(og_flags_impl(state, args[tensors + 1], &out));
    return state->ops.table->flags_chain(impls, (size_t)tensors, steps,
                                         (size_t)size / sizeof *steps, out,
                                         err) == OG_OK
               ? OG_ROAD_SHORT
               : OG_ROAD_LONG;
}

static PyObject *
flags_out_chain(PyObject *module, PyObject *const *args, Py_ssize_t count,
                PyObject *names)
{
    og_state *state = og_state_get(module);
    og_error err = {OG_BAD_ARGUMENT, "these are not its arguments"};
    if (names != NULL && PyTuple_Size(names) == 1 && count >= 1 &&
        count <= CHAIN_TENSORS && state->ops.table != NULL &&
        og_leaf_bind(state) == 0 &&
        chain(state, args, count - 1, &err) == OG_ROAD_SHORT) {
        Py_RETURN_NONE;
    }
    if (PyErr_Occurred() == NULL) {
        PyErr_Format(PyExc_RuntimeError,
                     "a flag op in compiled code failed: %s", err.message);
    }
    return NULL;
}

#define METHOD(name)                                                    \
    {"flags_out_" #name, (PyCFunction)(void (*)(void))flags_out_##name, \
     METH_FASTCALL | METH_KEYWORDS, flags_out_##name##_doc}

PyMethodDef og_flags_out_methods[] = {
    METHOD(check),     METHOD(check_new), METHOD(index),
    METHOD(index_new), METHOD(push),      METHOD(push_all),
    METHOD(merge),     METHOD(chain),     {NULL, NULL, 0, NULL},
};
