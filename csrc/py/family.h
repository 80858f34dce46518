/* A family is what one folder-mate of module.c adds to opguard._C: functions,
 * perhaps types, and its part of the module state.
 *
 * A family's state is a struct of its own, kept in og_state; its members are
 * owned references or plain C data, all zero before exec. */
#ifndef OPGUARD_PY_FAMILY_H
#define OPGUARD_PY_FAMILY_H

#include "py/python.h"

struct og_state;

typedef struct og_family {
    PyMethodDef *methods; /* ends with a zero entry; may be NULL */
    /* Each may be NULL. exec returns -1 with an exception set and leaves what
     * it had made to clear; clear may run twice. */
    int (*exec)(PyObject *module, struct og_state *state);
    int (*traverse)(struct og_state *state, visitproc visit, void *arg);
    int (*clear)(struct og_state *state);
} og_family;

#endif
