/* Taking containers apart: a snapshot of the children, made before any code
 * of theirs runs. The base classes' own functions read the content, so what a
 * subclass says of its length or its iteration does not matter. */
#include "py/detach_walk.h"

static int
push_new(og_node *node, PyObject *borrowed)
{
    return borrowed == NULL ? -1 : og_node_push(node, Py_NewRef(borrowed));
}

static int
reserve(og_node *node, Py_ssize_t count)
{
    if (count <= node->room) {
        return 0;
    }
    if (count <= PY_SSIZE_T_MAX / (Py_ssize_t)sizeof *node->items) {
        PyObject **items =
            PyMem_Realloc(node->items, (size_t)count * sizeof *node->items);
        if (items != NULL) {
            node->items = items;
            node->room = count;
            return 0;
        }
    }
    PyErr_NoMemory();
    return -1;
}

static int
expand_list(og_node *node)
{
    Py_ssize_t count = PyList_Size(node->source);
    if (count < 0 || reserve(node, count) < 0) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        node->items[i] = Py_NewRef(PyList_GetItem(node->source, i));
        node->count = i + 1;
    }
    return 0;
}

static int
expand_tuple(og_node *node)
{
    Py_ssize_t count = PyTuple_Size(node->source);
    if (count < 0 || reserve(node, count) < 0) {
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        node->items[i] = Py_NewRef(PyTuple_GetItem(node->source, i));
        node->count = i + 1;
    }
    return 0;
}

