/* Empty frames.
 *
 * An empty frame is the frame of a generator that never ran, of the code that
 * sanitize_code.c makes. Its globals are a small dict of what formatters ask
 * for, since the user's may hold tensors too.
 *
 * Making the code costs microseconds, so it is cached by code object and
 * offset in a 4-way table of fixed size. */
#include "py/sanitize_frames.h"

#include <string.h>

#define SETS 256
#define WAYS 4
#define NEAR_ITEMS 16
#define FLAG_OPTIMIZED 0x1

/* What formatters look for in a frame's globals, and our own mark. */
static PyObject *
small_globals(og_state *state, PyObject *frame)
{
    og_sanitize_state *s = &state->sanitize;
    PyObject *globals = PyObject_GetAttr(frame, s->names[OG_NAME_F_GLOBALS]);
    PyObject *result = globals == NULL ? NULL : PyDict_New();
    if (result != NULL &&
        PyDict_SetItem(result, s->names[OG_NAME_EMPTY], Py_True) < 0) {
        Py_CLEAR(result);
    }
    for (Py_ssize_t i = 0; result != NULL && i < PyTuple_Size(s->global_names);
         i++) {
        PyObject *name = PyTuple_GetItem(s->global_names, i);
        PyObject *value = PyDict_Check(globals)
                              ? PyDict_GetItemWithError(globals, name)
                              : NULL;
        if (value != NULL ? PyDict_SetItem(result, name, value) < 0
                          : PyErr_Occurred() != NULL) {
            Py_CLEAR(result);
        }
    }
    Py_XDECREF(globals);
    return result;
}

/* Has this frame the globals that small_globals made? -1 on error. */
static int
is_empty_frame(og_state *state, PyObject *frame)
{
    og_sanitize_state *s = &state->sanitize;
    PyObject *globals = PyObject_GetAttr(frame, s->names[OG_NAME_F_GLOBALS]);
    if (globals == NULL) {
        return -1;
    }
    int result = PyDict_Check(globals)
                     ? PyDict_Contains(globals, s->names[OG_NAME_EMPTY])
                     : 0;
    Py_DECREF(globals);
    return result;
}

static int
entry_make(og_state *state, PyObject *frame, PyObject *code, int lasti,
           og_code_entry *entry)
{
    PyObject *empty = NULL, *globals = NULL, *flags = NULL;
    int result = -1;
    int own = is_empty_frame(state, frame);
    if (own < 0) {
        return -1;
    }
    if (own == 0) {
        flags = PyObject_GetAttrString(code, "co_flags");
        empty = og_empty_code(state, code, lasti, &entry->hides);
        globals = small_globals(state, frame);
        if (flags == NULL || empty == NULL || globals == NULL) {
            goto done;
        }
        entry->optimized = (PyLong_AsLong(flags) & FLAG_OPTIMIZED) != 0;
        entry->make = PyObject_CallFunctionObjArgs(
            state->sanitize.function_type, empty, globals, NULL);
        if (entry->make == NULL) {
            goto done;
        }
    }
    entry->code = Py_NewRef(code);
    entry->lasti = lasti;
    result = 0;
done:
    Py_XDECREF(empty);
    Py_XDECREF(globals);
    Py_XDECREF(flags);
    return result;
}

const og_code_entry *
og_code_entry_of(og_state *state, PyObject *frame, int lasti)
{
    og_sanitize_state *s = &state->sanitize;
    PyObject *code = (PyObject *)PyFrame_GetCode((PyFrameObject *)frame);
    if (s->codes == NULL) {
        s->codes = PyMem_Calloc(SETS * WAYS, sizeof *s->codes);
        if (s->codes == NULL) {
            Py_DECREF(code);
            PyErr_NoMemory();
            return NULL;
        }
    }
    uint64_t mixed = ((uint64_t)(uintptr_t)code + (uint64_t)(unsigned)lasti) *
                     UINT64_C(0x9E3779B97F4A7C15);
    og_code_entry *set = &s->codes[(size_t)(mixed >> 56) % SETS * WAYS];
    for (size_t i = 0; i < WAYS; i++) {
        if (set[i].code == code && set[i].lasti == lasti) {
            Py_DECREF(code);
            return &set[i];
        }
    }
    og_code_entry made = {0};
    int failed = entry_make(state, frame, code, lasti, &made);
    Py_DECREF(code);
    if (failed) {
        return NULL;
    }
    /* Before it comes in: what is released may run code that comes here. */
    while (set[WAYS - 1].code != NULL) {
        og_code_entry old = set[WAYS - 1];
        set[WAYS - 1] = (og_code_entry){0};
        Py_DECREF(old.code);
        Py_XDECREF(old.make);
    }
    memmove(&set[1], &set[0], (WAYS - 1) * sizeof *set);
    set[0] = made;
    return &set[0];
}

static bool
may_hide(og_state *state, PyObject *value)
{
    if (value == Py_True || value == Py_False || value == Py_None ||
        PyLong_CheckExact(value)) {
        return true;
    }
    /* pytest calls it; one with a closure might hold anything. */
    if (Py_TYPE(value) != (PyTypeObject *)state->sanitize.function_type) {
        return false;
    }
    PyObject *closure = PyObject_GetAttrString(value, "__closure__");
    bool result = closure == Py_None;
    Py_XDECREF(closure);
    return result;
}

