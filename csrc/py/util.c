/* Raising and interning. */
#include "py/util.h"

PyObject *
og_raise(const og_error *err)
{
    switch (err->status) {
        case OG_NO_MEMORY:
            return PyErr_NoMemory();
        case OG_BAD_ARGUMENT:
            PyErr_SetString(PyExc_ValueError, err->message);
            return NULL;
        default:
            PyErr_SetString(PyExc_RuntimeError, err->message);
            return NULL;
    }
}

int
og_intern(PyObject **slot, const char *name)
{
    *slot = PyUnicode_InternFromString(name);
    return *slot == NULL ? -1 : 0;
}
