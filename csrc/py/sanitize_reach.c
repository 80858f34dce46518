/* Looking into objects: their members, and whether they hold a tensor. */
#include "py/sanitize_copy.h"

/* Objects looked at before a search gives up and answers no. */
#define REACH_LIMIT 20000

PyObject *
og_descr_get(PyObject *descr, PyObject *object)
{
    descrgetfunc get =
        (descrgetfunc)PyType_GetSlot(Py_TYPE(descr), Py_tp_descr_get);
    PyObject *value =
        get == NULL ? NULL : get(descr, object, (PyObject *)Py_TYPE(object));
    if (value == NULL) {
        og_forget();
    }
    return value;
}

void
og_descr_set(PyObject *descr, PyObject *object, PyObject *value)
{
    descrsetfunc set =
        (descrsetfunc)PyType_GetSlot(Py_TYPE(descr), Py_tp_descr_set);
    if (set != NULL && set(descr, object, value) < 0) {
        og_forget();
    }
}

static int
add_members(PyObject *into, PyObject *dict)
{
    PyObject *values = PyMapping_Values(dict);
    int result = values == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; result == 0 && i < PyList_Size(values); i++) {
        PyObject *value = PyList_GetItem(values, i);
        if (Py_TYPE(value) == &PyMemberDescr_Type) {
            result = PyList_Append(into, value);
        }
    }
    Py_XDECREF(values);
    return result;
}

PyObject *
og_members_of(og_state *state, PyObject *object)
{
    og_sanitize_state *s = &state->sanitize;
    PyObject *members = PyList_New(0);
    PyObject *mro = og_descr_get(s->type_mro, (PyObject *)Py_TYPE(object));
    for (Py_ssize_t i = 0; members != NULL && mro != NULL &&
                           PyTuple_Check(mro) && i < PyTuple_Size(mro);
         i++) {
        PyObject *base = PyTuple_GetItem(mro, i);
        if (base == PyExc_Exception || base == PyExc_BaseException ||
            base == PyExc_BaseExceptionGroup ||
            base == (PyObject *)&PyBaseObject_Type) {
            continue;
        }
        PyObject *dict = og_descr_get(s->type_dict, base);
        if (dict != NULL && add_members(members, dict) < 0) {
            Py_CLEAR(members);
        }
        Py_XDECREF(dict);
    }
    Py_XDECREF(mro);
    return members;
}

typedef struct reaching {
    og_state *state;
    og_map seen;
    og_refs queue;
    bool found;
    bool failed;
} reaching;

static int
reach_referent(PyObject *object, void *arg)
{
    reaching *at = arg;
    og_sanitize_state *s = &at->state->sanitize;
    PyTypeObject *type = Py_TYPE(object);
    if (og_is_tensor(at->state, object)) {
        at->found = true;
        return 1;
    }
    /* Classes and modules are everybody's, functions lead to modules. */
    if (!(PyType_GetFlags(type) & Py_TPFLAGS_HAVE_GC) ||
        PyType_Check(object) ||
        PyObject_TypeCheck(object, (PyTypeObject *)s->module_type) ||
        type == (PyTypeObject *)s->frame_type ||
        type == (PyTypeObject *)s->code_type ||
        PyExceptionInstance_Check(object)) {
        return 0;
    }
    if (og_map_find(&at->seen, object) != NULL) {
        return 0;
    }
    at->failed = at->queue.count >= REACH_LIMIT ||
                 og_map_put(&at->seen, object, NULL) < 0 ||
                 og_refs_push(&at->queue, object) < 0;
    return at->failed;
}

static void
reach_function(reaching *at, PyObject *function)
{
    static const char *const parts[] = {"__closure__", "__defaults__",
                                        "__kwdefaults__"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        PyObject *part = PyObject_GetAttrString(function, parts[i]);
        if (part == NULL) {
            og_forget();
        }
        else if (!at->found && !at->failed) {
            (void)reach_referent(part, at);
        }
        Py_XDECREF(part);
    }
}

bool
og_reaches_tensor(og_state *state, PyObject *object)
{
    reaching at = {.state = state};
    (void)reach_referent(object, &at);
    for (size_t i = 0; i < at.queue.count && !at.found && !at.failed; i++) {
        PyObject *next = at.queue.items[i];
        if (Py_TYPE(next) == (PyTypeObject *)state->sanitize.function_type) {
            reach_function(&at, next);
            continue;
        }
        traverseproc traverse =
            (traverseproc)PyType_GetSlot(Py_TYPE(next), Py_tp_traverse);
        if (traverse != NULL) {
            (void)traverse(next, reach_referent, &at);
        }
    }
    og_map_free(&at.seen);
    og_refs_free(&at.queue);
    return at.found;
}
