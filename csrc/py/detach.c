/* The walk itself: visiting, completing, delivering. What the parts are for
 * is told in detach_walk.h; the module's functions are in detach_module.c. */
#include "py/detach_walk.h"
#include "py/detach_call.h"

/* --- completing --- */

static void
memo_complete(og_walk *walk, og_node *node, PyObject *value)
{
    og_memo_entry *entry = og_memo_find(&walk->memo, node->source);
    if (entry != NULL && entry->node == node) {
        entry->node = NULL;
        entry->value = Py_NewRef(value);
    }
}

/* What failed is not to be waited for: a registered function may have caught
 * the error and go on. */
static void
give_up(og_walk *walk, og_node *node)
{
    og_memo_entry *entry =
        node->source == NULL ? NULL : og_memo_find(&walk->memo, node->source);
    if (entry != NULL && entry->node == node) {
        entry->node = NULL;
    }
}

/* Puts value where the child was. */
static void
put(og_node *node, Py_ssize_t slot, PyObject *value)
{
    PyObject *old = node->items[slot];
    if (old != value) {
        node->changed = true;
        node->rekeyed = node->rekeyed || slot % 2 == 0;
    }
    node->items[slot] = Py_NewRef(value);
    Py_DECREF(old);
}

/* Those who waited and lack nothing more go to *ready, a list and no
 * recursion: completing them makes others ready. */
static void
deliver(og_node *node, PyObject *value, og_wait **ready)
{
    og_wait *wait = node->waits;
    node->waits = NULL;
    while (wait != NULL) {
        og_wait *next = wait->next;
        put(wait->node, wait->slot, value);
        if (--wait->node->missing == 0 && wait->node->scanned) {
            wait->next = *ready;
            *ready = wait;
        }
        else {
            PyMem_Free(wait);
        }
        wait = next;
    }
}

static void
retire(og_walk *walk, og_node *node)
{
    og_node_empty(node);
    if (walk->parked > 0) {
        return; /* some node's path may lead through it */
    }
    if (node->newer != NULL) {
        node->newer->older = node->older;
    }
    else {
        walk->nodes = node->older;
    }
    if (node->older != NULL) {
        node->older->newer = node->newer;
    }
    node->parent = walk->spare;
    walk->spare = node;
}

int
og_node_complete(og_walk *walk, og_node *node, PyObject *value)
{
    og_wait *ready = NULL;
    memo_complete(walk, node, value);
    deliver(node, value, &ready);
    retire(walk, node);
    while (ready != NULL) {
        og_wait *wait = ready;
        og_node *next = wait->node;
        ready = wait->next;
        PyMem_Free(wait);
        PyObject *made = og_node_finish(walk, next);
        if (made == NULL) {
            og_blame_container(next->parent, next->slot, next->source);
            while (ready != NULL) {
                wait = ready->next;
                PyMem_Free(ready);
                ready = wait;
            }
            return -1;
        }
        walk->parked--;
        memo_complete(walk, next, made);
        deliver(next, made, &ready);
        og_node_empty(next);
        Py_DECREF(made);
    }
    return 0;
}

/* --- visiting --- */

/* A registered function takes over: it gets the value and a way to detach
 * what is inside, which comes back to this walk. */
static og_seen
visit_user(og_walk *walk, og_node *parent, Py_ssize_t slot, og_node *node,
           PyObject **value)
{
    og_shape *shape = node->shape;
    PyObject *fn = shape->handler;
    og_node *top = walk->top;
    node->parent = parent;
    node->slot = slot;
    if (og_walk_plain_mode(walk) < 0 || og_call_new(walk) == NULL) {
        return OG_SEEN_ERROR;
    }
    if (Py_EnterRecursiveCall(" in a function of register_detach")) {
        return OG_SEEN_ERROR;
    }
    walk->top = node;
    PyObject *made =
        PyObject_CallFunctionObjArgs(fn, node->source, walk->call, NULL);
    Py_LeaveRecursiveCall();
    walk->top = top;
    if (made == NULL) {
        og_blame_note(parent, slot);
        return OG_SEEN_ERROR;
    }
    if (og_node_complete(walk, node, made) < 0) {
        Py_DECREF(made);
        return OG_SEEN_ERROR;
    }
    *value = made;
    return OG_SEEN_DONE;
}

