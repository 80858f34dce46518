/* Building containers again from their detached children, without running
 * their constructors: a subclass may want arguments nobody knows. The base's
 * own __new__ makes it, the base's own functions fill it, then attributes and
 * slots are set below __setattr__, which a frozen class has forbidden. */
#include "py/detach_walk.h"

static PyObject *
fresh(og_walk *walk, og_node *node)
{
    return PyObject_CallFunctionObjArgs(walk->state->detach.news[node->base],
                                        (PyObject *)Py_TYPE(node->source),
                                        NULL);
}

/* What a base's descriptor says of source: maxlen, default_factory. */
static PyObject *
get_member(PyObject *descriptor, PyObject *source)
{
    descrgetfunc get =
        (descrgetfunc)PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get);
    return get(descriptor, source, (PyObject *)Py_TYPE(source));
}

static int
set_member(PyObject *descriptor, PyObject *target, PyObject *value)
{
    descrsetfunc set =
        (descrsetfunc)PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_set);
    return set(descriptor, target, value);
}

static PyObject *
early_deque(og_walk *walk, og_node *node)
{
    og_detach_state *detach = &walk->state->detach;
    PyObject *made = fresh(walk, node);
    PyObject *length =
        made == NULL ? NULL : get_member(detach->deque_maxlen, node->source);
    PyObject *none = length == NULL ? NULL : PyTuple_New(0);
    PyObject *done = none == NULL
                         ? NULL
                         : PyObject_CallFunctionObjArgs(
                               detach->deque_init, made, none, length, NULL);
    Py_XDECREF(none);
    Py_XDECREF(length);
    if (done == NULL) {
        Py_XDECREF(made);
        return NULL;
    }
    Py_DECREF(done);
    return made;
}

static PyObject *
early_defaultdict(og_walk *walk, og_node *node)
{
    PyObject *descriptor = walk->state->detach.default_factory;
    PyObject *made = fresh(walk, node);
    PyObject *factory =
        made == NULL ? NULL : get_member(descriptor, node->source);
    if (factory == NULL || set_member(descriptor, made, factory) < 0) {
        Py_CLEAR(made);
    }
    Py_XDECREF(factory);
    return made;
}

static PyObject *
early_handler(og_node *node)
{
    PyObject *early = PyTuple_GetItem(node->shape->handler, 2);
    if (early == Py_None) {
        return NULL;
    }
    return PyObject_CallFunctionObjArgs(early, node->source, node->extra,
                                        NULL);
}

static PyObject *
make_early(og_walk *walk, og_node *node)
{
    bool exact = node->shape->exact;
    switch (node->base) {
        case OG_BASE_LIST:
            return exact ? PyList_New(0) : fresh(walk, node);
        case OG_BASE_DICT:
            return exact ? PyDict_New() : fresh(walk, node);
        case OG_BASE_SET:
            return exact ? PySet_New(NULL) : fresh(walk, node);
        case OG_BASE_OBJECT:
        case OG_BASE_NAMESPACE:
        case OG_BASE_ORDERED:
            return fresh(walk, node);
        case OG_BASE_DEFAULTDICT:
            return early_defaultdict(walk, node);
        case OG_BASE_DEQUE:
            return early_deque(walk, node);
        case OG_BASE_HANDLER:
            return early_handler(node);
        default:
            return NULL;
    }
}

PyObject *
og_node_early(og_walk *walk, og_node *node)
{
    if (node->early == NULL) {
        /* __new__ may run code that comes back here; the first one counts. */
        PyObject *made = make_early(walk, node);
        if (node->early == NULL) {
            node->early = made;
        }
        else {
            Py_XDECREF(made);
        }
    }
    return node->early;
}

static PyObject *
content_tuple(og_node *node)
{
    PyObject *all = PyTuple_New(node->content);
    for (Py_ssize_t i = 0; all != NULL && i < node->content; i++) {
        (void)PyTuple_SetItem(all, i, Py_NewRef(node->items[i]));
    }
    return all;
}

