/* Where in the value something happened: value["boxes"][2].scores. Written
 * only when an error is told; nothing here runs code of the value's. */
#include "py/detach_walk.h"

#include <stdio.h>
#include <string.h>

#define STEPS 12 /* the innermost ones are told */

/* Appends; a text that does not fit is cut. */
static void
add(char *text, size_t size, const char *format, const char *part)
{
    size_t length = strlen(text);
    (void)snprintf(text + length, size - length, format, part);
}

static void
add_number(char *text, size_t size, Py_ssize_t number)
{
    char digits[32];
    (void)snprintf(digits, sizeof digits, "%zd", number);
    add(text, size, "[%s]", digits);
}

static void
add_name(char *text, size_t size, const char *format, PyObject *name)
{
    Py_ssize_t length = 0;
    const char *utf8 =
        PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &length) : NULL;
    if (utf8 == NULL) {
        PyErr_Clear(); /* a lone surrogate: no UTF-8 for it */
        utf8 = "?";
    }
    char cut[48];
    (void)snprintf(cut, sizeof cut, "%.40s", utf8);
    add(text, size, format, cut);
}

static void
add_key(char *text, size_t size, og_node *node, Py_ssize_t slot)
{
    PyObject *key = node->items[slot - slot % 2];
    int overflow = 0;
    if (slot % 2 == 0) {
        add(text, size, "%s", "<key ");
        (void)snprintf(text + strlen(text), size - strlen(text), "%zd>",
                       slot / 2);
    }
    else if (PyUnicode_CheckExact(key)) {
        add_name(text, size, "[\"%s\"]", key);
    }
    else if (PyLong_CheckExact(key)) {
        long long number = PyLong_AsLongLongAndOverflow(key, &overflow);
        add_number(text, size, (Py_ssize_t)number);
    }
    else {
        add(text, size, "%s", "[<value ");
        (void)snprintf(text + strlen(text), size - strlen(text), "%zd>]",
                       slot / 2);
    }
}

static void
add_attribute(char *text, size_t size, og_node *node, Py_ssize_t index)
{
    PyObject *one =
        PyList_Check(node->extra) ? PyList_GetItem(node->extra, index) : NULL;
    if (one == NULL) {
        PyErr_Clear(); /* a path with a gap is better than none */
        add(text, size, "%s", ".?");
    }
    else if (PyUnicode_Check(one)) {
        add_name(text, size, ".%s", one);
    }
    else {
        PyObject *name = PyObject_GetAttrString(one, "__name__");
        if (name == NULL) {
            PyErr_Clear(); /* likewise */
            add(text, size, "%s", ".?");
        }
        else {
            add_name(text, size, ".%s", name);
            Py_DECREF(name);
        }
    }
}

static void
add_step(char *text, size_t size, og_node *node, Py_ssize_t slot)
{
    if (node->base == OG_BASE_USER || node->base == OG_BASE_ROOT || slot < 0 ||
        slot >= node->count) {
        return;
    }
    if (slot >= node->content && node->extra != NULL) {
        add_attribute(text, size, node, slot - node->content);
        return;
    }
    switch (node->base) {
        case OG_BASE_DICT:
        case OG_BASE_DEFAULTDICT:
        case OG_BASE_ORDERED:
        case OG_BASE_PROXY:
            add_key(text, size, node, slot);
            return;
        case OG_BASE_SET:
        case OG_BASE_FROZENSET:
            add(text, size, "%s", "{...}");
            return;
        default:
            add_number(text, size, slot);
            return;
    }
}

static void
path(og_node *node, Py_ssize_t slot, char *text, size_t size)
{
    struct {
        og_node *node;
        Py_ssize_t slot;
    } steps[STEPS];
    int count = 0;
    while (node != NULL && count < STEPS) {
        steps[count].node = node;
        steps[count++].slot = slot;
        slot = node->slot;
        node = node->parent;
    }
    (void)snprintf(text, size, node == NULL ? "value" : "value...");
    while (count-- > 0) {
        add_step(text, size, steps[count].node, steps[count].slot);
    }
}

/* Takes the exception out, normalized; NULL without memory, which is set. */
static PyObject *
take(void)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback != NULL && value != NULL) {
        (void)PyException_SetTraceback(value, traceback);
    }
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
}

static void
give(PyObject *exception)
{
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(exception)), exception,
                  PyException_GetTraceback(exception));
}

void
og_blame_note(og_node *node, Py_ssize_t slot)
{
    char where[512];
    if (!PyErr_ExceptionMatches(PyExc_Exception)) {
        return;
    }
    PyObject *exception = take();
    if (exception == NULL) {
        return;
    }
    /* Nested walks would tell the same place again, from the inside out. */
    PyObject *notes = PyObject_GetAttrString(exception, "__notes__");
    if (notes == NULL) {
        PyErr_Clear();
        path(node, slot, where, sizeof where);
        PyObject *done = PyObject_CallMethod(
            exception, "add_note", "N",
            PyUnicode_FromFormat("while detaching %s", where));
        if (done == NULL) {
            PyErr_Clear(); /* the note is a courtesy, the error is not */
        }
        Py_XDECREF(done);
    }
    Py_XDECREF(notes);
    give(exception);
}

void
og_blame_container(og_node *node, Py_ssize_t slot, PyObject *child)
{
    char where[512];
    if (PyErr_ExceptionMatches(PyExc_MemoryError) ||
        !PyErr_ExceptionMatches(PyExc_Exception)) {
        return;
    }
    PyObject *cause = take();
    if (cause == NULL) {
        return;
    }
    PyObject *name = PyType_GetName(Py_TYPE(child));
    PyObject *raised = PyType_GetName(Py_TYPE(cause));
    if (name == NULL || raised == NULL) {
        Py_XDECREF(name);
        Py_XDECREF(raised);
        Py_DECREF(cause);
        return;
    }
    path(node, slot, where, sizeof where);
    PyErr_Format(PyExc_TypeError,
                 "expected a container that can be taken apart and built "
                 "again at %s, the %.150U there raised %.150U; tell how by "
                 "register_detach(%.150U, fn)",
                 where, name, raised, name);
    Py_DECREF(name);
    Py_DECREF(raised);
    PyObject *exception = take();
    if (exception == NULL || !PyExceptionInstance_Check(exception)) {
        Py_XDECREF(exception);
        Py_DECREF(cause);
        return;
    }
    PyException_SetCause(exception, Py_NewRef(cause));
    PyException_SetContext(exception, cause);
    give(exception);
}

void
og_refuse(og_node *node, Py_ssize_t slot, PyObject *child, const char *format)
{
    char where[512];
    path(node, slot, where, sizeof where);
    PyObject *name = PyType_GetName(Py_TYPE(child));
    if (name != NULL) {
        PyErr_Format(PyExc_TypeError, format, where, name);
        Py_DECREF(name);
    }
}
