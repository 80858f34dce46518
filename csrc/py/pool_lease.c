/* opguard._C.Lease: `with` and `async with` around what uses a model.
 *
 * Entering and leaving are C, so that no signal comes between the count and
 * the block. Each entry is a record of its own: one lease may be entered
 * again while it is entered. A lease that dies gives back what is left. */
#include "py/pool_ledger.h"
#include "py/pool_lease.h"
#include "py/state.h"
#include "py/util.h"

#include <structmember.h>

typedef struct {
    PyObject_HEAD SeatObject *seat;
    PyObject *value, *timeout, *after;
    PyObject *code; /* where enter_async was asked; or NULL */
    int place;
    og_pool_entry *top;
    Py_ssize_t ended; /* entries that the collector ended before their block */
    bool ending;      /* it ends them now, whose ever they are */
    PyObject *weak_list;
} LeaseObject;

static og_state *
state_of(PyObject *object)
{
    return (og_state *)PyType_GetModuleState(Py_TYPE(object));
}

/* --- entering and leaving ------------------------------------------------ */

/* Steals hold and code. */
static void
push(LeaseObject *self, og_pool_entry *entry, og_pool_hold *hold,
     PyObject *code, int place)
{
    entry->hold = *hold;
    entry->code = code;
    entry->place = place;
    entry->below = self->top;
    self->top = entry;
    OwnerObject *owner = hold->owner;
    entry->previous = NULL;
    entry->next = owner->entries;
    if (owner->entries != NULL) {
        owner->entries->previous = entry;
    }
    owner->entries = entry;
    *hold = (og_pool_hold){0};
}

/* Where the link to the entry is that is left: the newest of who leaves, of
 * several; else the newest of all, for any thread may leave. It may be gone:
 * to look who leaves may run any code. */
static og_pool_entry **
find_leaving(LeaseObject *self)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    SeatObject *seat = self->top->hold.seat;
    Py_INCREF((PyObject *)seat);
    OwnerObject *owner = og_pool_owner_now(state_of((PyObject *)self),
                                           seat->ledger_object, seat->ledger);
    Py_DECREF((PyObject *)seat);
    Py_XDECREF((PyObject *)owner);     /* its entries keep it alive */
    PyErr_Restore(type, value, trace); /* who leaves must have left */
    og_pool_entry **at = &self->top;
    while (*at != NULL && (*at)->hold.owner != owner) {
        at = &(*at)->below;
    }
    return *at == NULL ? &self->top : at;
}

/* Gives an entry back: as og_pool_give. */
static int
pop(og_pool_entry **link)
{
    og_pool_entry *entry = *link;
    *link = entry->below;
    if (entry->next != NULL) {
        entry->next->previous = entry->previous;
    }
    if (entry->previous != NULL) {
        entry->previous->next = entry->next;
    }
    else {
        entry->hold.owner->entries = entry->next;
    }
    og_pool_hold hold = entry->hold;
    PyObject *code = entry->code;
    PyMem_Free(entry);
    int result = og_pool_give(&hold);
    if (code != NULL) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        Py_DECREF(code);
        PyErr_Restore(type, value, trace);
    }
    return result;
}

/* 1: entered. 0: somebody must ask for it (never where wait). -1 */
static int
enter(LeaseObject *self, bool wait, og_pool_hold *asked)
{
    if (self->seat == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected a lease with a seat, it was taken apart; "
                        "make another");
        return -1;
    }
    og_pool_entry *entry = PyMem_Calloc(1, sizeof *entry);
    if (entry == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    int place;
    og_state *state = state_of((PyObject *)self);
    PyObject *code = og_pool_caller(&state->pool_lease, &place);
    og_pool_hold hold;
    int entered = og_pool_try(state, self->seat, &hold);
    if (entered == 0 && wait) {
        entered = og_pool_wait(self->timeout, &hold) < 0 ? -1 : 1;
    }
    if (entered > 0) {
        push(self, entry, &hold, code, place);
        return 1;
    }
    PyMem_Free(entry);
    if (entered == 0) {
        PyObject *old = self->code;
        self->code = code;
        self->place = place;
        Py_XDECREF(old);
        *asked = hold;
        return 0;
    }
    Py_XDECREF(code);
    return -1;
}

/* Leaves, then tells `after`; -1 with an exception set, and left all the
 * same. */
static int
leave(LeaseObject *self)
{
    bool several = self->top != NULL && self->top->below != NULL;
    og_pool_entry **link =
        several && !self->ending ? find_leaving(self) : &self->top;
    if (self->top == NULL && self->ended > 0) {
        self->ended--; /* the block was in a generator that went with us */
        return 0;
    }
    if (self->top == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the lease to be entered before it is left, "
                        "it is not; use it by `with`");
        return -1;
    }
    int result = pop(link);
    if (self->after == NULL) {
        return result;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *after = Py_NewRef(self->after);
    PyObject *told = PyObject_CallNoArgs(after);
    Py_DECREF(after);
    if (told == NULL && type == NULL) {
        return -1;
    }
    if (told == NULL) {
        PyErr_WriteUnraisable((PyObject *)self->seat);
    }
    Py_XDECREF(told);
    PyErr_Restore(type, value, trace);
    return result;
}

