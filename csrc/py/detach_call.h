/* The `detach` that a registered function is given, and the module's own
 * functions' way into the walk. */
#ifndef OPGUARD_PY_DETACH_CALL_H
#define OPGUARD_PY_DETACH_CALL_H

#include "py/detach_walk.h"

/* walk->call, made on first use; borrowed. */
PyObject *
og_call_new(og_walk *walk);
/* After this a `detach` that somebody kept says that its time is over. */
void
og_call_end(og_walk *walk);
/* The type, for the module state: a new reference. */
PyObject *
og_call_type(PyObject *module);

/* Runs a walk whose options are set, and frees what it owns. */
PyObject *
og_detach_walk(og_walk *walk, PyObject *value);

#endif
