/* The state of one opguard._C module: everything that holds a PyObject. */
#ifndef OPGUARD_PY_STATE_H
#define OPGUARD_PY_STATE_H

#include "py/detach.h"
#include "py/files.h"
#include "py/flags.h"
#include "py/guards.h"
#include "py/ops.h"
#include "py/pool_arena.h"
#include "py/pool_lease.h"
#include "py/pool_ledger.h"
#include "py/pool_pages.h"
#include "py/sanitize.h"

typedef struct og_state {
    og_ops_state ops;
    og_sanitize_state sanitize;
    og_detach_state detach;
    og_guards_state guards;
    og_flags_state flags;
    og_arena_state arena;
    og_pool_ledger_state pool_ledger;
    og_pool_lease_state pool_lease;
} og_state;

/* Borrowed; module is an opguard._C. Never NULL after exec. */
static inline og_state *
og_state_get(PyObject *module)
{
    return (og_state *)PyModule_GetState(module);
}

#endif
