/* opguard._C.Seat: what the leases on one user share, and the two steps that
 * count them.
 *
 * A lease is counted either here, when all units are ready, or by enter_slow,
 * which is Python and may wait, load and fail. Whoever takes a hold gives it
 * back once. */
#include "core/pool_pages.h"
#include "py/pool_ledger.h"
#include "py/pool_lease.h"
#include "py/state.h"
#include "py/util.h"

#include <structmember.h>

OG_HOT void
og_pool_units_drop(og_pool_units *units)
{
    if (units != NULL && --units->uses == 0) {
        PyMem_Free(units);
    }
}

OG_HOT void
og_pool_hold_drop(og_pool_hold *hold)
{
    SeatObject *seat = hold->seat;
    OwnerObject *owner = hold->owner;
    og_pool_units_drop(hold->units);
    if (hold->extra != NULL) {
        PyMem_Free(hold->extra);
    }
    *hold = (og_pool_hold){0};
    Py_XDECREF((PyObject *)seat);
    Py_XDECREF((PyObject *)owner);
}

/* --- counting ------------------------------------------------------------ */

/* The ledger would not: 0 where enter_slow is to be asked, else -1. */
static OG_COLD int
refused(og_pool_hold *hold, const og_error *err)
{
    PyObject *slow = hold->seat->enter_slow;
    if (err->status == OG_NOT_FOUND && slow != NULL && slow != Py_None) {
        return 0; /* it knows whose unit that was, and says so */
    }
    og_ledger_raise(err);
    og_pool_hold_drop(hold);
    return -1;
}

OG_HOT int
og_pool_try(og_state *state, SeatObject *seat, og_pool_hold *hold)
{
    *hold = (og_pool_hold){0};
    hold->seat = (SeatObject *)Py_NewRef((PyObject *)seat);
    hold->owner = og_pool_owner_now(state, seat->ledger_object, seat->ledger);
    if (hold->owner == NULL) {
        og_pool_hold_drop(hold);
        return -1;
    }
    hold->units = seat->units;
    hold->units->uses++;
    if (seat->slow) {
        return 0;
    }
    og_error err;
    int entered =
        og_ledger_enter(seat->ledger, hold->owner->id, hold->units->ids,
                        hold->units->count, 0, &err);
    if (entered < 0) {
        return refused(hold, &err);
    }
    seat->leases += entered;
    return entered;
}

#define FEW 32

/* How often the owner of hold has the first of its units. Needs no memory
 * unless very many hold it. */
static int64_t
count_held(const og_pool_hold *hold)
{
    const og_ledger *ledger = hold->owner->ledger;
    og_pool_holder few[FEW], *holders = few, *many = NULL;
    size_t count = 0;
    if (hold->units->count == 0) {
        return 0;
    }
    int64_t unit = hold->units->ids[0], found = 0;
    if (og_ledger_holders(ledger, unit, few, FEW, &count, NULL) < 0) {
        return 0;
    }
    if (count > FEW) {
        many = PyMem_Calloc(count, sizeof *many);
        if (many == NULL ||
            og_ledger_holders(ledger, unit, many, count, &count, NULL) < 0) {
            count = FEW;
        }
        else {
            holders = many;
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (holders[i].owner == hold->owner->id) {
            found = holders[i].count;
        }
    }
    PyMem_Free(many);
    return found;
}

int
og_pool_read_extra(PyObject *given, og_pool_hold *hold)
{
    if (given == Py_None) {
        return 0;
    }
    if (!PyTuple_Check(given)) {
        PyErr_Format(PyExc_TypeError,
                     "enter_slow: expected None or a tuple of (pool, bytes) "
                     "from it, got %R; return what was granted beside units",
                     Py_TYPE(given));
        return -1;
    }
    Py_ssize_t count = PyTuple_Size(given);
    hold->extra = PyMem_Calloc((size_t)count + 1, sizeof *hold->extra);
    if (hold->extra == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *pair = PyTuple_GetItem(given, i);
        long long pool, bytes;
        if (!PyTuple_Check(pair) ||
            !PyArg_ParseTuple(pair, "LL", &pool, &bytes)) {
            if (!PyErr_Occurred()) {
                PyErr_Format(PyExc_TypeError,
                             "enter_slow: expected (pool, bytes) at %zd of "
                             "what it gave, got %R; make it a tuple",
                             i, Py_TYPE(pair));
            }
            return -1;
        }
        hold->extra[i] = (og_pool_extra){pool, bytes};
    }
    hold->extra_count = (size_t)count;
    return 0;
}

/* enter_slow has raised: what it counted all the same, because a signal came
 * between the ledger's answer and its return, is given back. */
static void
repair(og_pool_hold *hold, int64_t before)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (count_held(hold) > before) {
        hold->seat->leases++;
        if (og_pool_give(hold) < 0) {
            PyErr_WriteUnraisable(NULL);
        }
    }
    og_pool_hold_drop(hold);
    PyErr_Restore(type, value, trace);
}

