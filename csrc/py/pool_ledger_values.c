/* Between Python's values and the ledger's: ints, tuples, records. */
#include "py/pool_ledger_object.h"

PyObject *
og_ledger_raise(const og_error *error)
{
    if (error->status == OG_NO_MEMORY) {
        return PyErr_NoMemory();
    }
    PyErr_SetString(PyExc_ValueError, error->message);
    return NULL;
}

PyObject *
og_ledger_bool(int result, const og_error *error)
{
    return result < 0 ? og_ledger_raise(error) : PyBool_FromLong(result);
}

int
og_ledger_arguments(const char *name, Py_ssize_t count, Py_ssize_t least,
                    Py_ssize_t most)
{
    if (count >= least && count <= most) {
        return 0;
    }
    PyErr_Format(PyExc_TypeError,
                 "expected %zd to %zd arguments of Ledger.%s, got %zd", least,
                 most, name, count);
    return -1;
}

int
og_ledger_int(PyObject *value, const char *what, int64_t *result)
{
    if (!PyLong_Check(value)) {
        PyErr_Format(PyExc_TypeError, "expected %s to be an int, got %.150R",
                     what, Py_TYPE(value));
        return -1;
    }
    int overflow = 0;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError,
                     "expected %s to be an int of 64 bits, got a larger one",
                     what);
        return -1;
    }
    if (number == -1 && PyErr_Occurred() != NULL) {
        return -1;
    }
    *result = number;
    return 0;
}

int
og_ledger_double(PyObject *value, const char *what, double *result)
{
    if (!PyFloat_Check(value)) {
        int64_t number;
        int failed = og_ledger_int(value, what, &number);
        *result = failed == 0 ? (double)number : 0.0;
        return failed;
    }
    *result = PyFloat_AsDouble(value);
    return 0;
}

static int
check_tuple(PyObject *value, const char *what)
{
    if (PyTuple_Check(value)) {
        return 0;
    }
    PyErr_Format(PyExc_TypeError, "expected %s to be a tuple, got %.150R",
                 what, Py_TYPE(value));
    return -1;
}

int
og_ledger_numbers(PyObject *value, const char *what, og_numbers *result)
{
    result->at = result->small;
    result->count = 0;
    if (check_tuple(value, what) < 0) {
        return -1;
    }
    size_t count = (size_t)PyTuple_Size(value);
    if (count > LEDGER_SMALL) {
        int64_t *block = PyMem_Malloc(count * sizeof *block);
        if (block == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        result->at = block;
    }
    for (size_t i = 0; i < count; i++) {
        PyObject *item = PyTuple_GetItem(value, (Py_ssize_t)i);
        if (og_ledger_int(item, what, &result->at[i]) < 0) {
            return -1;
        }
    }
    result->count = count;
    return 0;
}

static int
read_extra(PyObject *pair, og_pool_extra *result)
{
    if (check_tuple(pair, "extra's item") < 0) {
        return -1;
    }
    if (PyTuple_Size(pair) != 2) {
        PyErr_Format(PyExc_ValueError,
                     "expected extra's item to be (pool, bytes), got %zd "
                     "values",
                     PyTuple_Size(pair));
        return -1;
    }
    if (og_ledger_int(PyTuple_GetItem(pair, 0), "extra's pool",
                      &result->pool) < 0) {
        return -1;
    }
    return og_ledger_int(PyTuple_GetItem(pair, 1), "extra's bytes",
                         &result->bytes);
}

int
og_ledger_extras(PyObject *value, og_extras *result)
{
    result->at = result->small;
    result->count = 0;
    if (value == NULL) {
        return 0;
    }
    if (check_tuple(value, "extra") < 0) {
        return -1;
    }
    size_t count = (size_t)PyTuple_Size(value);
    if (count > LEDGER_SMALL / 2) {
        og_pool_extra *block = PyMem_Malloc(count * sizeof *block);
        if (block == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        result->at = block;
    }
    for (size_t i = 0; i < count; i++) {
        PyObject *pair = PyTuple_GetItem(value, (Py_ssize_t)i);
        if (read_extra(pair, &result->at[i]) < 0) {
            return -1;
        }
    }
    result->count = count;
    return 0;
}

void
og_numbers_release(og_numbers *numbers)
{
    if (numbers->at != numbers->small) {
        PyMem_Free(numbers->at);
    }
}

void
og_extras_release(og_extras *extras)
{
    if (extras->at != extras->small) {
        PyMem_Free(extras->at);
    }
}

/* Steals item, which may be NULL with an exception set; -1 then, and the
 * tuple is gone. */
static int
put(PyObject *tuple, size_t at, PyObject *item)
{
    if (item == NULL || PyTuple_SetItem(tuple, (Py_ssize_t)at, item) < 0) {
        Py_DECREF(tuple);
        return -1;
    }
    return 0;
}

PyObject *
og_ledger_tuple(const int64_t *numbers, size_t count)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; tuple != NULL && i < count; i++) {
        if (put(tuple, i, PyLong_FromLongLong(numbers[i])) < 0) {
            return NULL;
        }
    }
    return tuple;
}

PyObject *
og_ledger_holder_tuple(const og_pool_holder *holders, size_t count, bool pairs)
{
    PyObject *tuple = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; tuple != NULL && i < count; i++) {
        const og_pool_holder *one = &holders[i];
        int64_t three[] = {one->owner, one->unit, one->count};
        int64_t two[] = {one->owner, one->count};
        PyObject *item =
            pairs ? og_ledger_tuple(two, 2) : og_ledger_tuple(three, 3);
        if (put(tuple, i, item) < 0) {
            return NULL;
        }
    }
    return tuple;
}

PyObject *
og_ledger_record(PyTypeObject *type, PyObject **values, Py_ssize_t count)
{
    PyObject *made = NULL;
    bool whole = true;
    for (Py_ssize_t i = 0; i < count; i++) {
        whole = whole && values[i] != NULL;
    }
    if (whole) {
        made = PyStructSequence_New(type);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (made != NULL) {
            PyStructSequence_SetItem(made, i, values[i]);
        }
        else {
            Py_XDECREF(values[i]);
        }
    }
    return made;
}
