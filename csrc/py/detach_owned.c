/* What the guarded modules own: the storages of their parameters and buffers,
 * gathered when the first tensor has to be held against them. */
#include "py/detach_walk.h"

#include <stdlib.h>

static int
compare(const void *left, const void *right)
{
    uintptr_t a = *(const uintptr_t *)left, b = *(const uintptr_t *)right;
    return a < b ? -1 : a > b;
}

/* The start of a tensor's storage; 0 when it has none. -1 on error. */
static int
storage_of(og_walk *walk, PyObject *tensor, uintptr_t *address)
{
    void *impl = og_leaf_impl(&walk->state->detach, tensor), *data = NULL;
    *address = 0;
    if (impl == NULL) {
        return PyErr_Occurred() ? -1 : 0;
    }
    if (walk->state->ops.table->tensor_storage(impl, &data) == OG_OK) {
        *address = (uintptr_t)data;
    }
    return 0;
}

static int
own_tensor(og_walk *walk, PyObject *tensor, Py_ssize_t *room)
{
    uintptr_t address = 0;
    if (!PyObject_TypeCheck(tensor,
                            (PyTypeObject *)walk->state->ops.tensor_type)) {
        return 0;
    }
    if (storage_of(walk, tensor, &address) < 0) {
        return -1;
    }
    if (walk->owned_count == *room) {
        Py_ssize_t more = *room == 0 ? 64 : *room * 2;
        uintptr_t *grown =
            PyMem_Realloc(walk->owned, (size_t)more * sizeof *grown);
        if (grown == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        walk->owned = grown;
        *room = more;
    }
    if (address != 0) {
        walk->owned[walk->owned_count++] = address;
    }
    return 0;
}

static int
queue_module(PyObject *module, PyObject *queue, PyObject *seen)
{
    PyObject *id = module == Py_None ? NULL : PyLong_FromVoidPtr(module);
    if (id == NULL) {
        return PyErr_Occurred() ? -1 : 0;
    }
    int known = PySet_Contains(seen, id);
    int result =
        known < 0 || (known == 0 && (PySet_Add(seen, id) < 0 ||
                                     PyList_Append(queue, module) < 0))
            ? -1
            : 0;
    Py_DECREF(id);
    return result;
}

/* A new list of the values of a dict among a module's attributes, because a
 * tensor subclass may run Python when asked; empty when there is none. */
static PyObject *
members_of(PyObject *names, const char *name)
{
    PyObject *dict = PyDict_GetItemString(names, name);
    return dict != NULL && PyDict_Check(dict) ? PyDict_Values(dict)
                                              : PyList_New(0);
}

/* Queues the submodules of module and notes its parameters and buffers. */
static int
own_module(og_walk *walk, PyObject *module, PyObject *queue, PyObject *seen,
           Py_ssize_t *room)
{
    static const char *const members[] = {"_parameters", "_buffers",
                                          "_modules"};
    PyObject *names = PyObject_GenericGetDict(module, NULL);
    int result = 0;
    if (names == NULL && !PyErr_ExceptionMatches(PyExc_AttributeError)) {
        return -1;
    }
    if (names == NULL || !PyDict_Check(names)) {
        Py_XDECREF(names);
        PyErr_Format(PyExc_TypeError,
                     "expected models to be modules, got %.150R",
                     (PyObject *)Py_TYPE(module));
        return -1;
    }
    for (int i = 0; result == 0 && i < 3; i++) {
        PyObject *list = members_of(names, members[i]);
        result = list == NULL ? -1 : 0;
        for (Py_ssize_t j = 0; result == 0 && j < PyList_Size(list); j++) {
            PyObject *one = PyList_GetItem(list, j);
            result = i < 2 ? own_tensor(walk, one, room)
                           : queue_module(one, queue, seen);
        }
        Py_XDECREF(list);
    }
    Py_DECREF(names);
    return result;
}

static int
own_all(og_walk *walk)
{
    PyObject *queue = PySequence_List(walk->models);
    PyObject *seen = queue == NULL ? NULL : PySet_New(NULL);
    Py_ssize_t room = 0;
    int result = seen == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; result == 0 && i < PyList_Size(queue); i++) {
        result =
            own_module(walk, PyList_GetItem(queue, i), queue, seen, &room);
    }
    Py_XDECREF(queue);
    Py_XDECREF(seen);
    if (result == 0 && walk->owned_count > 0) {
        qsort(walk->owned, (size_t)walk->owned_count, sizeof *walk->owned,
              compare);
    }
    walk->owned_ready = result == 0;
    return result;
}

int
og_walk_owns(og_walk *walk, PyObject *tensor)
{
    uintptr_t address = 0;
    if (walk->models == NULL || !walk->state->detach.fast ||
        PyTuple_Size(walk->models) == 0) {
        return 0;
    }
    if ((!walk->owned_ready && own_all(walk) < 0) ||
        storage_of(walk, tensor, &address) < 0) {
        return -1;
    }
    return address != 0 && walk->owned_count > 0 &&
           bsearch(&address, walk->owned, (size_t)walk->owned_count,
                   sizeof address, compare) != NULL;
}
