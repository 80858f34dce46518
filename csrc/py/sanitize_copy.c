/* Copying a payload without its tensors, with an explicit stack.
 *
 * First every container is met once and its children are snapshotted, in post
 * order; then it is settled which of them hold something to replace; those
 * alone are copied: mutable ones get an empty copy first, tuples and frozen
 * sets are built in post order, mutable ones are filled last. A cycle always
 * passes through a mutable container, so every copy exists when needed. */
#include "py/sanitize_copy.h"

#include <string.h>

typedef enum copy_kind {
    KIND_LEAF,
    KIND_TENSOR,
    KIND_TRACEBACK,
    KIND_EXCEPTION,
    KIND_OPAQUE,
    KIND_TUPLE,
    KIND_FROZENSET,
    KIND_LIST,
    KIND_DICT,
    KIND_SET,
    KIND_DEQUE,
    KIND_RECORD,
} copy_kind;

typedef struct copy_node {
    PyObject *object;   /* owned */
    PyObject *children; /* owned list: items, or keys and values in turn */
    PyObject *attrs;    /* owned, the instance's dict; NULL when none */
    PyObject *members;  /* owned, og_members_of a record; children: values */
    PyObject *result;   /* owned, what stands for object; NULL: itself */
    copy_kind kind;
    bool dirty;
} copy_node;

typedef struct copy_work {
    og_walk *walk;
    og_map memo; /* object -> index of its node + 1 */
    copy_node *nodes;
    size_t count, capacity;
    size_t *order; /* indices, children first */
    size_t ordered;
    bool failed; /* without memory: the copy lacks something */
} copy_work;

/* Is the class of object a dataclass? Looked up past any metaclass. */
static bool
is_record(og_state *state, PyObject *object)
{
    og_sanitize_state *s = &state->sanitize;
    PyTypeObject *type = Py_TYPE(object);
    if (type == (PyTypeObject *)s->namespace_type) {
        return true;
    }
    if (!(PyType_GetFlags(type) & Py_TPFLAGS_HEAPTYPE) ||
        PyType_GetSlot(type, Py_tp_finalize) != NULL) {
        return false;
    }
    bool result = false;
    PyObject *mro = og_descr_get(s->type_mro, (PyObject *)type);
    for (Py_ssize_t i = 0;
         mro != NULL && PyTuple_Check(mro) && !result && i < PyTuple_Size(mro);
         i++) {
        PyObject *dict = og_descr_get(s->type_dict, PyTuple_GetItem(mro, i));
        result = dict != NULL &&
                 PyMapping_HasKeyString(dict, "__dataclass_fields__");
        Py_XDECREF(dict);
    }
    Py_XDECREF(mro);
    return result;
}

static copy_kind
kind_of(og_state *state, PyObject *object)
{
    og_sanitize_state *s = &state->sanitize;
    PyTypeObject *type = Py_TYPE(object);
    if (type == &PyUnicode_Type || type == &PyLong_Type ||
        type == &PyFloat_Type || object == Py_None) {
        return KIND_LEAF;
    }
    if (og_is_tensor(state, object)) {
        return KIND_TENSOR;
    }
    if (!(PyType_GetFlags(type) & Py_TPFLAGS_HAVE_GC) ||
        PyType_Check(object) ||
        PyObject_TypeCheck(object, (PyTypeObject *)s->module_type) ||
        type == (PyTypeObject *)s->frame_type) {
        return KIND_LEAF;
    }
    if (PyExceptionInstance_Check(object)) {
        return KIND_EXCEPTION;
    }
    if (type == (PyTypeObject *)s->traceback_type) {
        return KIND_TRACEBACK;
    }
    if (PyTuple_Check(object)) {
        return KIND_TUPLE;
    }
    if (PyList_Check(object)) {
        return KIND_LIST;
    }
    if (PyDict_Check(object)) {
        return KIND_DICT;
    }
    if (PyAnySet_Check(object)) {
        return PyFrozenSet_Check(object) ? KIND_FROZENSET : KIND_SET;
    }
    if (type == (PyTypeObject *)s->deque_type) {
        return KIND_DEQUE;
    }
    return is_record(state, object) ? KIND_RECORD : KIND_OPAQUE;
}

