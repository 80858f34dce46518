/* read and read_all: the errors of samples as Python tuples.
 *
 * `how` says what they become: None for (severity, code, location), else a
 * tuple (class, severity names, code names, name of a location): class is a
 * tuple subclass of those three and their three names, as a NamedTuple is. */
#include "py/flags_road.h"

#include <stdlib.h>

#define SMALL 256 /* slots that need no memory of their own */

typedef struct row_reader {
    og_state *state;
    void *impl;
    og_look look;
    int64_t capacity;
    uint16_t *slots; /* capacity of them, small or owned */
    uint16_t small[SMALL];
    /* borrowed from how; class is NULL without one */
    PyObject *class;
    PyObject *severities;
    PyObject *codes;
    PyObject *location_name;
    allocfunc alloc; /* of class */
} row_reader;

static int
reader_how(row_reader *reader, PyObject *how)
{
    if (how == Py_None) {
        return OG_ROAD_SHORT;
    }
    if (!PyTuple_CheckExact(how) || PyTuple_Size(how) != 4) {
        return OG_ROAD_LONG;
    }
    reader->class = PyTuple_GetItem(how, 0);
    reader->severities = PyTuple_GetItem(how, 1);
    reader->codes = PyTuple_GetItem(how, 2);
    reader->location_name = PyTuple_GetItem(how, 3);
    bool usable =
        PyType_Check(reader->class) &&
        PyType_IsSubtype((PyTypeObject *)reader->class, &PyTuple_Type) &&
        PyTuple_CheckExact(reader->severities) &&
        PyTuple_Size(reader->severities) == 4 &&
        PyTuple_CheckExact(reader->codes) && PyTuple_Size(reader->codes) == 16;
    if (usable) {
        reader->alloc = (allocfunc)PyType_GetSlot(
            (PyTypeObject *)reader->class, Py_tp_alloc);
    }
    return usable ? OG_ROAD_SHORT : OG_ROAD_LONG;
}

static int
reader_open(row_reader *reader, PyObject *flags, PyObject *how)
{
    og_state *state = reader->state;
    OG_FLAGS_STEP(reader_how(reader, how));
    OG_FLAGS_STEP(og_flags_clear_road(state));
    OG_FLAGS_STEP(og_flags_look(state, flags, &reader->impl, &reader->look));
    int64_t slots = og_flags_slots(reader->look.dtype);
    if (reader->look.ndim != 2 || slots == 0 || reader->look.sizes[1] == 0 ||
        reader->look.device_type != state->ops.table->device_type_cpu ||
        reader->look.sizes[1] > INT64_MAX / 16) {
        return OG_ROAD_LONG;
    }
    reader->capacity = reader->look.sizes[1] * slots;
    reader->slots = reader->small;
    if (reader->capacity > SMALL) {
        size_t bytes = (size_t)reader->capacity * sizeof *reader->slots;
        reader->slots = malloc(bytes);
        if (reader->slots == NULL) {
            (void)PyErr_NoMemory();
            return OG_ROAD_FAILED;
        }
    }
    return OG_ROAD_SHORT;
}

static void
reader_close(row_reader *reader)
{
    if (reader->slots != reader->small) {
        free(reader->slots);
    }
}

/* Fills made, a tuple of six, and drops it where something is missing. */
static PyObject *
fill_error(PyObject *made, PyObject *const *values)
{
    for (Py_ssize_t i = 0; made != NULL && i < 6; i++) {
        if (values[i] == NULL ||
            PyTuple_SetItem(made, i, Py_NewRef(values[i])) < 0) {
            Py_CLEAR(made);
        }
    }
    return made;
}

static PyObject *
named_error(row_reader *reader, int severity, int code, int location)
{
    PyObject *numbers[3] = {PyLong_FromLong(severity), PyLong_FromLong(code),
                            PyLong_FromLong(location)};
    PyObject *name = NULL, *made = NULL;
    if (numbers[2] != NULL) {
        name = PyObject_CallFunctionObjArgs(reader->location_name, numbers[2],
                                            NULL);
    }
    PyObject *const values[6] = {numbers[0],
                                 numbers[1],
                                 numbers[2],
                                 PyTuple_GetItem(reader->severities, severity),
                                 PyTuple_GetItem(reader->codes, code),
                                 name};
    if (name != NULL) {
        /* Allocated here, not by its __new__, which would copy a tuple. */
        made = reader->alloc((PyTypeObject *)reader->class, 6);
        made = fill_error(made, values);
    }
    Py_XDECREF(name);
    for (int i = 0; i < 3; i++) {
        Py_XDECREF(numbers[i]);
    }
    return made;
}

