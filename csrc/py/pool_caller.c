/* The source line that asks for a lease, for whoever waits to be told: code
 * and line alone, for a frame that is kept keeps what its variables name. */
#include "py/pool_lease.h"

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

PyObject *
og_pool_caller(og_pool_lease_state *lease, int *line)
{
    PyFrameObject *frame = PyThreadState_GetFrame(PyThreadState_Get());
    *line = 0;
    while (frame != NULL) {
        PyObject *code = (PyObject *)PyFrame_GetCode(frame);
        if (code == lease->last_code || !is_ours(code)) {
            *line = PyFrame_GetLineNumber(frame);
            Py_DECREF((PyObject *)frame);
            PyObject *last = lease->last_code;
            lease->last_code = Py_NewRef(code);
            Py_XDECREF(last);
            return code;
        }
        Py_DECREF(code);
        frame = frame_before(frame);
    }
    return NULL;
}
