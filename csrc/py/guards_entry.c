/* A guard's entries: modes on, modes off, and what happens to an exception
 * that leaves. Leaving always puts the modes back first, and a failure while
 * leaving never takes the place of the user's exception. */
#include "py/guards_object.h"

void
og_guard_release(og_state *state, const og_guard_settings *settings,
                 bool collect)
{
    if (state->guards.release == NULL) {
        return;
    }
    PyObject *done = PyObject_CallFunctionObjArgs(
        state->guards.release,
        settings->devices == NULL ? Py_None : settings->devices,
        collect ? Py_True : Py_False, NULL);
    if (done == NULL) {
        PyErr_WriteUnraisable(state->guards.release);
    }
    Py_XDECREF(done);
}

void
og_guard_failed(og_state *state, const og_guard_settings *settings,
                PyObject *handled)
{
    PyObject *type, *value, *trace;
    if (PyErr_Occurred() == NULL) {
        /* Out of memory, CPython may lose the exception of a frame. */
        PyErr_NoMemory();
    }
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (trace != NULL) {
        (void)PyException_SetTraceback(value, trace);
    }
    Py_CLEAR(trace);
    if (settings->flags & OG_GUARD_SANITIZE) {
        og_sanitize_exit(state, value, handled, settings->keep);
    }
    trace = PyException_GetTraceback(value);
    og_guard_release(state, settings,
                     (settings->flags & OG_GUARD_COLLECT_ON_EXCEPTION) != 0);
    PyErr_Restore(type, value, trace);
}

/* --- entering and leaving ------------------------------------------------ */

static void
free_entry(og_entry *entry)
{
    Py_XDECREF(entry->handled);
    Py_XDECREF(entry->ran);
    Py_XDECREF(entry->handle);
    Py_XDECREF(entry->memory);
    PyMem_Free(entry);
}

/* An event loop that runs in this thread is asked for a turn: if it has come
 * before the exit, other tasks ran under this guard's modes. */
static int
watch_loop(og_guards_state *guards, og_entry *entry)
{
    if (guards->running_loop == NULL) {
        PyObject *modules = PyImport_GetModuleDict();
        PyObject *asyncio = PyDict_GetItemString(modules, "_asyncio");
        if (asyncio == NULL) {
            return 0;
        }
        guards->running_loop =
            PyObject_GetAttrString(asyncio, "_get_running_loop");
        if (guards->running_loop == NULL) {
            return -1;
        }
    }
    PyObject *loop = PyObject_CallNoArgs(guards->running_loop);
    if (loop == NULL || loop == Py_None) {
        Py_XDECREF(loop);
        return loop == NULL ? -1 : 0;
    }
    PyObject *append = NULL;
    entry->ran = PyList_New(0);
    if (entry->ran != NULL) {
        append = PyObject_GetAttrString(entry->ran, "append");
    }
    if (append != NULL) {
        entry->handle =
            PyObject_CallMethod(loop, "call_soon", "OO", append, Py_None);
    }
    Py_XDECREF(append);
    Py_DECREF(loop);
    return entry->handle == NULL ? -1 : 0;
}

int
og_guard_measure(GuardObject *self, og_guards_state *guards, og_entry *entry)
{
    if (guards->measure == NULL || entry->memory != NULL) {
        return 0;
    }
    entry->memory = PyObject_CallFunctionObjArgs(
        guards->measure, self->devices == NULL ? Py_None : self->devices,
        NULL);
    if (entry->memory == NULL) {
        return -1;
    }
    PyObject *old = self->memory;
    self->memory = Py_NewRef(entry->memory);
    Py_XDECREF(old);
    return 0;
}

/* Modes of an entry that was left before one entered after it. */
typedef struct og_late {
    og_modes modes;
    struct og_late *next;
} og_late;

static bool
has_modes(const og_entry *entry)
{
    return entry->modes.inference != NULL || entry->modes.autocast != NULL ||
           entry->modes.grad_before != 0;
}