static PyObject *
content_list(og_node *node)
{
    PyObject *all = PyList_New(node->content);
    for (Py_ssize_t i = 0; all != NULL && i < node->content; i++) {
        (void)PyList_SetItem(all, i, Py_NewRef(node->items[i]));
    }
    return all;
}

static int
fill_pairs(og_walk *walk, og_node *node, PyObject *target)
{
    for (Py_ssize_t i = 0; i + 1 < node->content; i += 2) {
        if (node->base != OG_BASE_ORDERED) {
            if (PyDict_SetItem(target, node->items[i], node->items[i + 1]) <
                0) {
                return -1;
            }
            continue;
        }
        PyObject *done = PyObject_CallFunctionObjArgs(
            walk->state->detach.ordered_set, target, node->items[i],
            node->items[i + 1], NULL);
        if (done == NULL) {
            return -1;
        }
        Py_DECREF(done);
    }
    if (PyDict_Size(target) != node->content / 2) {
        PyErr_SetString(PyExc_ValueError, "two keys became equal");
        return -1;
    }
    return 0;
}

/* A plain dict whose keys stayed: a copy with other values needs no growing.
 * NULL without an exception when somebody changed the source meanwhile. */
static PyObject *
copy_dict(og_node *node)
{
    PyObject *made = PyDict_Copy(node->source);
    for (Py_ssize_t i = 0; made != NULL && i < node->content; i += 2) {
        if (PyDict_SetItem(made, node->items[i], node->items[i + 1]) < 0) {
            Py_CLEAR(made);
        }
    }
    if (made != NULL && PyDict_Size(made) != node->content / 2) {
        Py_CLEAR(made);
    }
    return made;
}

static int
fill_set(og_node *node, PyObject *target)
{
    for (Py_ssize_t i = 0; i < node->content; i++) {
        if (PySet_Add(target, node->items[i]) < 0) {
            return -1;
        }
    }
    if (PySet_Size(target) != node->content) {
        PyErr_SetString(PyExc_ValueError, "two elements became equal");
        return -1;
    }
    return 0;
}