int
og_pool_wait(PyObject *timeout, og_pool_hold *hold)
{
    SeatObject *seat = hold->seat;
    timeout = timeout == NULL ? Py_None : timeout;
    if (seat->enter_slow == NULL || seat->enter_slow == Py_None) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the units of the seat to be ready, they are "
                        "not, and it has no enter_slow to bring them in; give "
                        "it one");
        og_pool_hold_drop(hold);
        return -1;
    }
    int64_t before = count_held(hold);
    PyObject *slow = Py_NewRef(seat->enter_slow);
    Py_INCREF(timeout);
    PyObject *given = PyObject_CallFunctionObjArgs(
        slow, (PyObject *)seat, (PyObject *)hold->owner, timeout, NULL);
    Py_DECREF(timeout);
    Py_DECREF(slow);
    if (given == NULL) {
        repair(hold, before);
        return -1;
    }
    if (hold->units != seat->units && seat->units != NULL) {
        og_pool_units_drop(hold->units); /* they changed on the way */
        hold->units = seat->units;
        hold->units->uses++;
    }
    seat->leases++;
    int read = og_pool_read_extra(given, hold);
    Py_DECREF(given);
    if (read < 0) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        if (og_pool_give(hold) < 0) {
            PyErr_WriteUnraisable(NULL);
        }
        PyErr_Restore(type, value, trace);
    }
    return read;
}

/* Who waits may go on. Where a file was cut under a map, leave_slow says whose
 * answers were computed from zeros. */
static OG_COLD int
tell(const SeatObject *seat)
{
    if (seat->leave_slow == NULL || seat->leave_slow == Py_None) {
        return 0;
    }
    PyObject *slow = Py_NewRef(seat->leave_slow);
    PyObject *told =
        PyObject_CallFunctionObjArgs(slow, (PyObject *)seat, NULL);
    Py_DECREF(slow);
    Py_XDECREF(told);
    return told == NULL ? -1 : 0;
}

OG_HOT int
og_pool_give(og_pool_hold *hold)
{
    og_pool_hold own = *hold;
    *hold = (og_pool_hold){0};
    og_error err;
    int pump =
        og_ledger_leave(own.owner->ledger, own.owner->id, own.units->ids,
                        own.units->count, own.extra, own.extra_count, &err);
    own.seat->leases--;
    int result = 0;
    if (pump < 0) {
        og_ledger_raise(&err);
        result = -1;
    }
    else if (pump > 0 || og_pages_any_broken()) {
        result = tell(own.seat);
    }
    og_pool_hold_drop(&own);
    return result;
}

/* --- the type ------------------------------------------------------------ */

static int
Seat_set_units(PyObject *object, PyObject *value, void *ignored)
{
    (void)ignored;
    SeatObject *self = (SeatObject *)object;
    if (value == NULL || !PyTuple_Check(value)) {
        PyErr_Format(PyExc_TypeError,
                     "units: expected a tuple of ids, got %R; pass what "
                     "Ledger.add_unit returned, in a tuple",
                     value == NULL ? Py_None : (PyObject *)Py_TYPE(value));
        return -1;
    }
    size_t count = (size_t)PyTuple_Size(value);
    og_pool_units *units =
        PyMem_Calloc(1, sizeof *units + count * sizeof *units->ids);
    if (units == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    units->uses = 1;
    units->count = count;
    for (size_t i = 0; i < count; i++) {
        units->ids[i] =
            PyLong_AsLongLong(PyTuple_GetItem(value, (Py_ssize_t)i));
        if (units->ids[i] == -1 && PyErr_Occurred()) {
            PyMem_Free(units);
            return -1;
        }
    }
    PyObject *old = self->units_object;
    og_pool_units_drop(self->units);
    self->units = units;
    self->units_object = Py_NewRef(value);
    Py_XDECREF(old);
    return 0;
}

static PyObject *
Seat_get_units(PyObject *object, void *ignored)
{
    (void)ignored;
    PyObject *units = ((SeatObject *)object)->units_object;
    return Py_NewRef(units == NULL ? Py_None : units);
}

static PyObject *
callable_or_null(PyObject *value)
{
    return value == Py_None ? NULL : Py_NewRef(value);
}

static PyObject *
Seat_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"ledger", "units", "enter_slow", "leave_slow",
                            NULL};
    PyObject *ledger, *units, *enter = Py_None, *leave = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OO:Seat", names,
                                     &ledger, &units, &enter, &leave)) {
        return NULL;
    }
    og_state *state = (og_state *)PyType_GetModuleState(type);
    og_ledger *core = og_ledger_of(state, ledger);
    if (core == NULL) {
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *object = alloc(type, 0);
    if (object == NULL) {
        return NULL;
    }
    SeatObject *self = (SeatObject *)object;
    self->ledger_object = Py_NewRef(ledger);
    self->ledger = core;
    self->enter_slow = callable_or_null(enter);
    self->leave_slow = callable_or_null(leave);
    if (Seat_set_units(object, units, NULL) < 0) {
        Py_DECREF(object);
        return NULL;
    }
    return object;
}