/* Carries __tracebackhide__ and the like over; failing is not an error. */
static void
copy_hiding(og_state *state, PyObject *frame, PyObject *empty)
{
    og_sanitize_state *s = &state->sanitize;
    PyObject *from = PyObject_GetAttr(frame, s->names[OG_NAME_F_LOCALS]);
    PyObject *to = PyObject_GetAttr(empty, s->names[OG_NAME_F_LOCALS]);
    for (Py_ssize_t i = 0;
         from != NULL && to != NULL && i < PyTuple_Size(s->hide_names); i++) {
        PyObject *name = PyTuple_GetItem(s->hide_names, i);
        PyObject *value = PyObject_GetItem(from, name);
        if (value != NULL && may_hide(state, value)) {
            (void)PyObject_SetItem(to, name, value);
        }
        Py_XDECREF(value);
        og_forget();
    }
    if (from != NULL) {
        og_snapshot_drop(from, 1);
    }
    Py_XDECREF(from);
    Py_XDECREF(to);
    og_forget();
}

PyObject *
og_empty_frame(og_state *state, PyObject *frame, const og_code_entry *entry)
{
    bool hides = entry->hides;
    PyObject *generator = PyObject_CallNoArgs(entry->make);
    if (generator == NULL) {
        return NULL;
    }
    PyObject *empty =
        PyObject_GetAttr(generator, state->sanitize.names[OG_NAME_GI_FRAME]);
    if (empty != NULL && hides) {
        copy_hiding(state, frame, empty);
    }
    Py_DECREF(generator);
    return empty;
}

bool
og_is_tensor(og_state *state, PyObject *object)
{
    PyTypeObject *tensor = (PyTypeObject *)state->ops.tensor_type;
    return tensor != NULL && PyObject_TypeCheck(object, tensor);
}

bool
og_has_tensor_near(og_state *state, PyObject *object)
{
    if (og_is_tensor(state, object)) {
        return true;
    }
    if (PyTuple_CheckExact(object)) {
        Py_ssize_t count = PyTuple_Size(object);
        for (Py_ssize_t i = 0; i < count && i < NEAR_ITEMS; i++) {
            PyObject *item = PyTuple_GetItem(object, i);
            if (item != NULL && og_is_tensor(state, item)) {
                return true;
            }
        }
    }
    else if (PyList_CheckExact(object)) {
        Py_ssize_t count = PyList_Size(object);
        for (Py_ssize_t i = 0; i < count && i < NEAR_ITEMS; i++) {
            if (og_is_tensor(state, PyList_GetItem(object, i))) {
                return true;
            }
        }
    }
    else if (PyDict_CheckExact(object)) {
        PyObject *key, *value;
        Py_ssize_t at = 0, seen = 0;
        while (seen++ < NEAR_ITEMS && PyDict_Next(object, &at, &key, &value)) {
            if (og_is_tensor(state, value)) {
                return true;
            }
        }
    }
    return false;
}

typedef struct looking {
    og_state *state;
    og_frame_look look;
    bool after_function;
} looking;

static int
look_cell(PyObject *object, void *arg)
{
    looking *at = arg;
    at->look.has_tensor =
        at->look.has_tensor || og_has_tensor_near(at->state, object);
    return 0;
}

/* Order of the interpreters: f_back, f_trace, snapshot, function, code,
 * values. Only a frame that owns its values shows its code. f_trace may be
 * any object, a code too, but no function comes before it: to take a running
 * frame for a finished one would clear what is being executed. */
static int
look_referent(PyObject *object, void *arg)
{
    looking *at = arg;
    og_sanitize_state *s = &at->state->sanitize;
    if (!at->look.finished) {
        if (Py_TYPE(object) == &PyDict_Type) {
            at->look.snapshot = object;
        }
        else if (Py_TYPE(object) == (PyTypeObject *)s->code_type) {
            at->look.finished = at->after_function;
        }
        at->after_function =
            Py_TYPE(object) == (PyTypeObject *)s->function_type;
    }
    else if (Py_TYPE(object) == (PyTypeObject *)s->cell_type) {
        (void)s->cell_traverse(object, look_cell, arg);
    }
    else if (!at->look.has_tensor) {
        at->look.has_tensor = og_has_tensor_near(at->state, object);
    }
    return 0;
}

og_frame_look
og_frame_look_at(og_state *state, PyObject *frame)
{
    looking at = {state, {false, false, NULL}, false};
    (void)state->sanitize.frame_traverse(frame, look_referent, &at);
    return at.look;
}

void
og_snapshot_drop(PyObject *snapshot, Py_ssize_t ours)
{
    /* The frame holds one reference. Should somebody have kept what
     * locals() gave, it is theirs. From 3.13 on there is none. */
    if (PyDict_CheckExact(snapshot) && Py_Version < 0x030d0000 &&
        Py_REFCNT(snapshot) <= ours + 1) {
        PyDict_Clear(snapshot);
    }
}

void
og_frame_clear(og_state *state, PyObject *frame, const og_frame_look *look)
{
    if (look->finished) {
        (void)state->sanitize.frame_clear(frame);
    }
    else if (Py_Version >= 0x030d0000) {
        /* Refuses running and suspended frames by itself; there for an
         * interpreter whose finished frames do not show their code. */
        PyObject *none = PyObject_CallMethodObjArgs(
            frame, state->sanitize.names[OG_NAME_CLEAR], NULL);
        Py_XDECREF(none);
    }
    og_forget();
}

void
og_codes_free(og_sanitize_state *sanitize)
{
    og_code_entry *codes = sanitize->codes;
    sanitize->codes = NULL;
    for (size_t i = 0; codes != NULL && i < SETS * WAYS; i++) {
        Py_XDECREF(codes[i].code);
        Py_XDECREF(codes[i].make);
    }
    PyMem_Free(codes);
}

int
og_codes_traverse(og_sanitize_state *sanitize, visitproc visit, void *arg)
{
    for (size_t i = 0; sanitize->codes != NULL && i < SETS * WAYS; i++) {
        Py_VISIT(sanitize->codes[i].code);
        Py_VISIT(sanitize->codes[i].make);
    }
    return 0;
}