/* Somebody meets a container that is being made. */
static og_seen
visit_pending(og_walk *walk, og_node *parent, Py_ssize_t slot, og_node *node,
              PyObject **value)
{
    PyObject *child = node->source;
    if (node->base == OG_BASE_REMOTE) {
        return og_node_wait(node, parent, slot) < 0 ? OG_SEEN_ERROR
                                                    : OG_SEEN_WAIT;
    }
    if (node->base == OG_BASE_USER) {
        og_refuse(parent, slot, child,
                  "expected a registered function to detach what is inside "
                  "its value, at %s it came back to the %.150U it was given; "
                  "pass detach only the parts");
        return OG_SEEN_ERROR;
    }
    PyObject *early = og_node_early(walk, node);
    if (early != NULL) {
        node->handed = true;
        *value = Py_NewRef(early);
        return OG_SEEN_DONE;
    }
    if (PyErr_Occurred()) {
        og_blame_container(parent, slot, child);
        return OG_SEEN_ERROR;
    }
    return og_node_wait(node, parent, slot) < 0 ? OG_SEEN_ERROR : OG_SEEN_WAIT;
}

/* Takes child apart: 1 when node is ready to be scanned, 0 when there is
 * nothing to look for inside, -1 on error. */
static int
open_node(og_walk *walk, og_node *parent, Py_ssize_t slot, og_node *node)
{
    if (node->base == OG_BASE_TENSOR) {
        node->early = og_leaf_any(walk, node->source, &node->plain);
        if (node->early == NULL) {
            og_blame_note(parent, slot);
            return -1;
        }
    }
    int found = og_node_expand(walk, node);
    if (found < 0) {
        og_blame_container(parent, slot, node->source);
    }
    return found;
}

static og_seen
push(og_walk *walk, og_node *parent, Py_ssize_t slot, PyObject *child,
     og_shape *shape, PyObject **value)
{
    og_node *node = og_node_new(walk, shape->base, shape, child);
    if (node == NULL || og_memo_insert(&walk->memo, child, NULL, node) < 0) {
        return OG_SEEN_ERROR;
    }
    if (node->base == OG_BASE_USER) {
        og_seen seen = visit_user(walk, parent, slot, node, value);
        if (seen == OG_SEEN_ERROR) {
            give_up(walk, node);
        }
        return seen;
    }
    int found = open_node(walk, parent, slot, node);
    if (found < 0) {
        give_up(walk, node);
        return OG_SEEN_ERROR;
    }
    if (found == 0) {
        *value = Py_NewRef(child);
        if (og_node_complete(walk, node, child) < 0) {
            Py_CLEAR(*value);
            return OG_SEEN_ERROR;
        }
        return OG_SEEN_DONE;
    }
    if (node->content > 16) {
        og_memo_hint(&walk->memo, (size_t)node->content);
    }
    node->parent = parent;
    node->slot = slot;
    walk->top = node;
    return OG_SEEN_PUSHED;
}

/* The shapes of the plain containers need no look-up. Borrowed. */
static og_shape *
shape_of(og_state *state, PyObject *child)
{
    PyTypeObject *type = Py_TYPE(child);
    if (type == &PyList_Type) {
        return state->detach.list_shape;
    }
    if (type == &PyDict_Type) {
        return state->detach.dict_shape;
    }
    if (type == &PyTuple_Type) {
        return state->detach.tuple_shape;
    }
    return og_shape_of(state, child);
}

static og_seen
visit_known(og_walk *walk, og_node *node, Py_ssize_t slot,
            og_memo_entry *entry, PyObject **value)
{
    if (entry->value != NULL) {
        *value = Py_NewRef(entry->value);
        return OG_SEEN_DONE;
    }
    if (entry->node == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected a registered function to pass on the error "
                        "of detach, it went on to detach the same value "
                        "again");
        return OG_SEEN_ERROR;
    }
    return visit_pending(walk, node, slot, entry->node, value);
}

static og_seen
visit(og_walk *walk, og_node *node, Py_ssize_t slot, PyObject *child,
      PyObject **value)
{
    og_state *state = walk->state;
    PyObject *type = (PyObject *)Py_TYPE(child);
    og_shape *shape = NULL;
    bool exact =
        type == state->ops.tensor_type || type == state->ops.parameter_type;
    if (!exact) {
        shape = shape_of(state, child);
        if (shape == NULL) {
            og_blame_container(node, slot, child);
            return OG_SEEN_ERROR;
        }
        if (shape->base == OG_BASE_OPAQUE) {
            *value = Py_NewRef(child);
            return OG_SEEN_DONE;
        }
    }
    og_memo_entry *entry = og_memo_find(&walk->memo, child);
    if (entry != NULL) {
        return visit_known(walk, node, slot, entry, value);
    }
    if (exact) {
        return og_leaf_exact(walk, node, slot, child, value);
    }
    return push(walk, node, slot, child, shape, value);
}

static inline bool
is_atom(PyObject *child)
{
    PyTypeObject *type = Py_TYPE(child);
    return type == &PyUnicode_Type || type == &PyLong_Type ||
           type == &PyFloat_Type || type == &PyBool_Type || child == Py_None ||
           type == &PyBytes_Type;
}

