/* How a type is taken apart: decided once a type, kept by weak reference.
 *
 * The order: what the user registered, tensors, what the type descends from,
 * dataclass and attrs, what Python knows (numpy, pytree), else nothing. Only
 * `type`'s own descriptors are used, never a metaclass's methods. */
#include "py/detach_walk.h"

#include <stdio.h>
#include <string.h>

/* Classes known by name, so that nothing need be imported to know them. */
static const struct {
    const char *module;
    const char *name;
    og_base base;
} known[] = {
    {"torch.nn.modules.module", "Module", OG_BASE_OPAQUE},
    {"enum", "Enum", OG_BASE_OPAQUE},
    {"collections", "UserDict", OG_BASE_OBJECT},
    {"collections", "UserList", OG_BASE_OBJECT},
    {"collections", "ChainMap", OG_BASE_OBJECT},
    {"torch.distributions.distribution", "Distribution", OG_BASE_OBJECT},
    {"torch.distributions.transforms", "Transform", OG_BASE_OBJECT},
    {"transformers.cache_utils", "Cache", OG_BASE_OBJECT},
    {"transformers.cache_utils", "CacheLayerMixin", OG_BASE_OBJECT},
};

og_shape *
og_shape_new(og_base base)
{
    og_shape *shape = PyMem_Calloc(1, sizeof *shape);
    if (shape == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    shape->references = 1;
    shape->base = base;
    return shape;
}

void
og_shape_release(og_shape *shape)
{
    if (--shape->references == 0) {
        Py_XDECREF(shape->slots);
        Py_XDECREF(shape->handler);
        PyMem_Free(shape);
    }
}

static void
entry_clear(og_shape_entry *entry)
{
    og_shape_entry old = *entry;
    *entry = (og_shape_entry){NULL, NULL, NULL};
    if (old.shape != NULL) {
        og_shape_release(old.shape);
    }
    Py_XDECREF(old.weak);
}

void
og_shape_cache_clear(og_detach_state *detach)
{
    for (size_t i = 0; i < OG_SHAPE_CACHE; i++) {
        entry_clear(&detach->cache[i]);
    }
}

static PyObject *
describe(PyObject *descriptor, PyObject *type)
{
    descrgetfunc get =
        (descrgetfunc)PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get);
    return get(descriptor, type, (PyObject *)Py_TYPE(type));
}