static int
expand_dict(og_node *node)
{
    Py_ssize_t count = PyDict_Size(node->source), place = 0;
    PyObject *key, *value;
    if (count < 0 || reserve(node, 2 * count) < 0) {
        return -1;
    }
    while (PyDict_Next(node->source, &place, &key, &value)) {
        if (push_new(node, key) < 0 || push_new(node, value) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Pairs, as items() gives them; takes the reference to the iterable. */
static int
expand_pairs(og_node *node, PyObject *pairs)
{
    PyObject *iterator = pairs == NULL ? NULL : PyObject_GetIter(pairs);
    PyObject *pair;
    int result = iterator == NULL ? -1 : 0;
    Py_XDECREF(pairs);
    while (result == 0 && (pair = PyIter_Next(iterator)) != NULL) {
        if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
            PyErr_SetString(PyExc_TypeError, "items() gave no pair");
            result = -1;
        }
        else if (push_new(node, PyTuple_GetItem(pair, 0)) < 0 ||
                 push_new(node, PyTuple_GetItem(pair, 1)) < 0) {
            result = -1;
        }
        Py_DECREF(pair);
    }
    Py_XDECREF(iterator);
    return result < 0 || PyErr_Occurred() ? -1 : 0;
}

/* Sets and deques, by the iterator of the base class. */
static int
expand_iterable(og_node *node, PyObject *base)
{
    getiterfunc iter =
        (getiterfunc)PyType_GetSlot((PyTypeObject *)base, Py_tp_iter);
    PyObject *iterator = iter(node->source);
    PyObject *item;
    int result = iterator == NULL ? -1 : 0;
    while (result == 0 && (item = PyIter_Next(iterator)) != NULL) {
        result = og_node_push(node, item);
    }
    Py_XDECREF(iterator);
    return result < 0 || PyErr_Occurred() ? -1 : 0;
}

static int
expand_handler(og_node *node)
{
    PyObject *expand = PyTuple_GetItem(node->shape->handler, 0);
    PyObject *parts = PyObject_CallFunctionObjArgs(expand, node->source, NULL);
    if (parts == NULL || parts == Py_None) {
        int result = parts == NULL ? -1 : 0;
        Py_XDECREF(parts);
        return result;
    }
    PyObject *children = NULL;
    if (!PyTuple_Check(parts) || PyTuple_Size(parts) != 2) {
        PyErr_SetString(PyExc_TypeError,
                        "expand must return (children, context)");
    }
    else {
        children = PySequence_Tuple(PyTuple_GetItem(parts, 0));
        node->extra = Py_NewRef(PyTuple_GetItem(parts, 1));
    }
    Py_DECREF(parts);
    Py_ssize_t count = children == NULL ? 0 : PyTuple_Size(children);
    int result = children == NULL ? -1 : 1;
    for (Py_ssize_t i = 0; result > 0 && i < count; i++) {
        if (push_new(node, PyTuple_GetItem(children, i)) < 0) {
            result = -1;
        }
    }
    Py_XDECREF(children);
    return result;
}

static int
expand_content(og_walk *walk, og_node *node)
{
    og_detach_state *detach = &walk->state->detach;
    switch (node->base) {
        case OG_BASE_LIST:
            return expand_list(node);
        case OG_BASE_TUPLE:
        case OG_BASE_STRUCTSEQ:
            return expand_tuple(node);
        case OG_BASE_DICT:
        case OG_BASE_DEFAULTDICT:
            return expand_dict(node);
        case OG_BASE_ORDERED:
            return expand_pairs(
                node, PyObject_CallFunctionObjArgs(detach->ordered_items,
                                                   node->source, NULL));
        case OG_BASE_PROXY:
            return expand_pairs(node, PyMapping_Items(node->source));
        case OG_BASE_SET:
        case OG_BASE_FROZENSET:
        case OG_BASE_DEQUE:
            return expand_iterable(node, detach->bases[node->base]);
        default:
            return 0;
    }
}

/* For a tensor the result is there and may have some of the attributes. */
static int
is_there(og_node *node, PyObject *name)
{
    if (node->early == NULL) {
        return 0;
    }
    PyObject *dict = PyObject_GenericGetDict(node->early, NULL);
    int found = dict == NULL ? -1 : PyDict_Contains(dict, name);
    Py_XDECREF(dict);
    return found;
}

static int
expand_dict_attributes(og_node *node)
{
    PyObject *dict = PyObject_GenericGetDict(node->source, NULL);
    PyObject *name, *value;
    Py_ssize_t place = 0;
    int result = dict == NULL ? -1 : 0;
    if (dict != NULL && !PyDict_Check(dict)) {
        PyErr_SetString(PyExc_TypeError, "__dict__ is no dict");
        result = -1;
    }
    while (result == 0 && PyDict_Next(dict, &place, &name, &value)) {
        /* A name that is no exact str could run code when it is compared. */
        Py_INCREF(name);
        Py_INCREF(value);
        int there = PyUnicode_CheckExact(name) ? is_there(node, name) : 0;
        if (there < 0 ||
            (there == 0 && (PyList_Append(node->extra, name) < 0 ||
                            push_new(node, value) < 0))) {
            result = -1;
        }
        Py_DECREF(name);
        Py_DECREF(value);
    }
    Py_XDECREF(dict);
    return result;
}

static int
expand_slots(og_node *node)
{
    PyObject *slots = node->shape->slots;
    descrgetfunc get =
        (descrgetfunc)PyType_GetSlot(&PyMemberDescr_Type, Py_tp_descr_get);
    for (Py_ssize_t i = 0; i < PyTuple_Size(slots); i++) {
        PyObject *slot = PyTuple_GetItem(slots, i);
        PyObject *value =
            get(slot, node->source, (PyObject *)Py_TYPE(node->source));
        if (value == NULL) {
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
                return -1;
            }
            PyErr_Clear(); /* never set, so it stays unset */
            continue;
        }
        if (PyList_Append(node->extra, slot) < 0) {
            Py_DECREF(value);
            return -1;
        }
        if (og_node_push(node, value) < 0) {
            return -1;
        }
    }
    return 0;
}

int
og_node_expand(og_walk *walk, og_node *node)
{
    if (node->base == OG_BASE_HANDLER) {
        int result = expand_handler(node);
        node->content = node->count;
        return result;
    }
    if (expand_content(walk, node) < 0) {
        return -1;
    }
    node->content = node->count;
    if (!node->shape->has_dict && node->shape->slots == NULL) {
        return 1;
    }
    node->extra = PyList_New(0);
    if (node->extra == NULL ||
        (node->shape->has_dict && expand_dict_attributes(node) < 0) ||
        (node->shape->slots != NULL && expand_slots(node) < 0)) {
        return -1;
    }
    return 1;
}
