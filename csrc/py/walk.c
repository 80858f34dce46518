/* See walk.h. References are held on the stack, because materialising a
 * __dict__ may run the collector and with it anything. */
#include "py/walk.h"

/* A tree of more visits than this may be a chain of shared modules, or have a
 * cycle: it is walked again with a set of what was seen. */
#define PLAIN_VISITS 10000

/* Nearly all are of the class itself, which is a look and no call. */
static bool
is_dict(PyObject *object)
{
    return Py_TYPE(object) == &PyDict_Type || PyDict_Check(object);
}

int
og_pile_push(og_pile *pile, PyObject *item)
{
    if (pile->count == pile->capacity) {
        size_t capacity = pile->capacity == 0 ? 64 : pile->capacity * 2;
        PyObject **items =
            PyMem_Realloc(pile->items, capacity * sizeof *items);
        if (items == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        pile->items = items;
        pile->capacity = capacity;
    }
    pile->items[pile->count++] = Py_NewRef(item);
    return 0;
}

PyObject *
og_pile_pop(og_pile *pile)
{
    return pile->count == 0 ? NULL : pile->items[--pile->count];
}

void
og_pile_free(og_pile *pile)
{
    while (pile->count > 0) {
        Py_DECREF(pile->items[--pile->count]);
    }
    PyMem_Free(pile->items);
    *pile = (og_pile){NULL, 0, 0};
}

int
og_pile_push_roots(og_pile *pile, PyObject *roots)
{
    for (Py_ssize_t i = PyTuple_Size(roots) - 1; i >= 0; i--) {
        if (og_pile_push(pile, PyTuple_GetItem(roots, i)) < 0) {
            return -1;
        }
    }
    return 0;
}

static bool
is_module(const og_guards_state *guards, PyObject *object)
{
    PyTypeObject *type = (PyTypeObject *)guards->module_type;
    return Py_TYPE(object) == type || PyType_IsSubtype(Py_TYPE(object), type);
}

static int
push_children_of(og_guards_state *guards, og_pile *pile, PyObject *dict)
{
    PyObject *children = PyDict_GetItemWithError(dict, guards->name_modules);
    if (children == NULL) {
        return PyErr_Occurred() ? -1 : 0;
    }
    if (!is_dict(children) || PyDict_Size(children) == 0) {
        return 0;
    }
    Py_ssize_t position = 0;
    PyObject *key, *child;
    while (PyDict_Next(children, &position, &key, &child)) {
        if (child != Py_None && is_module(guards, child) &&
            og_pile_push(pile, child) < 0) {
            return -1;
        }
    }
    return 0;
}

/* The instance's __dict__: a new reference, or NULL with an exception set. */
static PyObject *
own_dict(PyObject *module)
{
    PyObject *dict = PyObject_GenericGetDict(module, NULL);
    if (dict != NULL && !is_dict(dict)) {
        PyErr_Format(PyExc_TypeError,
                     "expected a module with a dict as its __dict__, got %R; "
                     "pass an nn.Module whose __init__ has run",
                     Py_TYPE(dict));
        Py_CLEAR(dict);
    }
    return dict;
}

int
og_pile_push_children(og_guards_state *guards, og_pile *pile, PyObject *module)
{
    PyObject *dict = own_dict(module);
    if (dict == NULL) {
        return -1;
    }
    int result = push_children_of(guards, pile, dict);
    Py_DECREF(dict);
    return result;
}

/* Modules of another make (scripted ones) keep `training` elsewhere. */
static int
mode_by_attribute(og_guards_state *guards, PyObject *module)
{
    PyObject *value = PyObject_GetAttr(module, guards->name_training);
    int result = value == NULL ? -1 : PyObject_IsTrue(value);
    Py_XDECREF(value);
    return result;
}

static int
mode_in(og_guards_state *guards, PyObject *module, PyObject *dict)
{
    PyObject *value = PyDict_GetItemWithError(dict, guards->name_training);
    if (value == Py_False) {
        return 0;
    }
    if (value == Py_True) {
        return 1;
    }
    if (value == NULL && PyErr_Occurred()) {
        return -1;
    }
    return mode_by_attribute(guards, module);
}

int
og_module_mode(og_guards_state *guards, PyObject *module)
{
    PyObject *dict = own_dict(module);
    int result = dict == NULL ? -1 : mode_in(guards, module, dict);
    Py_XDECREF(dict);
    return result;
}

int
og_module_own_train(og_guards_state *guards, PyObject *module)
{
    PyObject *dict = own_dict(module);
    if (dict == NULL) {
        return -1;
    }
    bool shadowed =
        PyDict_GetItemWithError(dict, guards->name_train) != NULL ||
        PyDict_GetItemWithError(dict, guards->name_training) == NULL;
    Py_DECREF(dict);
    if (PyErr_Occurred()) {
        return -1;
    }
    if (shadowed) {
        return 1;
    }
    PyObject *train =
        PyObject_GetAttr((PyObject *)Py_TYPE(module), guards->name_train);
    if (train == NULL) {
        return -1;
    }
    bool own = train != guards->module_train;
    Py_DECREF(train);
    return own;
}

/* Whether the module of dict is in mode: 1, 0 or -1. `training` is the first
 * thing nn.Module sets, so the first key mostly is it. */
static int
is_in_mode(og_guards_state *guards, PyObject *module, PyObject *dict,
           bool mode)
{
    Py_ssize_t position = 0;
    PyObject *key, *value;
    PyObject *wanted = mode ? Py_True : Py_False;
    if (PyDict_Next(dict, &position, &key, &value) &&
        key == guards->name_training && value == wanted) {
        return 1;
    }
    int found = mode_in(guards, module, dict);
    return found < 0 ? -1 : found == (int)mode;
}

/* As is_in_mode for one child; one that has children itself is pushed. */
static int
child_in_mode(og_guards_state *guards, og_pile *pile, PyObject *child,
              bool mode)
{
    PyObject *dict = own_dict(child);
    if (dict == NULL) {
        return -1;
    }
    int result = is_in_mode(guards, child, dict, mode);
    if (result > 0) {
        PyObject *below = PyDict_GetItemWithError(dict, guards->name_modules);
        if (below == NULL ? PyErr_Occurred() != NULL
                          : is_dict(below) && PyDict_Size(below) != 0 &&
                                og_pile_push(pile, child) < 0) {
            result = -1;
        }
    }
    Py_DECREF(dict);
    return result;
}

/* The children of the module of dict: 1 all in mode, 0, -1. The children are
 * held, for looking at one may run the collector. */
static int
children_in_mode(og_guards_state *guards, og_pile *pile, PyObject *dict,
                 bool mode)
{
    PyObject *children = PyDict_GetItemWithError(dict, guards->name_modules);
    if (children == NULL) {
        return PyErr_Occurred() ? -1 : 1;
    }
    if (!is_dict(children)) {
        return 1;
    }
    int result = 1;
    Py_ssize_t position = 0;
    PyObject *key, *child;
    PyTypeObject *known = NULL; /* siblings are mostly of one type */
    Py_INCREF(children);
    while (result > 0 && PyDict_Next(children, &position, &key, &child)) {
        if (Py_TYPE(child) == known ||
            (child != Py_None && is_module(guards, child))) {
            Py_INCREF(child);
            known = Py_TYPE(child);
            result = child_in_mode(guards, pile, child, mode);
            Py_DECREF(child);
        }
    }
    Py_DECREF(children);
    return result;
}

/* 1 in mode, 0 not, -1 exception; 2: visits ran out. Whoever is on the pile
 * has been looked at, but not what is below it. */
static int
walk_in_mode(og_guards_state *guards, og_pile *pile, og_tree *seen, bool mode)
{
    size_t visits = 0;
    PyObject *module;
    while ((module = og_pile_pop(pile)) != NULL) {
        int result = seen == NULL ? 1 : og_tree_add(seen, module);
        if (result > 0) {
            PyObject *dict = own_dict(module);
            result =
                dict == NULL ? -1 : children_in_mode(guards, pile, dict, mode);
            Py_XDECREF(dict);
        }
        else if (result == 0) {
            result = 1;
        }
        Py_DECREF(module);
        if (result <= 0) {
            return result;
        }
        if (seen == NULL && ++visits > PLAIN_VISITS) {
            return 2;
        }
    }
    return 1;
}

static int
walk_roots(og_guards_state *guards, og_tree *seen, PyObject *roots, bool mode)
{
    og_pile pile = {NULL, 0, 0};
    int result = 1;
    for (Py_ssize_t i = 0; result > 0 && i < PyTuple_Size(roots); i++) {
        result = child_in_mode(guards, &pile, PyTuple_GetItem(roots, i), mode);
    }
    if (result > 0) {
        result = walk_in_mode(guards, &pile, seen, mode);
    }
    og_pile_free(&pile);
    return result;
}

int
og_tree_in_mode(og_guards_state *guards, PyObject *roots, bool mode)
{
    og_tree seen = {NULL, 0, 0, NULL, 0};
    int result = walk_roots(guards, NULL, roots, mode);
    if (result == 2) {
        result = walk_roots(guards, &seen, roots, mode);
        og_tree_free(&seen);
    }
    return result;
}

static size_t
slot_of(const og_tree *tree, PyObject *module)
{
    size_t mask = tree->slot_count - 1;
    size_t hash = (size_t)((uintptr_t)module >> 4);
    size_t at = (hash ^ (hash >> 9)) & mask;
    while (tree->slots[at] != 0 &&
           tree->modules[tree->slots[at] - 1] != module) {
        at = (at + 1) & mask;
    }
    return at;
}

bool
og_tree_has(const og_tree *tree, PyObject *module)
{
    return tree->count > 0 && tree->slots[slot_of(tree, module)] != 0;
}

static int
grow(og_tree *tree)
{
    size_t capacity = tree->capacity == 0 ? 64 : tree->capacity * 2;
    PyObject **modules =
        PyMem_Realloc(tree->modules, capacity * sizeof *modules);
    if (modules == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    tree->modules = modules;
    size_t *slots = PyMem_Calloc(capacity * 2, sizeof *slots);
    if (slots == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyMem_Free(tree->slots);
    tree->slots = slots;
    tree->slot_count = capacity * 2;
    tree->capacity = capacity;
    for (size_t i = 0; i < tree->count; i++) {
        slots[slot_of(tree, modules[i])] = i + 1;
    }
    return 0;
}

int
og_tree_add(og_tree *tree, PyObject *module)
{
    if (og_tree_has(tree, module)) {
        return 0;
    }
    if (tree->count == tree->capacity && grow(tree) < 0) {
        return -1;
    }
    tree->slots[slot_of(tree, module)] = tree->count + 1;
    tree->modules[tree->count++] = Py_NewRef(module);
    return 1;
}

int
og_tree_collect(og_guards_state *guards, PyObject *roots, og_tree *tree)
{
    og_pile pile = {NULL, 0, 0};
    int result = og_pile_push_roots(&pile, roots);
    PyObject *module;
    while (result == 0 && (module = og_pile_pop(&pile)) != NULL) {
        int added = og_tree_add(tree, module);
        if (added < 0 ||
            (added && og_pile_push_children(guards, &pile, module) < 0)) {
            result = -1;
        }
        Py_DECREF(module);
    }
    og_pile_free(&pile);
    if (result < 0) {
        og_tree_free(tree);
    }
    return result;
}

void
og_tree_free(og_tree *tree)
{
    og_tree gone = *tree;
    *tree = (og_tree){NULL, 0, 0, NULL, 0};
    while (gone.count > 0) {
        Py_DECREF(gone.modules[--gone.count]);
    }
    PyMem_Free(gone.modules);
    PyMem_Free(gone.slots);
}