/* A new list of what iterating by base's own __iter__ gives. */
static PyObject *
list_by(PyTypeObject *base, PyObject *object)
{
    getiterfunc get = (getiterfunc)PyType_GetSlot(base, Py_tp_iter);
    PyObject *iterator = get == NULL ? NULL : get(object);
    PyObject *result = iterator == NULL ? NULL : PySequence_List(iterator);
    Py_XDECREF(iterator);
    return result;
}

static PyObject *
dict_children(PyObject *dict)
{
    PyObject *key, *value, *result = PyList_New(0);
    Py_ssize_t at = 0;
    while (result != NULL && PyDict_Next(dict, &at, &key, &value)) {
        if (PyList_Append(result, key) < 0 ||
            PyList_Append(result, value) < 0) {
            Py_CLEAR(result);
        }
    }
    return result;
}

static PyObject *
record_children(copy_work *work, copy_node *node)
{
    node->members = og_members_of(work->walk->state, node->object);
    PyObject *result = node->members == NULL ? NULL : PyList_New(0);
    for (Py_ssize_t i = 0; result != NULL && i < PyList_Size(node->members);
         i++) {
        PyObject *value =
            og_descr_get(PyList_GetItem(node->members, i), node->object);
        /* An unset slot: the member itself says so, nobody stores those. */
        if (PyList_Append(result, value == NULL
                                      ? PyList_GetItem(node->members, i)
                                      : value) < 0) {
            Py_CLEAR(result);
        }
        Py_XDECREF(value);
    }
    return result;
}

/* Snapshots the children; what the leaf-like kinds turn into is made here. */
static int
node_open(copy_work *work, copy_node *node)
{
    og_state *state = work->walk->state;
    PyObject *object = node->object;
    switch (node->kind) {
        case KIND_TENSOR:
            node->result = og_tensor_summary(state, object);
            node->dirty = true;
            return node->result == NULL ? -1 : 0;
        case KIND_TRACEBACK:
            node->result = og_walk_traceback(work->walk, object);
            node->dirty = node->result != NULL && node->result != object;
            return 0;
        case KIND_EXCEPTION:
            return work->walk->deep ? og_walk_push(work->walk, object) : 0;
        case KIND_OPAQUE:
            node->dirty = og_reaches_tensor(state, object);
            return 0;
        case KIND_TUPLE:
            node->children = PyTuple_GetSlice(object, 0, PyTuple_Size(object));
            if (node->children != NULL) {
                PyObject *list = PySequence_List(node->children);
                Py_DECREF(node->children);
                node->children = list;
            }
            break;
        case KIND_LIST:
            node->children = PyList_GetSlice(object, 0, PyList_Size(object));
            break;
        case KIND_DICT:
            node->children = dict_children(object);
            break;
        case KIND_SET:
            node->children = list_by(&PySet_Type, object);
            break;
        case KIND_FROZENSET:
            node->children = list_by(&PyFrozenSet_Type, object);
            break;
        case KIND_DEQUE:
            node->children =
                list_by((PyTypeObject *)state->sanitize.deque_type, object);
            break;
        default:
            node->children = record_children(work, node);
            break;
    }
    if (node->children == NULL) {
        return -1;
    }
    if (node->kind == KIND_RECORD ||
        PyType_GetFlags(Py_TYPE(object)) & Py_TPFLAGS_HEAPTYPE) {
        node->attrs = PyObject_GenericGetDict(object, NULL);
        og_forget();
    }
    return 0;
}

/* Adds the node of object, unless it has one or needs none. *added is its
 * index + 1, or 0. */
