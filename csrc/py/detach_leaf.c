/* Tensors: which are returned as they are, which detached, which copied.
 *
 * A tensor of exactly the bound class is looked at through cached getsets and
 * the ops library; `.data` detaches it in two thirds of detach()'s time. It
 * does not share the version counter, which nobody needs after a call, and
 * is for the exact class only: subclasses are asked by their methods.
 *
 * The ops library wants the tensor's at::TensorImpl. `_cdata` tells its
 * address, but asking costs as much as all that is then asked of it. The
 * pointer is a member of every tensor object, at a place no interface of
 * torch promises, so the place is learned and never assumed: the one word
 * behind the object's header, and inside its __basicsize__, that is what
 * `_cdata` tells, when sixteen tensors agreed on it. It is read in tensors of
 * exactly the bound class and no other, the first tensor of each walk and one
 * in 64 after it are asked again and compared, and the first surprise (no
 * such word, two of them, another number) ends the reading for good: then
 * each tensor is asked, which is only slower. Binding another class begins
 * anew. */
#include "py/detach_walk.h"

#include <string.h>

static int
bind_getter(PyObject *type, const char *name, og_getter *from)
{
    PyObject *found = PyObject_GetAttrString(type, name);
    Py_CLEAR(from->descriptor);
    from->get = NULL;
    if (found == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    if (Py_TYPE(found) != &PyGetSetDescr_Type) {
        Py_DECREF(found);
        return 0;
    }
    from->descriptor = found;
    from->get = (descrgetfunc)PyType_GetSlot(Py_TYPE(found), Py_tp_descr_get);
    return 1;
}

static int
bind_method(PyObject *type, const char *name, PyObject **method)
{
    PyObject *found = PyObject_GetAttrString(type, name);
    Py_CLEAR(*method);
    *method = found;
    if (found == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
    }
    return 0;
}

static Py_ssize_t
basic_size(PyObject *type)
{
    PyObject *number = PyObject_GetAttrString(type, "__basicsize__");
    Py_ssize_t size = number == NULL ? -1 : PyLong_AsSsize_t(number);
    Py_XDECREF(number);
    return size;
}

int
og_leaf_bind(og_state *state)
{
    og_detach_state *detach = &state->detach;
    PyObject *type = state->ops.tensor_type;
    if (type == detach->bound) {
        return 0;
    }
    const struct {
        const char *name;
        og_getter *from;
    } getters[] = {
        {"_cdata", &detach->cdata},
        {"data", &detach->data},
        {"is_leaf", &detach->is_leaf},
        {"requires_grad", &detach->requires_grad},
        {"_base", &detach->base},
    };
    bool fast = state->ops.table != NULL;
    for (size_t i = 0; i < sizeof getters / sizeof *getters; i++) {
        int found = bind_getter(type, getters[i].name, getters[i].from);
        if (found < 0) {
            return -1;
        }
        fast = fast && found == 1;
    }
    if (bind_method(type, "is_inference", &detach->is_inference) < 0 ||
        bind_method(type, "clone", &detach->clone) < 0) {
        return -1;
    }
    detach->fast =
        fast && detach->is_inference != NULL && detach->clone != NULL;
    detach->impl_offset = 0;
    detach->impl_agreed = 0;
    detach->impl_trust = 0;
    detach->basic_size = basic_size(type);
    if (detach->basic_size < 0) {
        return -1;
    }
    og_shape_cache_clear(detach);
    Py_XDECREF(detach->bound);
    detach->bound = Py_NewRef(type);
    return 0;
}

int
og_walk_plain_mode(og_walk *walk)
{
    og_detach_state *detach = &walk->state->detach;
    if (walk->mode != NULL || detach->inference_mode == NULL) {
        return 0;
    }
    /* Entered by being made, left by being dropped; both set grad mode. */
    walk->mode =
        PyObject_CallFunctionObjArgs(detach->inference_mode, Py_False, NULL);
    PyObject *done =
        walk->mode == NULL
            ? NULL
            : PyObject_CallFunctionObjArgs(detach->set_grad, Py_False, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* --- the impl of a tensor --- */

#define AGREED 16  /* tensors that have to agree on the place first */
#define TRUSTED 64 /* reads there before a tensor is asked again */

static void
learn_impl(og_detach_state *detach, PyObject *tensor, void *impl)
{
    const char *bytes = (const char *)tensor;
    void *word = NULL;
    Py_ssize_t size = (Py_ssize_t)sizeof word, found = 0;
    Py_ssize_t from = (Py_ssize_t)sizeof(PyObject), to = from + 32;
    if (detach->impl_agreed > 0) {
        memcpy(&word, bytes + detach->impl_offset, sizeof word);
        detach->impl_agreed = word != impl ? -1
                              : detach->impl_agreed < AGREED
                                  ? detach->impl_agreed + 1
                                  : AGREED;
        detach->impl_trust = TRUSTED;
        return;
    }
    for (; from <= to && from + size <= detach->basic_size; from += size) {
        memcpy(&word, bytes + from, sizeof word);
        if (word == impl) {
            detach->impl_offset = from;
            found++;
        }
    }
    detach->impl_agreed = found == 1 ? 1 : -1;
}

void *
og_leaf_impl(og_detach_state *detach, PyObject *tensor)
{
    void *impl = NULL;
    bool exact = (PyObject *)Py_TYPE(tensor) == detach->bound;
    if (exact && detach->impl_agreed == AGREED && detach->impl_trust > 0) {
        detach->impl_trust--;
        memcpy(&impl, (const char *)tensor + detach->impl_offset, sizeof impl);
        return impl;
    }
    PyObject *number = detach->cdata.get(detach->cdata.descriptor, tensor,
                                         (PyObject *)Py_TYPE(tensor));
    if (number == NULL) {
        return NULL;
    }
    impl = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    if (exact && impl != NULL && detach->impl_agreed >= 0) {
        learn_impl(detach, tensor, impl);
    }
    return impl;
}

/* --- by methods --- */

static int
truth(PyObject *answer)
{
    int result = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return result;
}

static int
nbytes_differ(og_detach_state *detach, PyObject *tensor)
{
    PyObject *storage =
        PyObject_CallMethodObjArgs(tensor, detach->name_storage, NULL);
    PyObject *whole =
        storage == NULL
            ? NULL
            : PyObject_CallMethodObjArgs(storage, detach->name_nbytes, NULL);
    PyObject *own =
        whole == NULL ? NULL : PyObject_GetAttr(tensor, detach->name_nbytes);
    int same = own == NULL ? -1 : PyObject_RichCompareBool(whole, own, Py_EQ);
    Py_XDECREF(own);
    Py_XDECREF(whole);
    Py_XDECREF(storage);
    if (same >= 0) {
        return !same;
    }
    if (PyErr_ExceptionMatches(PyExc_MemoryError) ||
        !PyErr_ExceptionMatches(PyExc_Exception)) {
        return -1;
    }
    PyErr_Clear(); /* sparse and wrappers: no storage to tell about */
    return 1;
}

/* The copy rule, for a tensor in host memory. */
static int
must_copy(og_walk *walk, PyObject *tensor)
{
    og_detach_state *detach = &walk->state->detach;
    int result = truth(
        PyObject_CallMethodObjArgs(tensor, detach->name_is_inference, NULL));
    if (result != 0) {
        return result;
    }
    PyObject *base = PyObject_GetAttr(tensor, detach->name_base);
    if (base == NULL) {
        return -1;
    }
    result = base != Py_None;
    Py_DECREF(base);
    if (result == 0) {
        result = nbytes_differ(detach, tensor);
    }
    return result != 0 ? result : og_walk_owns(walk, tensor);
}

/* Replaces *tensor, which it owns, by what method gives. */
static int
become(PyObject **tensor, PyObject *method)
{
    PyObject *other = PyObject_CallMethodObjArgs(*tensor, method, NULL);
    Py_DECREF(*tensor);
    *tensor = other;
    return other == NULL ? -1 : 0;
}

/* Gives *tensor, which it owns, the class of source. */
static int
take_class(og_walk *walk, PyObject **tensor, PyObject *source)
{
    og_state *state = walk->state;
    PyObject *type = (PyObject *)Py_TYPE(source), *other = NULL;
    bool parameter =
        state->ops.parameter_type != NULL &&
        PyType_IsSubtype((PyTypeObject *)type,
                         (PyTypeObject *)state->ops.parameter_type);
    if (type == state->ops.parameter_type) {
        other = PyObject_CallFunctionObjArgs(type, *tensor, Py_False, NULL);
    }
    else if ((PyObject *)Py_TYPE(*tensor) == type) {
        return 0;
    }
    else if (parameter && state->detach.make_subclass != NULL) {
        other = PyObject_CallFunctionObjArgs(state->detach.make_subclass, type,
                                             *tensor, Py_False, NULL);
    }
    else {
        other = PyObject_CallMethodObjArgs(
            *tensor, state->detach.name_as_subclass, type, NULL);
    }
    Py_DECREF(*tensor);
    *tensor = other;
    return other == NULL ? -1 : 0;
}

PyObject *
og_leaf_any(og_walk *walk, PyObject *tensor, bool *plain)
{
    og_detach_state *detach = &walk->state->detach;
    PyObject *parameter = walk->state->ops.parameter_type;
    if (og_walk_plain_mode(walk) < 0) {
        return NULL;
    }
    int host = truth(PyObject_GetAttr(tensor, detach->name_is_cpu));
    int meta = host != 0
                   ? host
                   : truth(PyObject_GetAttr(tensor, detach->name_is_meta));
    int grad =
        meta < 0 ? -1
                 : truth(PyObject_GetAttr(tensor, detach->name_requires_grad));
    int copy = grad;
    if (grad >= 0) {
        copy = walk->copy ||
               (parameter != NULL &&
                PyObject_TypeCheck(tensor, (PyTypeObject *)parameter));
    }
    if (copy == 0 && host) {
        copy = must_copy(walk, tensor);
    }
    if (copy < 0) {
        return NULL;
    }
    PyObject *result =
        PyObject_CallMethodObjArgs(tensor, detach->name_detach, NULL);
    *plain = !copy && !grad && (host || meta);
    if (result == NULL ||
        (!host && !meta && become(&result, detach->name_cpu) < 0) ||
        (host && copy && become(&result, detach->name_clone) < 0) ||
        take_class(walk, &result, tensor) < 0) {
        return NULL;
    }
    return result;
}

/* --- on an accelerator --- */

static og_seen
go_far(og_walk *walk, og_node *parent, Py_ssize_t slot, PyObject *tensor)
{
    og_detach_state *detach = &walk->state->detach;
    if (walk->remote_count == walk->remote_room) {
        Py_ssize_t room = walk->remote_room == 0 ? 64 : walk->remote_room * 2;
        og_remote *grown =
            PyMem_Realloc(walk->remotes, (size_t)room * sizeof *grown);
        if (grown == NULL) {
            PyErr_NoMemory();
            return OG_SEEN_ERROR;
        }
        walk->remotes = grown;
        walk->remote_room = room;
    }
    og_node *node = og_node_new(walk, OG_BASE_REMOTE, NULL, tensor);
    if (node == NULL) {
        return OG_SEEN_ERROR;
    }
    node->parent = parent;
    node->slot = slot;
    PyObject *detached =
        PyObject_CallMethodObjArgs(tensor, detach->name_detach, NULL);
    if (detached == NULL) {
        og_blame_note(parent, slot);
        return OG_SEEN_ERROR;
    }
    walk->remotes[walk->remote_count++] = (og_remote){detached, node};
    if (og_memo_insert(&walk->memo, tensor, NULL, node) < 0 ||
        og_node_wait(node, parent, slot) < 0) {
        return OG_SEEN_ERROR;
    }
    walk->parked++; /* nodes stay: this one's parent tells its path */
    return OG_SEEN_WAIT;
}

/* The tensors in host memory, in order: a list, a new reference. */
static PyObject *
fetch_list(og_walk *walk, og_remote *remotes, Py_ssize_t count)
{
    og_detach_state *detach = &walk->state->detach;
    PyObject *far = PyList_New(count), *near = NULL;
    for (Py_ssize_t i = 0; far != NULL && i < count; i++) {
        (void)PyList_SetItem(far, i, Py_NewRef(remotes[i].tensor));
    }
    if (far == NULL || detach->fetch != NULL) {
        near = far == NULL
                   ? NULL
                   : PyObject_CallFunctionObjArgs(detach->fetch, far, NULL);
        Py_XDECREF(far);
        /* A list of ours: nobody shortens it while it is dealt out. */
        PyObject *own = near == NULL ? NULL : PySequence_List(near);
        Py_XDECREF(near);
        if (own != NULL && PyList_Size(own) != count) {
            Py_CLEAR(own);
            PyErr_SetString(PyExc_TypeError,
                            "expected fetch to return as many tensors");
        }
        return own;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *one = PyObject_CallMethodObjArgs(remotes[i].tensor,
                                                   detach->name_cpu, NULL);
        if (one == NULL || PyList_SetItem(far, i, one) < 0) {
            Py_DECREF(far);
            return NULL;
        }
    }
    return far;
}

int
og_walk_fetch(og_walk *walk)
{
    og_remote *remotes = walk->remotes;
    Py_ssize_t count = walk->remote_count;
    walk->remotes = NULL;
    walk->remote_count = walk->remote_room = 0;
    int result = og_walk_plain_mode(walk);
    PyObject *near = result < 0 ? NULL : fetch_list(walk, remotes, count);
    result = near == NULL ? -1 : 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        og_node *node = remotes[i].node;
        if (result == 0) {
            PyObject *one = Py_NewRef(PyList_GetItem(near, i));
            bool parameter = (PyObject *)Py_TYPE(node->source) ==
                             walk->state->ops.parameter_type;
            if (parameter) {
                result = take_class(walk, &one, node->source);
            }
            if (result == 0) {
                result = og_node_complete(walk, node, one);
                walk->parked--;
            }
            Py_XDECREF(one);
        }
        Py_DECREF(remotes[i].tensor);
    }
    PyMem_Free(remotes);
    Py_XDECREF(near);
    return result;
}

/* --- the exact class --- */

static inline PyObject *
get(const og_getter *from, PyObject *tensor)
{
    return from->get(from->descriptor, tensor, (PyObject *)Py_TYPE(tensor));
}

static int
is_inference(og_detach_state *detach, PyObject *tensor)
{
    return truth(
        PyObject_CallFunctionObjArgs(detach->is_inference, tensor, NULL));
}

/* The copy rule again, from the inside; whole: it fills its storage. */
static int
fast_must_copy(og_walk *walk, PyObject *tensor, bool whole, bool *grad)
{
    og_detach_state *detach = &walk->state->detach;
    if (walk->copy || !whole ||
        (PyObject *)Py_TYPE(tensor) == walk->state->ops.parameter_type) {
        return 1;
    }
    PyObject *answer = get(&detach->requires_grad, tensor);
    int result = 1;
    if (answer == NULL) {
        return -1;
    }
    *grad = answer == Py_True;
    Py_DECREF(answer);
    if (*grad) {
        /* What autograd made is no inference tensor; asking is dearer. */
        answer = get(&detach->is_leaf, tensor);
        if (answer == NULL) {
            return -1;
        }
        result = answer == Py_True;
        Py_DECREF(answer);
    }
    if (result) {
        result = is_inference(detach, tensor);
        if (result != 0) {
            return result;
        }
    }
    answer = get(&detach->base, tensor);
    if (answer == NULL) {
        return -1;
    }
    result = answer != Py_None;
    Py_DECREF(answer);
    return result || walk->models == NULL ? result
                                          : og_walk_owns(walk, tensor);
}

static PyObject *
fast_leaf(og_walk *walk, PyObject *tensor, bool whole)
{
    og_detach_state *detach = &walk->state->detach;
    bool grad = false;
    int copy = fast_must_copy(walk, tensor, whole, &grad);
    if (copy < 0) {
        return NULL;
    }
    if (copy == 0) {
        return grad ? get(&detach->data, tensor) : Py_NewRef(tensor);
    }
    if (og_walk_plain_mode(walk) < 0) {
        return NULL;
    }
    PyObject *made = PyObject_CallFunctionObjArgs(detach->clone, tensor, NULL);
    if (made != NULL &&
        (PyObject *)Py_TYPE(tensor) == walk->state->ops.parameter_type) {
        (void)take_class(walk, &made, tensor);
    }
    return made;
}

/* Not when it is all there is, nor when only a plain container and the
 * snapshot of that hold it, and nobody else can take it out of there: a
 * mappingproxy, a view of an array or a registered function would meet it by
 * another way and must find what it became. */
static bool
may_come_again(const og_walk *walk, const og_node *node, PyObject *tensor)
{
    if (node->base == OG_BASE_ROOT) {
        return node->parent != NULL;
    }
    if (Py_REFCNT(tensor) > 2 || node->base < OG_BASE_LIST ||
        node->base > OG_BASE_DICT || !node->shape->exact) {
        return true;
    }
    /* Its place, the snapshot of that, its node and the memo hold it. */
    if (Py_REFCNT(node->source) <= 4) {
        return false;
    }
    bool outermost = node->parent != NULL && node->parent->parent == NULL;
    return !outermost || node->base == OG_BASE_DICT ||
           PyDict_Size(walk->state->detach.registered) > 0;
}

og_seen
og_leaf_exact(og_walk *walk, og_node *node, Py_ssize_t slot, PyObject *tensor,
              PyObject **value)
{
    og_detach_state *detach = &walk->state->detach;
    const og_ops *table = walk->state->ops.table;
    int64_t storage = 0, elements = 0;
    int32_t device = 0;
    PyObject *made = NULL;
    bool fast = false;
    if (detach->fast) {
        void *impl = og_leaf_impl(detach, tensor);
        if (impl == NULL && PyErr_Occurred()) {
            return OG_SEEN_ERROR;
        }
        fast = impl != NULL && table->tensor_extent(impl, &storage, &elements,
                                                    &device) == OG_OK;
    }
    if (fast && device == table->device_type_cpu) {
        if (walk->far) {
            return go_far(walk, node, slot, tensor);
        }
        made = fast_leaf(walk, tensor, storage == elements);
    }
    else {
        int near = truth(PyObject_GetAttr(tensor, detach->name_is_cpu));
        if (near == 0) {
            near = truth(PyObject_GetAttr(tensor, detach->name_is_meta));
        }
        if (near < 0) {
            og_blame_note(node, slot);
            return OG_SEEN_ERROR;
        }
        if (near == 0 || walk->far) {
            return go_far(walk, node, slot, tensor);
        }
        bool plain = false;
        made = og_leaf_any(walk, tensor, &plain);
        if (made != NULL && plain) {
            Py_DECREF(made);
            made = Py_NewRef(tensor);
        }
    }
    if (made == NULL) {
        og_blame_note(node, slot);
        return OG_SEEN_ERROR;
    }
    if (may_come_again(walk, node, tensor) &&
        og_memo_insert(&walk->memo, tensor, made, NULL) < 0) {
        Py_DECREF(made);
        return OG_SEEN_ERROR;
    }
    *value = made;
    return OG_SEEN_DONE;
}
