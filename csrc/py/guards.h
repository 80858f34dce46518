#ifndef OPGUARD_PY_GUARDS_H
#define OPGUARD_PY_GUARDS_H

#include "py/family.h"

typedef struct og_guards_state {
    PyObject *unused;
} og_guards_state;

extern const og_family og_guards_family;

#endif