/* Looks at node's children until one is pushed (1), all are seen (0), or
 * something fails (-1). */
static int
scan(og_walk *walk, og_node *node)
{
    while (node->next < node->count) {
        Py_ssize_t slot = node->next++;
        PyObject *child = node->items[slot];
        PyObject *value = NULL;
        if (is_atom(child)) {
            continue;
        }
        switch (visit(walk, node, slot, child, &value)) {
            case OG_SEEN_DONE:
                put(node, slot, value);
                Py_DECREF(value);
                break;
            case OG_SEEN_PUSHED:
                return 1;
            case OG_SEEN_WAIT:
                break;
            default:
                return -1;
        }
    }
    return 0;
}

/* A node whose children were all seen leaves the stack: finished, or parked
 * until what it lacks is delivered. */
static int
leave(og_walk *walk, og_node *node)
{
    og_node *parent = node->parent;
    Py_ssize_t slot = node->slot;
    PyObject *value = NULL;
    walk->top = parent;
    if (node->missing == 0) {
        value = og_node_finish(walk, node);
        if (value == NULL) {
            og_blame_container(parent, slot, node->source);
            give_up(walk, node);
            return -1;
        }
        put(parent, slot, value);
        int result = og_node_complete(walk, node, value);
        Py_DECREF(value);
        return result;
    }
    node->scanned = true;
    walk->parked++;
    value = og_node_early(walk, node);
    if (value != NULL) {
        node->handed = true;
        put(parent, slot, value);
        return 0;
    }
    if (PyErr_Occurred()) {
        og_blame_container(parent, slot, node->source);
        return -1;
    }
    return og_node_wait(node, parent, slot);
}

static int
run(og_walk *walk, og_node *root)
{
    walk->top = root;
    for (;;) {
        og_node *node = walk->top;
        int pushed = scan(walk, node);
        if (pushed < 0) {
            return -1;
        }
        if (pushed > 0) {
            continue;
        }
        if (node == root) {
            return 0;
        }
        if (leave(walk, node) < 0) {
            return -1;
        }
    }
}

static og_node *
first_parked(og_walk *walk)
{
    og_node *node = walk->nodes;
    while (node != NULL && !(node->scanned && node->missing > 0)) {
        node = node->older;
    }
    return node;
}

PyObject *
og_walk_run(og_walk *walk, PyObject *value)
{
    og_node *outer = walk->top;
    og_node *root = og_node_new(walk, OG_BASE_ROOT, NULL, NULL);
    PyObject *result = NULL;
    if (root == NULL || og_node_push(root, Py_NewRef(value)) < 0) {
        return NULL;
    }
    root->content = 1;
    root->parent = outer;
    root->slot = 0;
    int failed = run(walk, root);
    for (og_node *node = walk->top; failed < 0 && node != outer;
         node = node->parent) {
        give_up(walk, node);
    }
    walk->top = outer;
    if (failed == 0 && walk->remote_count > 0) {
        failed = og_walk_fetch(walk);
    }
    if (failed == 0 &&
        (root->missing > 0 || (outer == NULL && walk->parked > 0))) {
        og_node *lost = first_parked(walk);
        og_refuse(lost == NULL ? outer : lost->parent,
                  lost == NULL ? 0 : lost->slot,
                  lost == NULL ? value : lost->source,
                  "expected every ring to pass through a list, dict or "
                  "object, at %s a %.150U contains itself through immutable "
                  "containers only; break the ring");
        failed = -1;
    }
    if (failed == 0) {
        result = Py_NewRef(root->items[0]);
        retire(walk, root);
    }
    return result;
}

PyObject *
og_detach(og_state *state, PyObject *value, PyObject *models, bool copy)
{
    og_walk walk = {.state = state, .copy = copy, .models = models};
    return og_detach_walk(&walk, value);
}

PyObject *
og_detach_walk(og_walk *walk, PyObject *value)
{
    og_detach_state *detach = &walk->state->detach;
    if (is_atom(value)) {
        return Py_NewRef(value);
    }
    if (detach->registered == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected opguard's module to be alive, the "
                        "interpreter has cleared it; detach before it ends");
        return NULL;
    }
    if (detach->watched != NULL &&
        PyDict_Size(detach->watched) != detach->watched_size) {
        detach->watched_size = PyDict_Size(detach->watched);
        og_shape_cache_clear(detach);
    }
    if (og_leaf_bind(walk->state) < 0) {
        return NULL;
    }
    detach->impl_trust = 0;
    PyObject *result = og_walk_run(walk, value);
    og_call_end(walk);
    og_walk_free(walk);
    return result;
}