/* leave() where the block ended with error: that goes on, unless something
 * that is no Exception, such as an interrupt, came on the way out. */
static int
leave_with(LeaseObject *self, PyObject *error)
{
    int result = leave(self);
    if (result < 0 && error != NULL && PyExceptionInstance_Check(error) &&
        PyErr_ExceptionMatches(PyExc_Exception)) {
        PyErr_WriteUnraisable((PyObject *)self->seat);
        result = 0;
    }
    return result;
}

/* leave() on the way out with an exception, which goes on. */
static void
unwind(LeaseObject *self)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (leave(self) < 0) {
        PyErr_WriteUnraisable((PyObject *)self->seat);
    }
    PyErr_Restore(type, value, trace);
}

static PyObject *
Lease_value(LeaseObject *self)
{
    return self->value == NULL ? Py_None : self->value;
}

static PyObject *
Lease_enter(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    LeaseObject *self = (LeaseObject *)object;
    return enter(self, true, NULL) < 0 ? NULL : Py_NewRef(Lease_value(self));
}

static PyObject *
Lease_exit(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    LeaseObject *self = (LeaseObject *)object;
    if (leave_with(self, count >= 2 ? args[1] : NULL) < 0) {
        return NULL;
    }
    Py_RETURN_FALSE;
}

static PyObject *
Lease_aenter(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    LeaseObject *self = (LeaseObject *)object;
    og_pool_hold asked;
    int entered = enter(self, false, &asked);
    if (entered < 0) {
        return NULL;
    }
    if (entered > 0) {
        PyObject *done = og_pool_done(state_of(object), Lease_value(self));
        if (done == NULL) {
            unwind(self);
        }
        return done;
    }
    PyObject *result = NULL;
    PyObject *road = self->seat->enter_async;
    if (road == NULL || road == Py_None) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the units of the seat to be ready, they are "
                        "not, and it has no enter_async to wait for them; "
                        "enter the lease by `with`");
    }
    else {
        PyObject *timeout = self->timeout == NULL ? Py_None : self->timeout;
        Py_INCREF(road);
        result = PyObject_CallFunctionObjArgs(
            road, object, (PyObject *)asked.owner, timeout, NULL);
        Py_DECREF(road);
    }
    og_pool_hold_drop(&asked);
    return result;
}

static PyObject *
Lease_aexit(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    LeaseObject *self = (LeaseObject *)object;
    if (leave_with(self, count >= 2 ? args[1] : NULL) < 0) {
        return NULL;
    }
    return og_pool_done(state_of(object), Py_False);
}

PyDoc_STRVAR(adopt_doc,
             "adopt($self, owner, extra=None, /)\n--\n\n"
             "Enter with a lease that owner has been counted already, and "
             "what it was granted beside units.");

static PyObject *
Lease_adopt(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    LeaseObject *self = (LeaseObject *)object;
    og_state *state = state_of(object);
    if (count < 1 || count > 2 || self->seat == NULL ||
        (PyObject *)Py_TYPE(args[0]) != state->pool_lease.owner_type) {
        PyErr_SetString(PyExc_TypeError,
                        "adopt: expected an Owner and what was granted beside "
                        "units, got something else; pass what enter_async was "
                        "given");
        return NULL;
    }
    og_pool_hold hold = {
        .seat = self->seat,
        .owner = (OwnerObject *)args[0],
        .units = self->seat->units,
    };
    hold.units->uses++; /* reading extra may run code that sets others */
    og_pool_entry *entry = PyMem_Calloc(1, sizeof *entry);
    if (entry == NULL) {
        PyErr_NoMemory();
    }
    if (entry == NULL ||
        og_pool_read_extra(count == 2 ? args[1] : Py_None, &hold) < 0) {
        og_pool_units_drop(hold.units);
        PyMem_Free(hold.extra);
        PyMem_Free(entry);
        return NULL;
    }
    hold.seat->leases++;
    Py_INCREF((PyObject *)hold.seat);
    Py_INCREF((PyObject *)hold.owner);
    push(self, entry, &hold, self->code, self->place);
    self->code = NULL;
    Py_RETURN_NONE;
}

/* --- the type ------------------------------------------------------------ */

static PyObject *
optional(PyObject *value)
{
    return value == Py_None ? NULL : Py_NewRef(value);
}

