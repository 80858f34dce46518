/* The guard object, shared by the files that implement it: guards.c (the
 * type), guards_entry.c (entering and leaving) and guards_call.c (what it
 * calls). Private to them. All need the GIL. */
#ifndef OPGUARD_PY_GUARDS_OBJECT_H
#define OPGUARD_PY_GUARDS_OBJECT_H

#include "py/guards.h"
#include "py/state.h"

typedef struct og_entry {
    struct og_entry *below;
    og_modes modes;
    og_lease *lease;
    PyObject *handled; /* what the caller was handling, or NULL */
    PyObject *ran;     /* a list that an event loop adds to, or NULL */
    PyObject *handle;  /* the loop's handle of that */
    PyObject *memory;
    unsigned long thread;
    struct og_entry *older; /* of all guards and threads; see state */
    struct og_late *late;
    bool in_step;
} og_entry;

typedef struct {
    PyObject_HEAD og_entry *top;
    PyObject *models, *autocast, *devices, *caller, *on_oom, *keep;
    PyObject *memory;
    PyObject *weak_list;
    og_grad_kind kind;
    int flags;
} GuardObject;

/* Keeps the exception that is set across what may set another. */
typedef struct saved_error {
    PyObject *type, *value, *trace;
} saved_error;

static inline og_state *
og_guard_state(GuardObject *self)
{
    return (og_state *)PyType_GetModuleState(Py_TYPE((PyObject *)self));
}

/* A new entry with the modes on, or NULL with an exception set and nothing
 * entered. watch: notice an event loop that runs meanwhile. */
og_entry *
og_guard_enter(GuardObject *self, og_state *state, bool watch);

/* Leaves without an exception of the user's, frees entry: failures are raised
 * (-1). */
int
og_guard_exit_clean(GuardObject *self, og_state *state, og_entry *entry);

/* Leaves with the exception that is set, which stays set; frees entry. */
void
og_guard_exit_failed(GuardObject *self, og_state *state, og_entry *entry);

/* Leaves whatever a guard that is dropped is still in. */
void
og_guard_abandon(GuardObject *self);

/* The entry of this thread, unlinked when take; NULL without exception. */
og_entry *
og_guard_own_entry(GuardObject *self, bool take);

/* Begins to measure memory for entry where it has not begun. */
int
og_guard_measure(GuardObject *self, og_guards_state *guards, og_entry *entry);

/* Waits for the devices and gives back what they cache; never raises. */
void
og_guard_release(og_state *state, const og_guard_settings *settings,
                 bool collect);

/* callable(*args, **kwargs), again as on_oom says: a new reference. */
PyObject *
og_guard_call_again(GuardObject *self, og_state *state, PyObject *callable,
                    PyObject *args, PyObject *kwargs);

/* Steals value (NULL allowed); detached when the guard says so. */
PyObject *
og_guard_detach_result(GuardObject *self, og_state *state, PyObject *value,
                       PyObject *models);

/* g(...) inside its `with`, and outside it, where it decorates. */
PyObject *
og_guard_call_entered(GuardObject *self, og_state *state, PyObject *args,
                      PyObject *kwargs);

PyObject *
og_guard_decorate(GuardObject *self, og_state *state, PyObject *args,
                  PyObject *kwargs);

#endif