static int
Seat_traverse(PyObject *object, visitproc visit, void *arg)
{
    SeatObject *self = (SeatObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->ledger_object);
    Py_VISIT(self->units_object);
    Py_VISIT(self->enter_slow);
    Py_VISIT(self->leave_slow);
    Py_VISIT(self->enter_async);
    return 0;
}

/* The ledger stays until the end: leases that still count need it. */
static int
Seat_clear(PyObject *object)
{
    SeatObject *self = (SeatObject *)object;
    Py_CLEAR(self->enter_slow);
    Py_CLEAR(self->leave_slow);
    Py_CLEAR(self->enter_async);
    return 0;
}

static void
Seat_dealloc(PyObject *object)
{
    SeatObject *self = (SeatObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weak_list != NULL) {
        PyObject_ClearWeakRefs(object);
    }
    (void)Seat_clear(object);
    og_pool_units_drop(self->units);
    Py_CLEAR(self->units_object);
    Py_CLEAR(self->ledger_object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyGetSetDef Seat_getset[] = {
    {"units", Seat_get_units, Seat_set_units,
     "Ids of what is leased together; leases keep those they were taken "
     "with.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Seat_members[] = {
    {"ledger", T_OBJECT, offsetof(SeatObject, ledger_object), READONLY,
     "The Ledger that counts."},
    {"leases", T_PYSSIZET, offsetof(SeatObject, leases), READONLY,
     "How many are held now."},
    {"slow", T_BOOL, offsetof(SeatObject, slow), 0,
     "Ask enter_slow for every lease, ready or not."},
    {"enter_slow", T_OBJECT, offsetof(SeatObject, enter_slow), 0,
     "(seat, owner, timeout) -> extra: counts a lease, or raises."},
    {"leave_slow", T_OBJECT, offsetof(SeatObject, leave_slow), 0,
     "(seat): somebody who waits may go on."},
    {"enter_async", T_OBJECT, offsetof(SeatObject, enter_async), 0,
     "async (lease, owner, timeout) -> value: counts and calls "
     "lease.adopt(owner, extra)."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(SeatObject, weak_list),
     READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Seat_slots[] = {
    {Py_tp_doc,
     (void *)"Seat(ledger, units, enter_slow=None, leave_slow=None)\n--\n\n"
             "What the leases on one user share.\n\n"
             "enter_slow(seat, owner, timeout) is asked when a unit is not "
             "ready: it returns with the lease counted, None or what was "
             "granted beside units as ((pool, bytes), ...), or raises. "
             "leave_slow(seat) is told when somebody who waits may go on."},
    {Py_tp_new, (void *)Seat_new},
    {Py_tp_getset, Seat_getset},
    {Py_tp_members, Seat_members},
    {Py_tp_traverse, (void *)Seat_traverse},
    {Py_tp_clear, (void *)Seat_clear},
    {Py_tp_dealloc, (void *)Seat_dealloc},
    {0, NULL},
};

static PyType_Spec Seat_spec = {
    .name = "opguard._C.Seat",
    .basicsize = sizeof(SeatObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Seat_slots,
};

int
og_pool_seat_exec(PyObject *module, og_state *state)
{
    state->pool_lease.seat_type =
        PyType_FromModuleAndSpec(module, &Seat_spec, NULL);
    return state->pool_lease.seat_type == NULL
               ? -1
               : PyModule_AddType(module,
                                  (PyTypeObject *)state->pool_lease.seat_type);
}

/* --- the family ---------------------------------------------------------- */

static int
family_exec(PyObject *module, og_state *state)
{
    if (og_pool_owner_exec(module, state) < 0 ||
        og_pool_seat_exec(module, state) < 0 ||
        og_pool_done_exec(module, state) < 0 ||
        og_pool_lease_exec(module, state) < 0) {
        return -1;
    }
    return og_pool_forward_exec(module, state);
}

#define EACH_REFERENCE(of, use)     \
    do {                            \
        use((of)->seat_type);       \
        use((of)->lease_type);      \
        use((of)->owner_type);      \
        use((of)->forward_type);    \
        use((of)->done_type);       \
        use((of)->owner_get);       \
        use((of)->owner_set);       \
        use((of)->running_loop);    \
        use((of)->current_task);    \
        use((of)->generator);       \
        use((of)->coroutine);       \
        use((of)->async_generator); \
        use((of)->method);          \
        use((of)->last_code);       \
        use((of)->place_name);      \
    } while (0)

static int
family_traverse(og_state *state, visitproc visit, void *arg)
{
    EACH_REFERENCE(&state->pool_lease, Py_VISIT);
    return 0;
}

static int
family_clear(og_state *state)
{
    EACH_REFERENCE(&state->pool_lease, Py_CLEAR);
    return 0;
}

const og_family og_pool_lease_family = {
    .methods = og_pool_owner_methods,
    .exec = family_exec,
    .traverse = family_traverse,
    .clear = family_clear,
};