static PyObject *
Lease_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seat", "value", "timeout", "after", NULL};
    og_state *state = (og_state *)PyType_GetModuleState(type);
    PyObject *seat;
    PyObject *value = Py_None, *timeout = Py_None, *after = Py_None;
    if (!PyArg_ParseTupleAndKeywords(
            args, kwargs, "O!|OOO:Lease", names,
            (PyTypeObject *)state->pool_lease.seat_type, &seat, &value,
            &timeout, &after)) {
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    LeaseObject *self = (LeaseObject *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->seat = (SeatObject *)Py_NewRef(seat);
    self->value = optional(value);
    self->timeout = optional(timeout);
    self->after = optional(after);
    return (PyObject *)self;
}

static int
Lease_traverse(PyObject *object, visitproc visit, void *arg)
{
    LeaseObject *self = (LeaseObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT((PyObject *)self->seat);
    Py_VISIT(self->value);
    Py_VISIT(self->timeout);
    Py_VISIT(self->after);
    for (og_pool_entry *at = self->top; at != NULL; at = at->below) {
        Py_VISIT((PyObject *)at->hold.seat);
    }
    return 0;
}

/* The collector calls this before it takes anything apart, so that what is
 * told here can still be called. */
static void
Lease_finalize(PyObject *object)
{
    LeaseObject *self = (LeaseObject *)object;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    self->ending = true;
    while (self->top != NULL) {
        self->ended++;
        if (leave(self) < 0) {
            PyErr_WriteUnraisable(NULL);
        }
    }
    self->ending = false;
    PyErr_Restore(type, value, trace);
}

/* What is entered stays until the end: its ledger counts it. */
static int
Lease_clear(PyObject *object)
{
    LeaseObject *self = (LeaseObject *)object;
    PyObject *seat = (PyObject *)self->seat;
    self->seat = NULL;
    Py_XDECREF(seat);
    Py_CLEAR(self->value);
    Py_CLEAR(self->timeout);
    Py_CLEAR(self->after);
    Py_CLEAR(self->code);
    return 0;
}

static void
Lease_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (((LeaseObject *)object)->weak_list != NULL) {
        PyObject_ClearWeakRefs(object);
    }
    Lease_finalize(object);
    (void)Lease_clear(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *
Lease_get_entered(PyObject *object, void *ignored)
{
    (void)ignored;
    long count = 0;
    og_pool_entry *at = ((LeaseObject *)object)->top;
    for (; at != NULL; at = at->below) {
        count++;
    }
    return PyLong_FromLong(count);
}

static PyGetSetDef Lease_getset[] = {
    {"entered", Lease_get_entered, NULL, "How often it is entered now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Lease_members[] = {
    {"seat", T_OBJECT, offsetof(LeaseObject, seat), READONLY,
     "What it is a lease on."},
    {"value", T_OBJECT, offsetof(LeaseObject, value), READONLY,
     "What the block is given."},
    {"timeout", T_OBJECT, offsetof(LeaseObject, timeout), READONLY,
     "What enter_slow is given, in seconds."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(LeaseObject, weak_list),
     READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef Lease_methods[] = {
    {"__enter__", Lease_enter, METH_NOARGS,
     "__enter__($self, /)\n--\n\nTake a lease; gives value."},
    {"__exit__", (PyCFunction)(void (*)(void))Lease_exit, METH_FASTCALL,
     "__exit__($self, type=None, value=None, traceback=None, /)\n--\n\n"
     "Give it back, in any thread."},
    {"__aenter__", Lease_aenter, METH_NOARGS,
     "__aenter__($self, /)\n--\n\nTake a lease, the task waits for it."},
    {"__aexit__", (PyCFunction)(void (*)(void))Lease_aexit, METH_FASTCALL,
     "__aexit__($self, type=None, value=None, traceback=None, /)\n--\n\n"
     "Give it back."},
    {"adopt", (PyCFunction)(void (*)(void))Lease_adopt, METH_FASTCALL,
     adopt_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Lease_slots[] = {
    {Py_tp_doc,
     (void *)"Lease(seat, value=None, timeout=None, after=None)\n--\n\n"
             "A counted lease for the time of a `with` or `async with` "
             "block, which is given value.\n\n"
             "after(): called each time it has been given back."},
    {Py_tp_new, (void *)Lease_new},
    {Py_tp_methods, Lease_methods},
    {Py_tp_getset, Lease_getset},
    {Py_tp_members, Lease_members},
    {Py_tp_traverse, (void *)Lease_traverse},
    {Py_tp_clear, (void *)Lease_clear},
    {Py_tp_finalize, (void *)Lease_finalize},
    {Py_tp_dealloc, (void *)Lease_dealloc},
    {0, NULL},
};

static PyType_Spec Lease_spec = {
    .name = "opguard._C.Lease",
    .basicsize = sizeof(LeaseObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Lease_slots,
};

int
og_pool_lease_exec(PyObject *module, og_state *state)
{
    og_pool_lease_state *lease = &state->pool_lease;
    if (og_intern(&lease->place_name, "f_lasti") < 0) {
        return -1;
    }
    lease->lease_type = PyType_FromModuleAndSpec(module, &Lease_spec, NULL);
    return lease->lease_type == NULL
               ? -1
               : PyModule_AddType(module, (PyTypeObject *)lease->lease_type);
}
