/* Leases on models that a pool moves: who asks, what is counted, and how it
 * is given back whatever happens.
 *
 * Parts: pool_owner.c who the caller is, pool_seat.c what the leases of one
 * user share and the two steps that count, pool_lease.c the `with` block,
 * pool_caller.c where it stands, pool_forward.c a callable that runs inside a
 * lease. All need the GIL. */
#ifndef OPGUARD_PY_POOL_LEASE_H
#define OPGUARD_PY_POOL_LEASE_H

#include "core/pool_ledger.h"
#include "py/family.h"

struct og_state;

/* The units of a seat at one time, shared by the leases taken then. */
typedef struct og_pool_units {
    size_t uses, count;
    int64_t ids[];
} og_pool_units;

typedef struct SeatObject {
    PyObject_HEAD PyObject *ledger_object;
    og_ledger *ledger; /* of ledger_object */
    PyObject *units_object;
    og_pool_units *units;
    PyObject *enter_slow, *leave_slow, *enter_async; /* or NULL */
    PyObject *weak_list;
    Py_ssize_t leases;
    bool slow; /* every lease is asked for by enter_slow */
} SeatObject;

/* One entry of a `with` block; owned by its lease. */
typedef struct og_pool_entry og_pool_entry;

/* A thread or task. Its leases keep it alive, contexts hold it otherwise. */
typedef struct OwnerObject {
    PyObject_HEAD PyObject *ledger_object;
    og_ledger *ledger;
    int64_t id;
    unsigned long thread;       /* its ident, which a later one may have */
    int64_t thread_number;      /* no other thread ever has it */
    PyObject *task;             /* a weak reference, or NULL */
    struct OwnerObject *beside; /* the same one in another ledger, owned */
    struct OwnerObject *older, *newer; /* of all that are alive */
    og_pool_entry *entries;            /* newest first */
    PyObject *weak_list;
} OwnerObject;

/* One counted lease. All owned; all NULL: none. */
typedef struct og_pool_hold {
    SeatObject *seat;
    OwnerObject *owner;
    og_pool_units *units;
    og_pool_extra *extra; /* or NULL */
    size_t extra_count;
} og_pool_hold;

struct og_pool_entry {
    og_pool_entry *below;           /* of the same lease */
    og_pool_entry *next, *previous; /* of the same owner */
    og_pool_hold hold;
    PyObject *code; /* where the `with` stands; or NULL */
    int place;      /* in code */
};

typedef struct og_pool_lease_state {
    PyObject *seat_type, *lease_type, *owner_type, *forward_type;
    PyObject *done_type;
    PyObject *owner_get, *owner_set;       /* of the one context variable */
    PyObject *running_loop, *current_task; /* once asyncio was imported */
    PyObject *generator, *coroutine, *async_generator; /* types */
    PyObject *method;                                  /* type */
    PyObject *place_name;                              /* interned */
    PyObject *last_code; /* asked for a lease last, and is not of the pools */
    OwnerObject *owners; /* newest first */
} og_pool_lease_state;

extern const og_family og_pool_lease_family;

/* The owner of the caller in this ledger: a new reference. */
OwnerObject *
og_pool_owner_now(struct og_state *state, PyObject *ledger_object,
                  og_ledger *ledger);

/* 1: hold is a counted lease. 0: it names who asks and for what, nothing is
 * counted. -1 with an exception set, hold is empty. */
int
og_pool_try(struct og_state *state, SeatObject *seat, og_pool_hold *hold);

/* Where og_pool_try gave 0: waits or loads. 0: counted; -1, and hold is empty.
 * timeout: borrowed, NULL is None. */
OG_COLD int
og_pool_wait(PyObject *timeout, og_pool_hold *hold);

/* Fills the extra of a hold from what a slow road gave, None or a tuple of
 * (pool, bytes). */
int
og_pool_read_extra(PyObject *given, og_pool_hold *hold);

/* Gives a counted lease back and empties hold. -1: it was given back, and who
 * waits could not be told, with an exception set. */
int
og_pool_give(og_pool_hold *hold);

/* One use less; NULL allowed. */
void
og_pool_units_drop(og_pool_units *units);

/* Lets go of the references alone. */
void
og_pool_hold_drop(og_pool_hold *hold);

/* The code that runs in this thread and is not of the pools, a new reference,
 * and where in it. NULL without an exception where there is none. */
PyObject *
og_pool_caller(og_pool_lease_state *lease, int *place);

/* The line of a place in code, 0 where it has none; -1 with an exception. */
int
og_pool_line(PyObject *code, int place);

/* An awaitable whose answer is value: a new reference. */
PyObject *
og_pool_done(struct og_state *state, PyObject *value);

int
og_pool_seat_exec(PyObject *module, struct og_state *state);

int
og_pool_owner_exec(PyObject *module, struct og_state *state);

int
og_pool_done_exec(PyObject *module, struct og_state *state);

int
og_pool_lease_exec(PyObject *module, struct og_state *state);

int
og_pool_forward_exec(PyObject *module, struct og_state *state);

/* pool_owners and pool_owner of the module. */
extern PyMethodDef og_pool_owner_methods[];

#endif
