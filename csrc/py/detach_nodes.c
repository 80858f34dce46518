/* Nodes: making, filling and freeing them, and all else a walk owns. */
#include "py/detach_walk.h"

og_node *
og_node_new(og_walk *walk, og_base base, og_shape *shape, PyObject *source)
{
    og_node *node = walk->spare;
    if (node != NULL) {
        walk->spare = node->parent;
    }
    else {
        node = PyMem_Malloc(sizeof *node);
        if (node == NULL) {
            PyErr_NoMemory();
            return NULL;
        }
    }
    *node = (og_node){.base = base, .shape = shape, .older = walk->nodes};
    if (shape != NULL) {
        shape->references++;
    }
    node->source = Py_XNewRef(source);
    if (walk->nodes != NULL) {
        walk->nodes->newer = node;
    }
    walk->nodes = node;
    return node;
}

int
og_node_push(og_node *node, PyObject *item)
{
    if (item == NULL) {
        return -1;
    }
    if (node->count == node->room) {
        Py_ssize_t room = node->room < 8 ? 8 : node->room * 2;
        PyObject **items = NULL;
        if (room <= PY_SSIZE_T_MAX / 2 / (Py_ssize_t)sizeof *items) {
            items = PyMem_Realloc(node->items, (size_t)room * sizeof *items);
        }
        if (items == NULL) {
            Py_DECREF(item);
            PyErr_NoMemory();
            return -1;
        }
        node->items = items;
        node->room = room;
    }
    node->items[node->count++] = item;
    return 0;
}

void
og_node_empty(og_node *node)
{
    PyObject **items = node->items;
    Py_ssize_t count = node->count;
    og_wait *wait = node->waits;
    og_shape *shape = node->shape;
    node->items = NULL;
    node->count = node->room = node->content = node->next = 0;
    node->waits = NULL;
    node->shape = NULL;
    while (wait != NULL) {
        og_wait *next = wait->next;
        PyMem_Free(wait);
        wait = next;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_XDECREF(items[i]);
    }
    PyMem_Free(items);
    Py_CLEAR(node->source);
    Py_CLEAR(node->early);
    Py_CLEAR(node->extra);
    if (shape != NULL) {
        og_shape_release(shape);
    }
}

int
og_node_wait(og_node *on, og_node *waiter, Py_ssize_t slot)
{
    og_wait *wait = PyMem_Malloc(sizeof *wait);
    if (wait == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    *wait = (og_wait){waiter, slot, on->waits};
    on->waits = wait;
    waiter->missing++;
    return 0;
}

/* Keeps the exception that is set, because all of this runs destructors. */
void
og_walk_free(og_walk *walk)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    for (og_node *node = walk->nodes; node != NULL;) {
        og_node *older = node->older;
        og_node_empty(node);
        PyMem_Free(node);
        node = older;
    }
    for (og_node *node = walk->spare; node != NULL;) {
        og_node *next = node->parent;
        PyMem_Free(node);
        node = next;
    }
    for (Py_ssize_t i = 0; i < walk->remote_count; i++) {
        Py_DECREF(walk->remotes[i].tensor);
    }
    PyMem_Free(walk->remotes);
    PyMem_Free(walk->owned);
    og_memo_free(&walk->memo);
    Py_CLEAR(walk->call);
    Py_CLEAR(walk->mode);
    PyErr_Restore(type, value, traceback);
}