static int
node_add(copy_work *work, PyObject *object, size_t *added)
{
    *added = 0;
    copy_kind kind = kind_of(work->walk->state, object);
    if (kind == KIND_LEAF || og_map_find(&work->memo, object) != NULL) {
        return 0;
    }
    if (work->count == work->capacity) {
        size_t capacity = work->capacity == 0 ? 8 : work->capacity * 2;
        size_t *order = PyMem_Realloc(work->order, capacity * sizeof *order);
        if (order == NULL) {
            return -1;
        }
        work->order = order;
        copy_node *nodes =
            PyMem_Realloc(work->nodes, capacity * sizeof *nodes);
        if (nodes == NULL) {
            return -1;
        }
        work->nodes = nodes;
        work->capacity = capacity;
    }
    if (og_map_put(&work->memo, object, (void *)(uintptr_t)(work->count + 1)) <
        0) {
        return -1;
    }
    copy_node *node = &work->nodes[work->count++];
    memset(node, 0, sizeof *node);
    node->object = Py_NewRef(object);
    node->kind = kind;
    *added = work->count;
    return node_open(work, node);
}

static copy_node *
node_of(copy_work *work, PyObject *object)
{
    og_map_entry *entry =
        object == NULL ? NULL : og_map_find(&work->memo, object);
    return entry == NULL ? NULL
                         : &work->nodes[(size_t)(uintptr_t)entry->value - 1];
}

/* The child at a position: the instance's dict comes after all others. */
static PyObject *
child_at(const copy_node *node, Py_ssize_t at)
{
    Py_ssize_t count =
        node->children == NULL ? 0 : PyList_Size(node->children);
    if (at < count) {
        return PyList_GetItem(node->children, at);
    }
    return at == count ? node->attrs : NULL;
}

typedef struct copy_place {
    size_t node;
    Py_ssize_t next;
} copy_place;

/* Meets everything below root, children before parents in work->order. */
static int
discover(copy_work *work, PyObject *root)
{
    size_t depth = 0, capacity = 0, added;
    copy_place *stack = NULL;
    int result = node_add(work, root, &added);
    while (result == 0 && (added != 0 || depth > 0)) {
        if (added != 0) {
            if (depth == capacity) {
                capacity = capacity == 0 ? 16 : capacity * 2;
                copy_place *grown =
                    PyMem_Realloc(stack, capacity * sizeof *stack);
                if (grown == NULL) {
                    result = -1;
                    break;
                }
                stack = grown;
            }
            stack[depth++] = (copy_place){added - 1, 0};
            added = 0;
            continue;
        }
        copy_place *top = &stack[depth - 1];
        PyObject *child = child_at(&work->nodes[top->node], top->next);
        if (child != NULL) {
            top->next++;
            result = node_add(work, child, &added);
            continue;
        }
        work->order[work->ordered++] = top->node;
        depth--;
    }
    PyMem_Free(stack);
    return result;
}

/* Marks all that lead to something to replace. Cycles may need more passes;
 * after a few of them everything that has children is copied. */
static void
settle(copy_work *work)
{
    bool changed = true;
    for (int pass = 0; changed; pass++) {
        changed = false;
        for (size_t i = 0; i < work->ordered; i++) {
            copy_node *node = &work->nodes[work->order[i]];
            PyObject *child;
            if (node->dirty || node->children == NULL) {
                continue;
            }
            node->dirty = pass > 8;
            for (Py_ssize_t at = 0;
                 !node->dirty && (child = child_at(node, at)) != NULL; at++) {
                copy_node *below = node_of(work, child);
                node->dirty = below != NULL && below->dirty;
            }
            changed = changed || node->dirty;
        }
    }
}

/* What stands for object in a copy; borrowed. */
static PyObject *
stand_in(copy_work *work, PyObject *object)
{
    copy_node *node = node_of(work, object);
    if (node == NULL || !node->dirty) {
        return object;
    }
    return node->result == NULL ? Py_None : node->result;
}

