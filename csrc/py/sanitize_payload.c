/* What an exception carries: args, attributes, slots and C members such as
 * AttributeError.obj, read and set past any property of a subclass. */
#include "py/sanitize_copy.h"

static bool
is_kept(og_walk *walk, PyObject *exc)
{
    for (Py_ssize_t i = 0; walk->keep != NULL && i < PyTuple_Size(walk->keep);
         i++) {
        PyObject *type = PyTuple_GetItem(walk->keep, i);
        if (PyType_Check(type) &&
            PyObject_TypeCheck(exc, (PyTypeObject *)type)) {
            return true;
        }
    }
    return false;
}

/* May the value hold something? Most payloads are text and numbers. */
static bool
is_plain(PyObject *value)
{
    PyTypeObject *type = Py_TYPE(value);
    return type == &PyUnicode_Type || type == &PyLong_Type ||
           type == &PyBool_Type || type == &PyFloat_Type ||
           type == &PyBytes_Type || value == Py_None;
}

static bool
all_plain(PyObject *args, PyObject *dict)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    if (!PyTuple_CheckExact(args)) {
        return false;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(args); i++) {
        if (!is_plain(PyTuple_GetItem(args, i))) {
            return false;
        }
    }
    while (dict != NULL && PyDict_Next(dict, &at, &key, &value)) {
        if (!is_plain(value)) {
            return false;
        }
    }
    return true;
}

/* The whole payload as one list, so that what is shared stays shared. */
static PyObject *
payload_list(PyObject *exc, PyObject *args, PyObject *dict, PyObject *members)
{
    PyObject *list = PyList_New(0);
    if (list == NULL || PyList_Append(list, args) < 0 ||
        PyList_Append(list, dict == NULL ? Py_None : dict) < 0) {
        Py_XDECREF(list);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < PyList_Size(members); i++) {
        PyObject *value = og_descr_get(PyList_GetItem(members, i), exc);
        int failed = PyList_Append(list, value == NULL ? Py_None : value);
        Py_XDECREF(value);
        if (failed) {
            Py_DECREF(list);
            return NULL;
        }
    }
    return list;
}

static void
put_dict(PyObject *dict, PyObject *copy)
{
    PyObject *key, *value;
    Py_ssize_t at = 0;
    /* copy is nobody else's; dict keeps its identity. */
    while (PyDict_Next(copy, &at, &key, &value)) {
        PyObject *old = PyDict_GetItemWithError(dict, key);
        if (old != value && !PyErr_Occurred()) {
            (void)PyDict_SetItem(dict, key, value);
        }
        og_forget();
    }
}

static void
put_back(og_state *state, PyObject *exc, PyObject *old, PyObject *new,
         PyObject *members)
{
    PyObject *args = PyList_GetItem(new, 0);
    if (args != PyList_GetItem(old, 0)) {
        og_descr_set(state->sanitize.args, exc, args);
    }
    PyObject *dict = PyList_GetItem(old, 1);
    if (dict != Py_None && dict != PyList_GetItem(new, 1)) {
        put_dict(dict, PyList_GetItem(new, 1));
    }
    for (Py_ssize_t i = 2; i < PyList_Size(new); i++) {
        PyObject *value = PyList_GetItem(new, i);
        if (value != PyList_GetItem(old, i)) {
            og_descr_set(PyList_GetItem(members, i - 2), exc, value);
        }
    }
}

int
og_walk_payload(og_walk *walk, PyObject *exc)
{
    og_state *state = walk->state;
    PyObject *args = NULL, *dict = NULL, *members = NULL;
    PyObject *old = NULL, *new = NULL;
    if (is_kept(walk, exc)) {
        return 0;
    }
    args = og_descr_get(state->sanitize.args, exc);
    dict = PyObject_GenericGetDict(exc, NULL);
    og_forget();
    members = og_members_of(state, exc);
    if (args == NULL || members == NULL ||
        (PyList_Size(members) == 0 && all_plain(args, dict))) {
        goto done;
    }
    old = payload_list(exc, args, dict, members);
    new = old == NULL ? NULL : og_copy_value(walk, old);
    /* A copy made without memory to spare may lack an item. */
    if (new != NULL && new != old && PyList_Size(new) == PyList_Size(old)) {
        put_back(state, exc, old, new, members);
    }
done:
    og_forget();
    Py_XDECREF(args);
    Py_XDECREF(dict);
    Py_XDECREF(members);
    Py_XDECREF(old);
    Py_XDECREF(new);
    return 0;
}