/* Takes entry off the list; returns the one of its thread whose modes lie
 * directly above its own, or NULL. Modes that steps of a body have set aside
 * meanwhile are in no such order. */
static og_entry *
unlink_entry(og_guards_state *guards, og_entry *entry)
{
    og_entry *above = NULL;
    og_entry **at = &guards->entries;
    for (; *at != NULL && *at != entry; at = &(*at)->older) {
        if ((*at)->thread == entry->thread && !(*at)->in_step &&
            has_modes(*at)) {
            above = *at;
        }
    }
    if (*at == NULL) {
        return NULL;
    }
    *at = entry->older;
    return entry->in_step ? NULL : above;
}

/* torch's modes are put back by what each remembers from its entry, so they
 * must be left from the top: what is left earlier waits for what is above. */
static bool
leave_later(og_entry *entry, og_entry *above)
{
    og_late **end = &above->late;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    if (has_modes(entry)) {
        og_late *late = PyMem_Malloc(sizeof *late);
        if (late == NULL) {
            return false;
        }
        *late = (og_late){entry->modes, NULL};
        entry->modes = (og_modes){NULL, NULL, NULL, 0, 0};
        *end = late;
        end = &late->next;
    }
    *end = entry->late;
    entry->late = NULL;
    return true;
}

static int
leave_modes(og_guards_state *guards, og_entry *entry)
{
    og_entry *above = unlink_entry(guards, entry);
    if (above != NULL && leave_later(entry, above)) {
        return 0;
    }
    int result = og_modes_leave(guards, &entry->modes);
    while (entry->late != NULL) {
        saved_error first;
        og_late *late = entry->late;
        entry->late = late->next;
        PyErr_Fetch(&first.type, &first.value, &first.trace);
        if (og_modes_leave(guards, &late->modes) < 0) {
            PyErr_WriteUnraisable(guards->guard_type);
        }
        PyErr_Restore(first.type, first.value, first.trace);
        PyMem_Free(late);
    }
    return result;
}

/* Leaves modes and leases. 0, or -1 with the first exception set. */
static int
leave(og_guards_state *guards, og_entry *entry)
{
    int result = leave_modes(guards, entry);
    if (entry->lease != NULL) {
        saved_error first = {NULL, NULL, NULL};
        PyErr_Fetch(&first.type, &first.value, &first.trace);
        og_lease *lease = entry->lease;
        entry->lease = NULL;
        if (og_lease_return(guards, lease) < 0) {
            result = -1;
            if (first.type != NULL) {
                PyErr_WriteUnraisable(guards->guard_type);
            }
            else {
                return -1;
            }
        }
        PyErr_Restore(first.type, first.value, first.trace);
    }
    return result;
}

