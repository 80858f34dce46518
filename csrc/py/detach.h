/* detach_to_cpu: the state the walk keeps between calls, and the way in for
 * other families. How the walk works is told in detach_walk.h. */
#ifndef OPGUARD_PY_DETACH_H
#define OPGUARD_PY_DETACH_H

#include "py/family.h"

/* What the content of a container type is made of. */
typedef enum og_base {
    OG_BASE_OBJECT, /* attributes only */
    OG_BASE_NAMESPACE,
    OG_BASE_LIST,
    OG_BASE_TUPLE,
    OG_BASE_STRUCTSEQ,
    OG_BASE_DICT,
    OG_BASE_DEFAULTDICT,
    OG_BASE_ORDERED,
    OG_BASE_SET,
    OG_BASE_FROZENSET,
    OG_BASE_DEQUE,
    OG_BASE_PROXY,
    OG_BASE_COUNT, /* those above have a class of their own */
    OG_BASE_ROOT = OG_BASE_COUNT,
    OG_BASE_REMOTE,  /* a tensor on an accelerator */
    OG_BASE_TENSOR,  /* a tensor with attributes */
    OG_BASE_HANDLER, /* taken apart and built by Python functions */
    OG_BASE_USER,    /* register_detach */
    OG_BASE_OPAQUE   /* nothing to look for inside */
} og_base;

/* How values of one type are taken apart and built again. Counted, because a
 * walk may be using it while the cache drops it. */
typedef struct og_shape {
    Py_ssize_t references;
    og_base base;
    bool exact;        /* the base's own class, made without __new__ */
    bool has_dict;     /* instances have a __dict__ */
    bool keep_same;    /* an unchanged one is returned itself */
    PyObject *slots;   /* tuple of member descriptors, or NULL */
    PyObject *handler; /* user's fn, or (expand, build, early); or NULL */
} og_shape;

#define OG_SHAPE_CACHE 256

typedef struct og_shape_entry {
    PyObject *type; /* borrowed, compared only; weak tells if it still lives */
    PyObject *weak; /* owned */
    og_shape *shape;
} og_shape_entry;

/* A getset of the tensor class, called without an attribute look-up. */
typedef struct og_getter {
    PyObject *descriptor;
    descrgetfunc get;
} og_getter;

typedef struct og_detach_state {
    /* classes and what is called on them; filled by exec */
    PyObject *bases[OG_BASE_COUNT];
    PyObject *news[OG_BASE_COUNT]; /* base.__new__ */
    PyObject *call_type; /* the class of a registered function's `detach` */
    PyObject *type_mro, *type_dict; /* descriptors of type */
    PyObject *ordered_items, *ordered_set;
    PyObject *deque_init, *deque_extend, *deque_maxlen, *default_factory;
    /* names */
    PyObject *name_detach, *name_clone, *name_cpu, *name_is_cpu;
    PyObject *name_is_meta, *name_requires_grad, *name_is_inference;
    PyObject *name_base, *name_storage, *name_nbytes, *name_as_subclass;
    /* what Python told: detach_bind */
    PyObject *resolve, *fetch, *inference_mode, *set_grad, *make_subclass;
    PyObject *watched; /* a dict whose growth empties the cache */
    Py_ssize_t watched_size;
    PyObject *registered; /* dict: type -> fn */
    /* of tensor_type, looked up again when another class is bound */
    PyObject *bound; /* the class they are of */
    og_getter cdata, data, requires_grad, is_leaf, base;
    PyObject *is_inference, *clone;
    bool fast; /* all of them are there */
    /* Where in a tensor object its impl lies: the head of detach_leaf.c. */
    Py_ssize_t impl_offset, basic_size;
    int impl_agreed; /* how many told so; -1: they do not agree, ask each */
    int impl_trust;  /* how many may be read before one is asked again */
    og_shape *list_shape, *tuple_shape, *dict_shape;
    og_shape_entry cache[OG_SHAPE_CACHE];
} og_detach_state;

extern const og_family og_detach_family;

/* value with every tensor in it detached and in host memory: a new reference.
 * models is NULL or a tuple of modules; a tensor that is one of their
 * parameters or buffers, or shares one's memory, is copied. copy: copy all.
 * Needs the GIL; runs user code. */
PyObject *
og_detach(struct og_state *state, PyObject *value, PyObject *models,
          bool copy);

#endif