static PyObject *
object_summary(og_state *state, PyObject *object)
{
    PyObject *result =
        PyStructSequence_New((PyTypeObject *)state->sanitize.object_summary);
    PyObject *name =
        result == NULL ? NULL : PyType_GetQualName(Py_TYPE(object));
    if (name == NULL) {
        Py_CLEAR(result);
        return NULL;
    }
    PyStructSequence_SetItem(result, 0, name);
    return result;
}

/* base.__new__(type of object, *items), which refuses what is unsafe; NULL
 * with nothing set then. */
static PyObject *
new_like(PyTypeObject *base, PyObject *object, PyObject *items)
{
    PyObject *new = PyObject_GetAttrString((PyObject *)base, "__new__");
    PyObject *result =
        new == NULL ? NULL
                    : PyObject_CallFunctionObjArgs(
                          new, (PyObject *)Py_TYPE(object), items, NULL);
    Py_XDECREF(new);
    if (result == NULL) {
        og_forget();
    }
    return result;
}

/* The children's stand-ins as a new list. */
static PyObject *
stand_ins(copy_work *work, const copy_node *node)
{
    Py_ssize_t count = PyList_Size(node->children);
    PyObject *result = PyList_New(count);
    for (Py_ssize_t i = 0; result != NULL && i < count; i++) {
        PyObject *item = stand_in(work, PyList_GetItem(node->children, i));
        (void)PyList_SetItem(result, i, Py_NewRef(item));
    }
    return result;
}

static PyObject *
make_shell(copy_work *work, copy_node *node)
{
    og_sanitize_state *s = &work->walk->state->sanitize;
    PyObject *object = node->object, *result = NULL, *maxlen = NULL;
    switch (node->kind) {
        case KIND_LIST:
            result = PyList_CheckExact(object)
                         ? NULL
                         : new_like(&PyList_Type, object, NULL);
            return result == NULL ? PyList_New(0) : result;
        case KIND_DICT:
            result = PyDict_CheckExact(object)
                         ? NULL
                         : new_like(&PyDict_Type, object, NULL);
            return result == NULL ? PyDict_New() : result;
        case KIND_SET:
            return PySet_New(NULL);
        case KIND_DEQUE:
            maxlen = PyObject_GetAttrString(object, "maxlen");
            result = maxlen == NULL
                         ? NULL
                         : PyObject_CallFunction(s->deque_type, "()O", maxlen);
            Py_XDECREF(maxlen);
            return result;
        case KIND_RECORD:
            result = Py_TYPE(object) == (PyTypeObject *)s->namespace_type
                         ? PyObject_CallNoArgs(s->namespace_type)
                         : new_like(&PyBaseObject_Type, object, NULL);
            og_forget();
            break;
        default:
            break;
    }
    return result == NULL ? object_summary(work->walk->state, object) : result;
}

static PyObject *
make_frozen(copy_work *work, copy_node *node)
{
    PyObject *items = stand_ins(work, node), *result = NULL;
    if (items == NULL) {
        return NULL;
    }
    if (node->kind == KIND_FROZENSET) {
        result = PyFrozenSet_New(items);
    }
    else {
        if (!PyTuple_CheckExact(node->object)) {
            result = new_like(&PyTuple_Type, node->object, items);
        }
        if (result == NULL) {
            result = PyList_AsTuple(items);
        }
    }
    Py_DECREF(items);
    return result;
}

/* An item that cannot be set is left out; without memory nothing is kept. */
static void
item_done(copy_work *work)
{
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_MemoryError)) {
        work->failed = true;
    }
    og_forget();
}

static void
fill_dict(copy_work *work, copy_node *node)
{
    PyObject *ordered = work->walk->state->sanitize.ordered_type;
    PyObject *set = NULL;
    if (PyObject_TypeCheck(node->result, (PyTypeObject *)ordered)) {
        set = PyObject_GetAttrString(ordered, "__setitem__");
    }
    Py_ssize_t count = PyList_Size(node->children);
    for (Py_ssize_t i = 0; i + 1 < count; i += 2) {
        PyObject *key = stand_in(work, PyList_GetItem(node->children, i));
        PyObject *value =
            stand_in(work, PyList_GetItem(node->children, i + 1));
        if (set != NULL) {
            Py_XDECREF(PyObject_CallFunctionObjArgs(set, node->result, key,
                                                    value, NULL));
        }
        else {
            (void)PyDict_SetItem(node->result, key, value);
        }
        item_done(work);
    }
    Py_XDECREF(set);
}

