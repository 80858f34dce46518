/* The source line that asks for a lease, for whoever waits to be told: code
 * and a place in it alone, for a frame that is kept keeps what its variables
 * name. Which line that is takes as long as the function, and is looked up
 * when somebody asks. */
#include "py/pool_lease.h"

#include <limits.h>
#include <string.h>

/* Whether it is code of this package's pools, which takes leases for others.
 */
static bool
is_ours(PyObject *code)
{
    PyObject *file = PyObject_GetAttrString(code, "co_filename");
    const char *name =
        file == NULL ? NULL : PyUnicode_AsUTF8AndSize(file, NULL);
    bool ours = name != NULL && strstr(name, "/opguard/pools/") != NULL;
    if (name == NULL) {
        PyErr_Clear(); /* then it is told as it is */
    }
    Py_XDECREF(file);
    return ours;
}

/* The frame that called frame, or NULL. Steals frame. */
static PyFrameObject *
frame_before(PyFrameObject *frame)
{
    PyObject *back = PyObject_GetAttrString((PyObject *)frame, "f_back");
    if (back == NULL) {
        PyErr_Clear(); /* a place that is not known is no reason to fail */
    }
    Py_DECREF((PyObject *)frame);
    if (back == Py_None) {
        Py_CLEAR(back);
    }
    return (PyFrameObject *)back;
}

/* Where frame is in its code, -1 where that is not known. */
static int
place_of(PyFrameObject *frame, PyObject *name)
{
    PyObject *value = PyObject_GetAttr((PyObject *)frame, name);
    long place = value == NULL ? -1 : PyLong_AsLong(value);
    if (place < 0) {
        PyErr_Clear();
    }
    Py_XDECREF(value);
    return place < 0 || place > INT_MAX ? -1 : (int)place;
}

PyObject *
og_pool_caller(og_pool_lease_state *lease, int *place)
{
    PyFrameObject *frame = PyThreadState_GetFrame(PyThreadState_Get());
    *place = -1;
    while (frame != NULL) {
        PyObject *code = (PyObject *)PyFrame_GetCode(frame);
        if (code == lease->last_code || !is_ours(code)) {
            *place = place_of(frame, lease->place_name);
            Py_DECREF((PyObject *)frame);
            if (code != lease->last_code) {
                PyObject *last = lease->last_code;
                lease->last_code = Py_NewRef(code);
                Py_XDECREF(last);
            }
            return code;
        }
        Py_DECREF(code);
        frame = frame_before(frame);
    }
    return NULL;
}

/* The line of a row of co_lines, if that is the place's; else 0, or -1. */
static int
line_in_row(PyObject *row, int place)
{
    int start, end;
    PyObject *line;
    if (!PyArg_ParseTuple(row, "iiO", &start, &end, &line)) {
        return -1;
    }
    if (place < start || place >= end || line == Py_None) {
        return 0;
    }
    long value = PyLong_AsLong(line);
    return value > INT_MAX ? 0 : (int)value;
}

int
og_pool_line(PyObject *code, int place)
{
    PyObject *rows = PyObject_CallMethod(code, "co_lines", NULL);
    PyObject *each = rows == NULL ? NULL : PyObject_GetIter(rows);
    PyObject *row = NULL;
    int line = 0;
    Py_XDECREF(rows);
    while (each != NULL && line == 0 && (row = PyIter_Next(each)) != NULL) {
        if (PyErr_Occurred() != NULL) {
            break; /* without memory 3.11 gives a row that it has released */
        }
        line = line_in_row(row, place);
        Py_DECREF(row);
    }
    Py_XDECREF(each);
    return PyErr_Occurred() != NULL ? -1 : line;
}