/* The type's own namespace has name: 1, 0 or -1; *value new when wanted. */
static int
own_entry(og_detach_state *detach, PyObject *type, const char *name,
          PyObject **value)
{
    PyObject *space = describe(detach->type_dict, type);
    if (space == NULL) {
        return -1;
    }
    PyObject *found = PyMapping_GetItemString(space, name);
    Py_DECREF(space);
    if (found == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_KeyError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    if (value != NULL) {
        *value = found;
    }
    else {
        Py_DECREF(found);
    }
    return 1;
}

/* The base that class `one` of the order stands for; COUNT when for none. */
static int
base_of_class(og_detach_state *detach, PyObject *one, og_base *base)
{
    *base = OG_BASE_COUNT;
    for (int i = OG_BASE_NAMESPACE; i < OG_BASE_COUNT; i++) {
        if (detach->bases[i] == one && i != OG_BASE_STRUCTSEQ) {
            *base = (og_base)i;
            return 0;
        }
    }
    if (one == PyExc_BaseException || one == (PyObject *)&PyType_Type) {
        *base = OG_BASE_OPAQUE;
        return 0;
    }
    if (!(PyType_GetFlags((PyTypeObject *)one) & Py_TPFLAGS_HEAPTYPE)) {
        return 0;
    }
    PyObject *name = PyType_GetName((PyTypeObject *)one);
    PyObject *module = NULL;
    int found =
        name == NULL ? -1 : own_entry(detach, one, "__module__", &module);
    for (size_t i = 0; found == 1 && i < sizeof known / sizeof *known; i++) {
        if (PyUnicode_Check(module) &&
            PyUnicode_CompareWithASCIIString(name, known[i].name) == 0 &&
            PyUnicode_CompareWithASCIIString(module, known[i].module) == 0) {
            *base = known[i].base;
            break;
        }
    }
    Py_XDECREF(name);
    Py_XDECREF(module);
    return found < 0 ? -1 : 0;
}

/* Appends the member descriptors of one class's __slots__. */
static int
add_slots(og_detach_state *detach, PyObject *one, PyObject *slots)
{
    int has = own_entry(detach, one, "__slots__", NULL);
    if (has <= 0) {
        return has;
    }
    PyObject *space = describe(detach->type_dict, one);
    PyObject *values = space == NULL ? NULL : PyMapping_Values(space);
    Py_XDECREF(space);
    if (values == NULL) {
        return -1;
    }
    int result = 0;
    for (Py_ssize_t i = 0; result == 0 && i < PyList_Size(values); i++) {
        PyObject *value = PyList_GetItem(values, i);
        if (Py_TYPE(value) == &PyMemberDescr_Type) {
            result = PyList_Append(slots, value);
        }
    }
    Py_DECREF(values);
    return result;
}

/* What is said on the way through the method resolution order. */
typedef struct verdict {
    og_base base;    /* COUNT: none yet */
    bool fields;     /* dataclass or attrs */
    PyObject *user;  /* borrowed: registered function */
    PyObject *slots; /* owned list */
} verdict;

static int
visit_class(og_detach_state *detach, PyObject *one, verdict *out)
{
    if (out->user == NULL && PyDict_Size(detach->registered) > 0) {
        out->user = PyDict_GetItemWithError(detach->registered, one);
        if (out->user == NULL && PyErr_Occurred()) {
            return -1;
        }
    }
    og_base base;
    if (base_of_class(detach, one, &base) < 0) {
        return -1;
    }
    /* A module or an enumeration stays one, whatever else it descends from */
    if (out->base == OG_BASE_COUNT || base == OG_BASE_OPAQUE) {
        out->base = base;
    }
    if (!(PyType_GetFlags((PyTypeObject *)one) & Py_TPFLAGS_HEAPTYPE)) {
        return 0;
    }
    int dataclass = own_entry(detach, one, "__dataclass_fields__", NULL);
    int attrs = dataclass != 0
                    ? dataclass
                    : own_entry(detach, one, "__attrs_attrs__", NULL);
    if (attrs < 0) {
        return -1;
    }
    out->fields = out->fields || attrs > 0;
    return add_slots(detach, one, out->slots);
}

/* 1 yes, 0 no, -1 error: instances have a __dict__, as value shows. */
static int
has_dict(PyObject *value)
{
    PyObject *dict = PyObject_GenericGetDict(value, NULL);
    if (dict == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return -1;
        }
        PyErr_Clear();
        return 0;
    }
    Py_DECREF(dict);
    return 1;
}

static int
is_frozen(og_detach_state *detach, PyObject *type)
{
    PyObject *params = NULL, *frozen = NULL;
    int found = own_entry(detach, type, "__dataclass_params__", &params);
    if (found <= 0) {
        return found;
    }
    frozen = PyObject_GetAttrString(params, "frozen");
    Py_DECREF(params);
    found = frozen == Py_True;
    if (frozen == NULL) {
        PyErr_Clear(); /* somebody else's params: taken for mutable */
    }
    Py_XDECREF(frozen);
    return found;
}

/* Asks Python: numpy arrays, pytree's registry. */
static int
ask_python(og_detach_state *detach, og_shape *shape, PyObject *type)
{
    shape->base = OG_BASE_OPAQUE;
    if (detach->resolve == NULL) {
        return 0;
    }
    PyObject *handler =
        PyObject_CallFunctionObjArgs(detach->resolve, type, NULL);
    if (handler == NULL) {
        return -1;
    }
    if (handler == Py_None) {
        Py_DECREF(handler);
        return 0;
    }
    if (!PyTuple_Check(handler) || PyTuple_Size(handler) != 3) {
        Py_DECREF(handler);
        PyErr_SetString(PyExc_TypeError,
                        "expected resolve(type) to return None or "
                        "(expand, build, early)");
        return -1;
    }
    shape->base = OG_BASE_HANDLER;
    shape->handler = handler;
    return 0;
}

