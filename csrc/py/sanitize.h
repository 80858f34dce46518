#ifndef OPGUARD_PY_SANITIZE_H
#define OPGUARD_PY_SANITIZE_H

#include "py/family.h"

typedef struct og_sanitize_state {
    PyObject *unused;
} og_sanitize_state;

extern const og_family og_sanitize_family;

#endif
