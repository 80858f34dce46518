#ifndef OPGUARD_PY_DETACH_H
#define OPGUARD_PY_DETACH_H

#include "py/family.h"

typedef struct og_detach_state {
    PyObject *unused;
} og_detach_state;

extern const og_family og_detach_family;

#endif
