/* Copies of containers without the tensors in them. */
#ifndef OPGUARD_PY_SANITIZE_COPY_H
#define OPGUARD_PY_SANITIZE_COPY_H

#include "py/sanitize_walk.h"

/* A new reference: value itself when nothing in it is to be replaced, else a
 * copy in which tensors are TensorSummary, other objects that hold tensors
 * ObjectSummary, and tracebacks empty; shared parts stay shared, cycles stay
 * cycles, value is not changed. Exceptions in it join the walk's queue. NULL
 * with an exception set. */
PyObject *
og_copy_value(og_walk *walk, PyObject *value);

/* A new list of the member descriptors (slots of a class, C members) of an
 * object's type and its bases; NULL with an exception set. */
PyObject *
og_members_of(og_state *state, PyObject *object);

/* descr.__get__(object), NULL with nothing set when unset; and __set__, which
 * leaves nothing set either. No override in a subclass is called. */
PyObject *
og_descr_get(PyObject *descr, PyObject *object);
void
og_descr_set(PyObject *descr, PyObject *object, PyObject *value);

/* Is a tensor reachable from object's own state? Bounded; runs no code. */
bool
og_reaches_tensor(og_state *state, PyObject *object);

#endif