static int
finish_shape(og_state *state, og_shape *shape, PyObject *value, verdict *out)
{
    og_detach_state *detach = &state->detach;
    PyObject *type = (PyObject *)Py_TYPE(value);
    if (out->user != NULL) {
        shape->base = OG_BASE_USER;
        shape->handler = Py_NewRef(out->user);
        return 0;
    }
    if (state->ops.tensor_type != NULL &&
        PyType_IsSubtype((PyTypeObject *)type,
                         (PyTypeObject *)state->ops.tensor_type)) {
        shape->base = OG_BASE_TENSOR;
    }
    else if (out->base == OG_BASE_OPAQUE) {
        shape->base = OG_BASE_OPAQUE;
        return 0;
    }
    else if (out->base != OG_BASE_COUNT || out->fields) {
        shape->base = out->base == OG_BASE_COUNT ? OG_BASE_OBJECT : out->base;
    }
    else {
        return ask_python(detach, shape, type);
    }
    if (shape->base == OG_BASE_TUPLE) {
        int structseq = own_entry(detach, type, "n_sequence_fields", NULL);
        if (structseq < 0) {
            return -1;
        }
        shape->base = structseq ? OG_BASE_STRUCTSEQ : OG_BASE_TUPLE;
    }
    int dict = has_dict(value);
    int frozen = dict < 0 ? -1 : is_frozen(detach, type);
    if (dict < 0 || frozen < 0) {
        return -1;
    }
    shape->has_dict = dict;
    shape->keep_same =
        shape->base == OG_BASE_TUPLE || shape->base == OG_BASE_STRUCTSEQ ||
        shape->base == OG_BASE_FROZENSET || shape->base == OG_BASE_PROXY ||
        (shape->base == OG_BASE_OBJECT && frozen);
    shape->exact =
        shape->base < OG_BASE_COUNT && detach->bases[shape->base] == type;
    if (PyList_Size(out->slots) > 0) {
        shape->slots = PyList_AsTuple(out->slots);
        return shape->slots == NULL ? -1 : 0;
    }
    return 0;
}

static og_shape *
decide(og_state *state, PyObject *value)
{
    og_detach_state *detach = &state->detach;
    og_shape *shape = NULL;
    verdict out = {.base = OG_BASE_COUNT};
    PyObject *order = describe(detach->type_mro, (PyObject *)Py_TYPE(value));
    out.slots = order == NULL ? NULL : PyList_New(0);
    if (out.slots == NULL) {
        Py_XDECREF(order);
        return NULL;
    }
    int result = 0;
    for (Py_ssize_t i = 0; result == 0 && i < PyTuple_Size(order); i++) {
        result = visit_class(detach, PyTuple_GetItem(order, i), &out);
    }
    if (result == 0) {
        shape = og_shape_new(OG_BASE_OPAQUE);
    }
    if (shape != NULL && finish_shape(state, shape, value, &out) < 0) {
        og_shape_release(shape);
        shape = NULL;
    }
    Py_DECREF(order);
    Py_DECREF(out.slots);
    return shape;
}

og_shape *
og_shape_of(og_state *state, PyObject *value)
{
    og_detach_state *detach = &state->detach;
    PyObject *type = (PyObject *)Py_TYPE(value);
    size_t mask = OG_SHAPE_CACHE - 1;
    size_t first = ((uintptr_t)type >> 5) & mask;
    og_shape_entry *entry = NULL;
    for (size_t probe = 0; probe < 8; probe++) {
        entry = &detach->cache[(first + probe) & mask];
        if (entry->type == type) {
            /* Another type may live where a dead one lived. */
            if (PyWeakref_GetObject(entry->weak) == type) {
                return entry->shape;
            }
            break;
        }
        if (entry->type == NULL) {
            break;
        }
    }
    if (entry->type != NULL && entry->type != type) {
        entry = &detach->cache[first]; /* crowded: the oldest here goes */
    }
    size_t where = (size_t)(entry - detach->cache);
    og_shape *shape = decide(state, value);
    PyObject *weak = shape == NULL ? NULL : PyWeakref_NewRef(type, NULL);
    if (weak == NULL) {
        if (shape != NULL) {
            og_shape_release(shape);
        }
        return NULL;
    }
    /* decide may have run Python, which may have changed the cache, and so
     * may releasing what is there: what comes in comes in last. */
    entry = &detach->cache[where];
    while (entry->type != NULL) {
        entry_clear(entry);
    }
    *entry = (og_shape_entry){type, weak, shape};
    return shape;
}