static PyObject *
one_error(row_reader *reader, uint16_t slot)
{
    int severity = og_slot_severity(slot), code = og_slot_code(slot);
    int location = og_slot_location(slot);
    return reader->class == NULL
               ? Py_BuildValue("(iii)", severity, code, location)
               : named_error(reader, severity, code, location);
}

/* The errors of one sample, a new list. */
static int
read_row(row_reader *reader, int64_t row, PyObject **result)
{
    int64_t used = 0;
    og_error err;
    if (reader->state->ops.table->flags_read(reader->impl, row, reader->slots,
                                             reader->capacity, &used,
                                             &err) != OG_OK ||
        used > reader->capacity) {
        return OG_ROAD_LONG;
    }
    PyObject *list = PyList_New((Py_ssize_t)used);
    for (int64_t i = 0; list != NULL && i < used; i++) {
        PyObject *error = one_error(reader, reader->slots[i]);
        if (error == NULL || PyList_SetItem(list, (Py_ssize_t)i, error) < 0) {
            Py_CLEAR(list);
        }
    }
    *result = list;
    return list == NULL ? OG_ROAD_FAILED : OG_ROAD_SHORT;
}

static int
read_rows(row_reader *reader, PyObject **result)
{
    int64_t rows = reader->look.sizes[0];
    PyObject *all = PyList_New(0), *errors = NULL;
    int road = all == NULL ? OG_ROAD_FAILED : OG_ROAD_SHORT;
    for (int64_t i = 0; road == OG_ROAD_SHORT && i < rows; i++) {
        road = read_row(reader, i, &errors);
        if (road == OG_ROAD_SHORT) {
            road = PyList_Append(all, errors) < 0 ? OG_ROAD_FAILED : road;
            Py_DECREF(errors);
        }
    }
    if (road != OG_ROAD_SHORT) {
        Py_CLEAR(all);
    }
    *result = all;
    return road;
}

PyDoc_STRVAR(flags_read_doc,
             "flags_read($module, f, row, how=None, /)\n--\n\n"
             "opguard.flags._engine.read by the shortest road.");

static PyObject *
flags_read(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    row_reader reader = {.state = og_state_get(module)};
    PyObject *result = NULL;
    int64_t row = 0;
    int road = OG_ROAD_LONG;
    if ((count == 2 || count == 3) &&
        og_flags_int(args[1], &row) == OG_ROAD_SHORT) {
        road = reader_open(&reader, args[0], count == 3 ? args[2] : Py_None);
        if (road == OG_ROAD_SHORT) {
            int64_t rows = reader.look.sizes[0];
            row += row < 0 ? rows : 0;
            road = row < 0 || row >= rows ? OG_ROAD_LONG
                                          : read_row(&reader, row, &result);
            reader_close(&reader);
        }
    }
    return og_flags_end(road, result, reader.state->flags.read, args, count);
}

PyDoc_STRVAR(flags_read_all_doc,
             "flags_read_all($module, f, how=None, /)\n--\n\n"
             "opguard.flags._engine.read_all by the shortest road.");

static PyObject *
flags_read_all(PyObject *module, PyObject *const *args, Py_ssize_t count)
{
    row_reader reader = {.state = og_state_get(module)};
    PyObject *result = NULL;
    int road = OG_ROAD_LONG;
    if (count == 1 || count == 2) {
        road = reader_open(&reader, args[0], count == 2 ? args[1] : Py_None);
        if (road == OG_ROAD_SHORT) {
            road = read_rows(&reader, &result);
            reader_close(&reader);
        }
    }
    return og_flags_end(road, result, reader.state->flags.read_all, args,
                        count);
}

PyMethodDef og_flags_read_methods[] = {
    {"flags_read", (PyCFunction)(void (*)(void))flags_read, METH_FASTCALL,
     flags_read_doc},
    {"flags_read_all", (PyCFunction)(void (*)(void))flags_read_all,
     METH_FASTCALL, flags_read_all_doc},
    {NULL, NULL, 0, NULL},
};
