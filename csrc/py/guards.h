/* The call-time guards: modes entered and left, module modes leased, bodies of
 * generators and coroutines driven step by step.
 *
 * Everything here needs the GIL. A mode is left in the thread that entered it
 * or not at all. */
#ifndef OPGUARD_PY_GUARDS_H
#define OPGUARD_PY_GUARDS_H

#include "py/family.h"

struct og_state;

/* What a guard does to autograd. */
typedef enum og_grad_kind {
    OG_GRAD_AS_IS,
    OG_GRAD_INFERENCE, /* inference mode */
    OG_GRAD_OFF,       /* no_grad */
    OG_GRAD_ON         /* grad, and out of an outer inference mode */
} og_grad_kind;

enum {
    OG_GUARD_DETACH = 1,
    OG_GUARD_SANITIZE = 2,
    OG_GUARD_COLLECT_ON_EXCEPTION = 4,
    OG_GUARD_COLLECT_ON_SUCCESS = 8,
    OG_GUARD_TRAIN = 16
};

/* One change of a module's `training` that a lease has to put back. */
typedef struct og_change {
    PyObject *module; /* owned */
    bool before;
} og_change;

/* One holder of a mode on some modules and all below them. */
typedef struct og_lease {
    struct og_lease *next, *previous; /* oldest first */
    PyObject *roots;                  /* owned tuple of modules */
    og_change *changes;
    size_t count, capacity;
    uint64_t serial; /* later leases have higher ones */
    unsigned long thread;
    bool mode;
} og_lease;

typedef struct og_guards_state {
    PyObject *guard_type, *stepper_type;
    /* bound by Python (bind_guards), or by a test: all owned or NULL */
    PyObject *inference_type; /* enters when made, leaves when released */
    PyObject *is_inference, *set_grad, *is_grad;
    PyObject *module_type, *module_train;
    PyObject
        *autocast; /* (device_type, dtype) -> enter leave suspend resume */
    PyObject *decorate; /* (guard, function) -> wrapper */
    PyObject *release;  /* (devices, collect): after a failure */
    PyObject *measure;  /* (devices) -> memory, which has finish() */
    PyObject *is_oom;   /* (error) -> bool */
    PyObject *await_warning;
    PyObject *running_loop; /* asyncio's, once asyncio has been imported */
    PyObject *name_training, *name_modules, *name_train;
    og_lease *oldest, *newest;
    uint64_t generation;     /* counts registrations and removals of leases */
    PyThread_type_lock lock; /* held while a tree is being switched */
    unsigned long lock_owner;
    int lock_depth;
    struct og_entry *entries; /* all that are entered, the newest first */
    size_t steps;             /* bodies that run a step now, in any thread */
} og_guards_state;

extern const og_family og_guards_family;

/* Modes that are on: what it takes to leave them. All zero is "none". */
typedef struct og_modes {
    PyObject *inference;     /* owned; releasing it leaves the mode */
    PyObject *own;           /* owned; as inference, for the body's own mode */
    PyObject *autocast;      /* owned */
    signed char grad_before; /* what to put back, plus one; 0: nothing */
    signed char inference_before; /* the same, known to steps only */
} og_modes;

/* What a suspended body had switched itself. All zero: nothing yet. */
typedef struct og_own_modes {
    PyObject *shield; /* owned; hides the body's inference mode */
    signed char known, grad, inference;
} og_own_modes;

/* -1 with an exception set and nothing entered. autocast: NULL or a tuple of
 * arguments, borrowed. */
int
og_modes_enter(og_guards_state *guards, og_modes *modes, og_grad_kind kind,
               PyObject *autocast);

/* Leaves what was entered, whatever happens: the first failure is the one that
 * is raised (-1). Any exception under way must have been fetched before. */
int
og_modes_leave(og_guards_state *guards, og_modes *modes);

/* One step's enter: as og_modes_enter, then the body's own modes again. */
int
og_modes_resume(og_guards_state *guards, og_modes *modes, og_own_modes *own,
                og_grad_kind kind, PyObject *autocast);

/* One step's leave where the body goes on later. */
int
og_modes_suspend(og_guards_state *guards, og_modes *modes, og_own_modes *own,
                 og_grad_kind kind);

/* Puts all modules of the tuple roots into train (mode) or eval; a new lease,
 * or NULL with an exception set and nothing changed. */
og_lease *
og_lease_take(og_guards_state *guards, PyObject *roots, bool mode);

/* Puts back what lease changed, or hands that to a lease that needs it; frees
 * lease. -1 with the first exception set; the rest is still put back. */
int
og_lease_return(og_guards_state *guards, og_lease *lease);

int
og_leases_exec(og_guards_state *guards);

void
og_leases_clear(og_guards_state *guards);

/* The settings of a guard, for its steppers. All borrowed. */
typedef struct og_guard_settings {
    PyObject *models;   /* tuple of modules, or NULL */
    PyObject *autocast; /* tuple of arguments, or NULL */
    PyObject *devices;  /* or NULL: all */
    PyObject *keep;     /* tuple of exception types, or NULL */
    og_grad_kind kind;
    int flags;
} og_guard_settings;

og_guard_settings
og_guard_get_settings(PyObject *guard);

/* Sanitizes the exception that is set, and frees what asks for it; leaves it
 * set. handled: what the caller was handling before, borrowed or NULL. */
void
og_guard_failed(struct og_state *state, const og_guard_settings *settings,
                PyObject *handled);

/* The stepper of one body: a new reference. guard and inner are borrowed. */
PyObject *
og_stepper_new(struct og_state *state, PyObject *guard, PyObject *inner,
               bool yields);

int
og_stepper_exec(PyObject *module, struct og_state *state);

#endif
