/* The family of pool_arena.c, pool_arena_device.c and pool_arena_pinned.c: a
 * GPU by its driver, arenas on it, pinned host memory, and events.
 *
 * Every call that may wait lets the GIL go. Of one arena or pinned block one
 * such call runs at a time: a second one is refused, not queued. */
#ifndef OPGUARD_PY_POOL_ARENA_H
#define OPGUARD_PY_POOL_ARENA_H

#include "py/family.h"

#include "core/pool_arena_pinned.h"

typedef struct og_arena_state {
    PyObject *driver_type, *event_type, *arena_type, *pinned_type;
} og_arena_state;

typedef struct DriverObject {
    PyObject_HEAD og_device *device; /* NULL only while it is made */
} DriverObject;

typedef struct PinnedObject {
    PyObject_HEAD DriverObject *driver;
    og_pinned *pinned; /* NULL once it is closed */
    bool busy;
} PinnedObject;

extern const og_family og_arena_family;

/* New types, NULL with an exception. */
PyObject *
og_driver_make_type(PyObject *module);
PyObject *
og_event_make_type(PyObject *module);
PyObject *
og_arena_make_type(PyObject *module);
PyObject *
og_pinned_make_type(PyObject *module);

/* NULL, with MemoryError for OG_NO_MEMORY, ValueError for OG_BAD_ARGUMENT,
 * OSError for OG_NOT_FOUND, else RuntimeError. */
PyObject *
og_arena_raise(const og_error *err);

/* The og_arena_state of the module that made type; borrowed. */
og_arena_state *
og_arena_state_of(PyTypeObject *type);

/* driver, nbytes of the arguments of a constructor of type; borrowed, NULL
 * with an exception. */
DriverObject *
og_arena_arguments(PyTypeObject *type, PyObject *args, PyObject *kwargs,
                   long long *nbytes);

/* Sets *busy; false with RuntimeError where it is set. The caller unsets. */
bool
og_arena_take(bool *busy);

/* The same for a block, with ValueError where it is closed. */
bool
og_pinned_take(PinnedObject *self);

/* Frees what tp_alloc made, after UnTrack and clear. */
void
og_arena_dealloc(PyObject *self);

#endif
