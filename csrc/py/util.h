/* A small helper the families share. */
#ifndef OPGUARD_PY_UTIL_H
#define OPGUARD_PY_UTIL_H

#include "py/python.h"

/* Interns name into *slot, a new reference; -1 with an exception set. */
int
og_intern(PyObject **slot, const char *name);

#endif
