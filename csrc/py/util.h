/* Small helpers of the Python layer: raising what a lower layer reported. */
#ifndef OPGUARD_PY_UTIL_H
#define OPGUARD_PY_UTIL_H

#include "py/python.h"

/* Sets the Python exception that err stands for (MemoryError, ValueError or
 * RuntimeError); returns NULL so that callers can return it. */
PyObject *
og_raise(const og_error *err);

/* Interns name into *slot, a new reference; -1 with an exception set. */
int
og_intern(PyObject **slot, const char *name);

#endif