static int
fill_deque(og_walk *walk, og_node *node, PyObject *target)
{
    PyObject *all = content_list(node);
    PyObject *done =
        all == NULL ? NULL
                    : PyObject_CallFunctionObjArgs(
                          walk->state->detach.deque_extend, target, all, NULL);
    Py_XDECREF(all);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static int
fill_list(og_node *node, PyObject *target)
{
    PyObject *all = content_list(node);
    int result = all == NULL ? -1 : PyList_SetSlice(target, 0, 0, all);
    Py_XDECREF(all);
    return result;
}

static int
fill_attributes(og_node *node, PyObject *target)
{
    PyObject *dict = NULL;
    int result = 0;
    for (Py_ssize_t i = node->content; result == 0 && i < node->count; i++) {
        PyObject *name = PyList_GetItem(node->extra, i - node->content);
        if (Py_TYPE(name) == &PyMemberDescr_Type) {
            result = set_member(name, target, node->items[i]);
            continue;
        }
        if (dict == NULL) {
            dict = PyObject_GenericGetDict(target, NULL);
            if (dict == NULL) {
                return -1;
            }
        }
        result = PyDict_SetItem(dict, name, node->items[i]);
    }
    Py_XDECREF(dict);
    return result;
}

static int
fill(og_walk *walk, og_node *node, PyObject *target)
{
    int result = 0;
    switch (node->base) {
        case OG_BASE_LIST:
            result = fill_list(node, target);
            break;
        case OG_BASE_DICT:
        case OG_BASE_DEFAULTDICT:
        case OG_BASE_ORDERED:
            result = fill_pairs(walk, node, target);
            break;
        case OG_BASE_SET:
            result = fill_set(node, target);
            break;
        case OG_BASE_DEQUE:
            result = fill_deque(walk, node, target);
            break;
        default:
            break;
    }
    return result < 0 ? -1 : fill_attributes(node, target);
}

/* tuple.__new__, frozenset.__new__: base.__new__(type, content). */
static PyObject *
fresh_with(og_walk *walk, og_node *node)
{
    PyObject *all = content_tuple(node);
    PyObject *made = NULL;
    if (all != NULL && node->base == OG_BASE_FROZENSET && node->shape->exact) {
        made = PyFrozenSet_New(all);
    }
    else if (all != NULL) {
        made = PyObject_CallFunctionObjArgs(
            walk->state->detach.news[node->base],
            (PyObject *)Py_TYPE(node->source), all, NULL);
    }
    Py_XDECREF(all);
    if (made != NULL && node->base == OG_BASE_FROZENSET &&
        PySet_Size(made) != node->content) {
        PyErr_SetString(PyExc_ValueError, "two elements became equal");
        Py_CLEAR(made);
    }
    return made;
}

/* torch.return_types and their like are called with all their fields; the
 * ones that have no place in the sequence come from __reduce__. */
static PyObject *
build_structseq(og_node *node)
{
    PyObject *type = (PyObject *)Py_TYPE(node->source);
    PyObject *all = content_tuple(node);
    PyObject *parts =
        all == NULL ? NULL
                    : PyObject_CallMethod(node->source, "__reduce__", NULL);
    PyObject *arguments = parts == NULL ? NULL : PySequence_GetItem(parts, 1);
    PyObject *hidden =
        arguments == NULL ? NULL : PySequence_GetItem(arguments, 1);
    PyObject *made =
        hidden == NULL ? NULL
                       : PyObject_CallFunctionObjArgs(type, all, hidden, NULL);
    Py_XDECREF(hidden);
    Py_XDECREF(arguments);
    Py_XDECREF(parts);
    Py_XDECREF(all);
    return made;
}

static PyObject *
build_proxy(og_walk *walk, og_node *node)
{
    PyObject *dict = PyDict_New();
    PyObject *made = NULL;
    if (dict != NULL && fill_pairs(walk, node, dict) == 0) {
        made = PyDictProxy_New(dict);
    }
    Py_XDECREF(dict);
    return made;
}

static PyObject *
build_handler(og_node *node)
{
    PyObject *build = PyTuple_GetItem(node->shape->handler, 1);
    PyObject *all = content_list(node);
    PyObject *made =
        all == NULL ? NULL
                    : PyObject_CallFunctionObjArgs(
                          build, node->source, node->extra, all,
                          node->early == NULL ? Py_None : node->early, NULL);
    Py_XDECREF(all);
    return made;
}

static PyObject *
build_late(og_walk *walk, og_node *node)
{
    switch (node->base) {
        case OG_BASE_TUPLE:
            return node->shape->exact ? content_tuple(node)
                                      : fresh_with(walk, node);
        case OG_BASE_FROZENSET:
            return fresh_with(walk, node);
        case OG_BASE_STRUCTSEQ:
            return build_structseq(node);
        case OG_BASE_PROXY:
            return build_proxy(walk, node);
        default:
            return NULL;
    }
}

PyObject *
og_node_finish(og_walk *walk, og_node *node)
{
    PyObject *made = NULL;
    if (!node->changed && !node->handed &&
        (node->base == OG_BASE_TENSOR ? node->plain
                                      : node->shape->keep_same)) {
        return Py_NewRef(node->source);
    }
    if (node->base == OG_BASE_HANDLER) {
        return build_handler(node);
    }
    if (node->base == OG_BASE_LIST && node->shape->exact &&
        node->early == NULL) {
        return content_list(node);
    }
    if (node->base == OG_BASE_TUPLE || node->base == OG_BASE_FROZENSET ||
        node->base == OG_BASE_STRUCTSEQ || node->base == OG_BASE_PROXY) {
        made = build_late(walk, node);
        if (made != NULL && fill_attributes(node, made) < 0) {
            Py_CLEAR(made);
        }
        return made;
    }
    if (node->base == OG_BASE_DICT && node->shape->exact &&
        node->early == NULL && !node->rekeyed) {
        made = copy_dict(node);
        if (made != NULL || PyErr_Occurred()) {
            return made;
        }
    }
    made = Py_XNewRef(og_node_early(walk, node));
    if (made != NULL && fill(walk, node, made) < 0) {
        Py_CLEAR(made);
    }
    return made;
}