/* A new entry in the modes, or NULL with an exception set. */
og_entry *
og_guard_enter(GuardObject *self, og_state *state, bool watch)
{
    og_guards_state *guards = &state->guards;
    og_entry *entry = PyMem_Calloc(1, sizeof *entry);
    if (entry == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    entry->thread = PyThread_get_thread_ident();
    entry->handled = PyErr_GetHandledException();
    if (self->devices != NULL && watch &&
        og_guard_measure(self, guards, entry) < 0) {
        goto failed;
    }
    if (self->models != NULL) {
        entry->lease = og_lease_take(guards, self->models,
                                     (self->flags & OG_GUARD_TRAIN) != 0);
        if (entry->lease == NULL) {
            goto failed;
        }
    }
    if (watch && watch_loop(guards, entry) < 0) {
        goto failed;
    }
    if (og_modes_enter(guards, &entry->modes, self->kind, self->autocast) <
        0) {
        goto failed;
    }
    entry->in_step = guards->steps > 0;
    entry->older = guards->entries;
    guards->entries = entry;
    return entry;
failed:;
    saved_error error;
    PyErr_Fetch(&error.type, &error.value, &error.trace);
    if (leave(guards, entry) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    PyErr_Restore(error.type, error.value, error.trace);
    free_entry(entry);
    return NULL;
}

/* The entry of this thread, unlinked when take; NULL without exception. */
og_entry *
og_guard_own_entry(GuardObject *self, bool take)
{
    unsigned long thread = PyThread_get_thread_ident();
    for (og_entry **at = &self->top; *at != NULL; at = &(*at)->below) {
        og_entry *entry = *at;
        if (entry->thread == thread) {
            if (take) {
                *at = entry->below;
            }
            return entry;
        }
    }
    return NULL;
}

/* Whether the event loop had a turn; the request for one is taken back. */
static bool
loop_ran(og_entry *entry)
{
    bool ran = entry->ran != NULL && PyList_Size(entry->ran) > 0;
    if (entry->handle != NULL && !ran) {
        PyObject *done = PyObject_CallMethod(entry->handle, "cancel", NULL);
        if (done == NULL) {
            PyErr_WriteUnraisable(entry->handle);
        }
        Py_XDECREF(done);
    }
    return ran;
}

static int
warn_await(const og_guards_state *guards)
{
    PyObject *category = guards->await_warning == NULL ? PyExc_RuntimeWarning
                                                       : guards->await_warning;
    return PyErr_WarnEx(
        category,
        "expected no await inside `with` of a guard, the event loop ran other "
        "work there under its modes; decorate the coroutine with the guard "
        "instead",
        1);
}

static int
finish_memory(og_entry *entry)
{
    if (entry->memory == NULL) {
        return 0;
    }
    PyObject *done = PyObject_CallMethod(entry->memory, "finish", NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Leaving without an exception of the user's: failures are raised. */
int
og_guard_exit_clean(GuardObject *self, og_state *state, og_entry *entry)
{
    bool ran = loop_ran(entry);
    int result = leave(&state->guards, entry);
    if (result == 0) {
        result = finish_memory(entry);
    }
    if (result == 0 && (self->flags & OG_GUARD_COLLECT_ON_SUCCESS)) {
        og_guard_settings settings = og_guard_get_settings((PyObject *)self);
        og_guard_release(state, &settings, true);
    }
    free_entry(entry);
    if (result == 0 && ran) {
        result = warn_await(&state->guards);
    }
    return result;
}

/* Leaving with the exception that is set, which stays set. */
void
og_guard_exit_failed(GuardObject *self, og_state *state, og_entry *entry)
{
    saved_error error;
    PyErr_Fetch(&error.type, &error.value, &error.trace);
    bool ran = loop_ran(entry);
    if (leave(&state->guards, entry) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    if (ran && warn_await(&state->guards) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    PyErr_Restore(error.type, error.value, error.trace);
    og_guard_settings settings = og_guard_get_settings((PyObject *)self);
    og_guard_failed(state, &settings, entry->handled);
    PyErr_Fetch(&error.type, &error.value, &error.trace);
    if (finish_memory(entry) < 0) {
        PyErr_WriteUnraisable((PyObject *)self);
    }
    free_entry(entry);
    PyErr_Restore(error.type, error.value, error.trace);
}

/* A guard dropped while entered: its modes are left where this thread had
 * entered them; those of another thread stay, and their objects with them. */
void
og_guard_abandon(GuardObject *self)
{
    og_guards_state *guards = &og_guard_state(self)->guards;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    og_entry *entry;
    while ((entry = self->top) != NULL) {
        self->top = entry->below;
        if (entry->thread != PyThread_get_thread_ident()) {
            entry->modes = (og_modes){NULL, NULL, NULL, 0, 0};
            entry->late = NULL;
        }
        (void)loop_ran(entry);
        if (leave(guards, entry) < 0) {
            PyErr_WriteUnraisable(NULL);
        }
        free_entry(entry);
    }
    PyErr_Restore(type, value, trace);
}
