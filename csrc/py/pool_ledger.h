/* The family of pool_ledger*.c: the type Ledger, over csrc/core/pool_ledger.h.
 * All need the GIL, which is what excludes calls from each other. */
#ifndef OPGUARD_PY_POOL_LEDGER_H
#define OPGUARD_PY_POOL_LEDGER_H

#include "core/pool_ledger.h"
#include "py/family.h"

typedef struct og_pool_ledger_state {
    PyTypeObject *type, *pool_type, *unit_type, *answer_type;
} og_pool_ledger_state;

extern const og_family og_pool_ledger_family;

/* Borrowed from a `_C.Ledger`, good as long as that lives; NULL with a
 * TypeError for anything else. */
og_ledger *
og_ledger_of(struct og_state *state, PyObject *object);

/* Raises what a core function has put into error; returns NULL. */
OG_COLD PyObject *
og_ledger_raise(const og_error *error);

#endif