static void
fill_rest(copy_work *work, copy_node *node)
{
    Py_ssize_t count = PyList_Size(node->children);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *child = PyList_GetItem(node->children, i);
        PyObject *item = stand_in(work, child);
        if (node->kind == KIND_LIST) {
            (void)PyList_Append(node->result, item);
        }
        else if (node->kind == KIND_SET) {
            (void)PySet_Add(node->result, item);
        }
        else if (node->kind == KIND_DEQUE) {
            Py_XDECREF(
                PyObject_CallMethod(node->result, "append", "(O)", item));
        }
        else if (PyList_GetItem(node->members, i) != child) {
            og_descr_set(PyList_GetItem(node->members, i), node->result, item);
        }
        item_done(work);
    }
}

/* Gives a copy its items and attributes; what cannot be set is left out. */
static void
fill(copy_work *work, copy_node *node)
{
    if (node->kind == KIND_DICT) {
        fill_dict(work, node);
    }
    else if (Py_TYPE(node->result) == Py_TYPE(node->object) ||
             node->kind != KIND_RECORD) {
        fill_rest(work, node);
    }
    if (node->attrs != NULL &&
        Py_TYPE(node->result) == Py_TYPE(node->object)) {
        PyObject *dict = PyObject_GenericGetDict(node->result, NULL);
        if (dict != NULL) {
            (void)PyDict_Update(dict, stand_in(work, node->attrs));
            Py_DECREF(dict);
        }
    }
    item_done(work);
}

static int
build(copy_work *work)
{
    for (size_t i = 0; i < work->count; i++) {
        copy_node *node = &work->nodes[i];
        if (node->dirty && node->result == NULL && node->kind != KIND_TUPLE &&
            node->kind != KIND_FROZENSET) {
            node->result = make_shell(work, node);
            if (node->result == NULL) {
                return -1;
            }
        }
    }
    for (size_t i = 0; i < work->ordered; i++) {
        copy_node *node = &work->nodes[work->order[i]];
        if (node->dirty && node->result == NULL) {
            node->result = make_frozen(work, node);
            if (node->result == NULL) {
                return -1;
            }
        }
    }
    /* An instance's dict is copied into another, so it comes first. */
    for (int records = 0; records < 2; records++) {
        for (size_t i = 0; i < work->count; i++) {
            copy_node *node = &work->nodes[i];
            bool plain = node->kind == KIND_DICT && node->attrs == NULL;
            if (node->dirty && node->kind >= KIND_LIST &&
                plain == (records == 0)) {
                fill(work, node);
            }
        }
    }
    return 0;
}

static void
work_free(copy_work *work)
{
    copy_node *nodes = work->nodes;
    for (size_t i = 0; i < work->count; i++) {
        Py_XDECREF(nodes[i].object);
        Py_XDECREF(nodes[i].children);
        Py_XDECREF(nodes[i].attrs);
        Py_XDECREF(nodes[i].members);
        Py_XDECREF(nodes[i].result);
    }
    PyMem_Free(nodes);
    PyMem_Free(work->order);
    og_map_free(&work->memo);
}

PyObject *
og_copy_value(og_walk *walk, PyObject *value)
{
    copy_work work = {.walk = walk};
    PyObject *result = NULL;
    if (discover(&work, value) == 0) {
        settle(&work);
        if (build(&work) == 0 && !work.failed) {
            result = Py_NewRef(stand_in(&work, value));
        }
    }
    if (result == NULL && !PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    work_free(&work);
    return result;
}
