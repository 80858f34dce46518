/* opguard._C.LeasedForward: a callable that runs inside a lease.
 *
 * It stands in a module's own dictionary, so it holds the module weakly and
 * makes no cycle: a model that nobody names goes at once. What a copy of the
 * module does with it, and whatever else is rare, its keeper decides in
 * Python. */
#include "py/pool_ledger.h"
#include "py/pool_lease.h"
#include "py/state.h"

#include <structmember.h>

typedef struct {
    PyObject_HEAD PyObject *seat; /* a Seat, or NULL: keeper finds one */
    PyObject *function;
    PyObject *module; /* a weak reference: function's first argument; NULL */
    PyObject *keeper, *prepare, *timeout; /* or NULL */
    PyObject *weak_list;
    char active;
} ForwardObject;

static og_state *
state_of(PyObject *object)
{
    return (og_state *)PyType_GetModuleState(Py_TYPE(object));
}

static bool
is_given(const PyObject *value)
{
    return value != NULL && value != Py_None;
}

/* --- calling ------------------------------------------------------------- */

/* args with module in front, which is stolen: a new reference. */
static PyObject *
with_module(PyObject *module, PyObject *args)
{
    Py_ssize_t count = PyTuple_Size(args);
    PyObject *all = PyTuple_New(count + 1);
    if (all == NULL) {
        Py_DECREF(module);
        return NULL;
    }
    (void)PyTuple_SetItem(all, 0, module);
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = Py_NewRef(PyTuple_GetItem(args, i));
        (void)PyTuple_SetItem(all, i + 1, item);
    }
    return all;
}

/* Calls its function with module in front, which is stolen; NULL: as it is. */
static PyObject *
invoke(const ForwardObject *self, PyObject *module, PyObject *args,
       PyObject *kwargs)
{
    if (module == NULL) {
        return PyObject_Call(self->function, args, kwargs);
    }
    PyObject *all = with_module(module, args);
    if (all == NULL) {
        return NULL;
    }
    PyObject *result = PyObject_Call(self->function, all, kwargs);
    Py_DECREF(all);
    return result;
}

/* As invoke, the arguments where prepare puts them. */
static OG_COLD PyObject *
invoke_prepared(const ForwardObject *self, PyObject *module, PyObject *args,
                PyObject *kwargs)
{
    PyObject *prepare = Py_NewRef(self->prepare);
    PyObject *both = PyObject_CallFunctionObjArgs(
        prepare, args, kwargs == NULL ? Py_None : kwargs, NULL);
    Py_DECREF(prepare);
    PyObject *given =
        both != NULL && PyTuple_Check(both) && PyTuple_Size(both) == 2
            ? PyTuple_GetItem(both, 0)
            : NULL;
    PyObject *named = given == NULL ? NULL : PyTuple_GetItem(both, 1);
    PyObject *result = NULL;
    if (given != NULL && PyTuple_Check(given) &&
        (named == Py_None || PyDict_Check(named))) {
        result = invoke(self, module, given, named == Py_None ? NULL : named);
    }
    else {
        Py_XDECREF(module);
        if (both != NULL) {
            PyErr_Format(PyExc_TypeError,
                         "prepare: expected (args, kwargs) from it, a tuple "
                         "and a dict or None, got %R",
                         Py_TYPE(both));
        }
    }
    Py_XDECREF(both);
    return result;
}

/* keeper.name(self, argument); without the argument where that is NULL. The
 * keeper is held meanwhile: looking its method up may take it out of self. */
static PyObject *
call_keeper(ForwardObject *self, const char *name, PyObject *argument)
{
    PyObject *keeper = Py_NewRef(self->keeper);
    PyObject *method = PyObject_GetAttrString(keeper, name);
    PyObject *result = method == NULL
                           ? NULL
                           : PyObject_CallFunctionObjArgs(
                                 method, (PyObject *)self, argument, NULL);
    Py_XDECREF(method);
    Py_DECREF(keeper);
    return result;
}

/* Has the keeper find the seat of the first call: borrowed from self. */
static OG_COLD PyObject *
adopt(ForwardObject *self)
{
    if (is_given(self->keeper)) {
        PyObject *found = call_keeper(self, "adopt", NULL);
        if (found == NULL) {
            return NULL;
        }
        Py_DECREF(found);
    }
    if (self->seat == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected a callable with a seat, it has none; attach "
                        "the hook again");
    }
    return self->seat;
}

/* A body that has not begun takes its own lease for as long as it runs. */
static OG_COLD PyObject *
drive(ForwardObject *self, PyObject *body)
{
    if (!is_given(self->keeper)) {
        return body;
    }
    PyObject *driven = call_keeper(self, "drive", body);
    Py_DECREF(body);
    return driven;
}

/* Gives back on the way out with an exception, which goes on. */
static OG_COLD void
give_after_failure(const ForwardObject *self, og_pool_hold *hold)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (og_pool_give(hold) < 0) {
        PyErr_WriteUnraisable(self->function);
    }
    PyErr_Restore(type, value, trace);
}

/* Steals module, which may be NULL. */
static inline PyObject *
call_leased(ForwardObject *self, PyObject *module, PyObject *args,
            PyObject *kwargs)
{
    og_state *state = state_of((PyObject *)self);
    PyObject *seat = self->seat != NULL ? self->seat : adopt(self);
    og_pool_hold hold;
    int taken =
        seat == NULL ? -1 : og_pool_try(state, (SeatObject *)seat, &hold);
    if (taken == 0) {
        taken = og_pool_wait(self->timeout, &hold) < 0 ? -1 : 1;
    }
    if (taken < 0) {
        Py_XDECREF(module);
        return NULL;
    }
    PyObject *result = is_given(self->prepare)
                           ? invoke_prepared(self, module, args, kwargs)
                           : invoke(self, module, args, kwargs);
    if (result == NULL) {
        give_after_failure(self, &hold);
        return NULL;
    }
    if (og_pool_give(&hold) < 0) {
        Py_DECREF(result);
        return NULL;
    }
    const og_pool_lease_state *lease = &state->pool_lease;
    PyObject *type = (PyObject *)Py_TYPE(result);
    return type == lease->generator || type == lease->coroutine ||
                   type == lease->async_generator
               ? drive(self, result)
               : result;
}

static OG_COLD PyObject *
module_gone(void)
{
    PyErr_SetString(PyExc_ReferenceError,
                    "expected the module of this callable to be alive, it is "
                    "gone; keep the module, not its method");
    return NULL;
}

/* Whoever calls it holds it, and with it the function. */
static OG_HOT PyObject *
Forward_call(PyObject *object, PyObject *args, PyObject *kwargs)
{
    ForwardObject *self = (ForwardObject *)object;
    PyObject *module = NULL;
    if (self->module != NULL) {
        module = PyWeakref_GetObject(self->module);
        if (!is_given(module)) {
            return module_gone();
        }
        Py_INCREF(module);
    }
    return self->active ? call_leased(self, module, args, kwargs)
                        : invoke(self, module, args, kwargs);
}

/* --- what it looks like -------------------------------------------------- */

/* What it stands for: a bound method of the module, or function. */
static PyObject *
wrapped_of(PyObject *object)
{
    ForwardObject *self = (ForwardObject *)object;
    PyObject *module =
        self->module == NULL ? NULL : PyWeakref_GetObject(self->module);
    if (!is_given(module)) {
        return Py_NewRef(self->function);
    }
    Py_INCREF(module); /* making the method may collect it */
    PyObject *method = PyObject_CallFunctionObjArgs(
        state_of(object)->pool_lease.method, self->function, module, NULL);
    Py_DECREF(module);
    return method;
}

/* Its own attributes, and of what it stands for the others: __name__,
 * __code__, __self__, ... __wrapped__ is of objects alone: inspect would take
 * a class that has it for a wrapper itself. */
static PyObject *
Forward_getattro(PyObject *object, PyObject *name)
{
    bool own = !PyUnicode_Check(name) ||
               (PyUnicode_CompareWithASCIIString(name, "__doc__") != 0 &&
                PyUnicode_CompareWithASCIIString(name, "__module__") != 0);
    if (own) {
        PyObject *found = PyObject_GenericGetAttr(object, name);
        if (found != NULL || !PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return found;
        }
        PyErr_Clear();
    }
    PyObject *wrapped = wrapped_of(object);
    if (wrapped == NULL ||
        PyUnicode_CompareWithASCIIString(name, "__wrapped__") == 0) {
        return wrapped;
    }
    PyObject *found = PyObject_GetAttr(wrapped, name);
    Py_DECREF(wrapped);
    return found;
}

static PyObject *
Forward_get_seat(PyObject *object, void *ignored)
{
    (void)ignored;
    PyObject *seat = ((ForwardObject *)object)->seat;
    return Py_NewRef(seat == NULL ? Py_None : seat);
}

static int
Forward_set_seat(PyObject *object, PyObject *value, void *ignored)
{
    (void)ignored;
    ForwardObject *self = (ForwardObject *)object;
    PyObject *type = state_of(object)->pool_lease.seat_type;
    if (value != NULL && value != Py_None &&
        (PyObject *)Py_TYPE(value) != type) {
        PyErr_Format(PyExc_TypeError,
                     "seat: expected a Seat or None, got %R; pass the seat of "
                     "what is managed",
                     Py_TYPE(value));
        return -1;
    }
    PyObject *old = self->seat;
    self->seat = is_given(value) ? Py_NewRef(value) : NULL;
    Py_XDECREF(old);
    return 0;
}

static PyObject *
ask_keeper(PyObject *object, const char *name, PyObject *argument)
{
    ForwardObject *self = (ForwardObject *)object;
    if (!is_given(self->keeper)) {
        PyErr_SetString(PyExc_TypeError,
                        "expected a callable with a keeper to copy it by, it "
                        "has none; copy the function that it calls");
        return NULL;
    }
    return call_keeper(self, name, argument);
}

static PyObject *
Forward_deepcopy(PyObject *object, PyObject *memo)
{
    return ask_keeper(object, "deepcopy", memo);
}

static PyObject *
Forward_reduce(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    return ask_keeper(object, "reduce", NULL);
}

/* --- the type ------------------------------------------------------------ */

static PyObject *
Forward_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"seat", "function", "module", "keeper", NULL};
    PyObject *seat, *function, *module = Py_None, *keeper = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO|OO:LeasedForward",
                                     names, &seat, &function, &module,
                                     &keeper)) {
        return NULL;
    }
    if (!PyCallable_Check(function)) {
        PyErr_Format(PyExc_TypeError,
                     "function: expected a callable, got %R; pass what is to "
                     "run inside the lease",
                     Py_TYPE(function));
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *object = alloc(type, 0);
    if (object == NULL) {
        return NULL;
    }
    ForwardObject *self = (ForwardObject *)object;
    self->function = Py_NewRef(function);
    self->keeper = is_given(keeper) ? Py_NewRef(keeper) : NULL;
    self->active = 1;
    bool failed = Forward_set_seat(object, seat, NULL) < 0;
    if (!failed && module != Py_None) {
        self->module = PyWeakref_NewRef(module, NULL);
        failed = self->module == NULL;
    }
    if (failed) {
        Py_DECREF(object);
        return NULL;
    }
    return object;
}

static int
Forward_traverse(PyObject *object, visitproc visit, void *arg)
{
    ForwardObject *self = (ForwardObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->seat);
    Py_VISIT(self->function);
    Py_VISIT(self->module);
    Py_VISIT(self->keeper);
    Py_VISIT(self->prepare);
    Py_VISIT(self->timeout);
    return 0;
}

/* function is never NULL: a call of what was cleared must not fall. */
static int
Forward_clear(PyObject *object)
{
    ForwardObject *self = (ForwardObject *)object;
    Py_CLEAR(self->seat);
    Py_CLEAR(self->keeper);
    Py_CLEAR(self->prepare);
    Py_CLEAR(self->timeout);
    PyObject *function = self->function;
    self->function = Py_NewRef(Py_None);
    Py_XDECREF(function);
    return 0;
}

static void
Forward_dealloc(PyObject *object)
{
    ForwardObject *self = (ForwardObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weak_list != NULL) {
        PyObject_ClearWeakRefs(object);
    }
    (void)Forward_clear(object);
    Py_CLEAR(self->function);
    Py_CLEAR(self->module);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyGetSetDef Forward_getset[] = {
    {"seat", Forward_get_seat, Forward_set_seat,
     "The Seat of its leases; None: its keeper is asked at the first call.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Forward_members[] = {
    {"keeper", T_OBJECT, offsetof(ForwardObject, keeper), 0,
     "Decides what is rare: adopt, drive, deepcopy, reduce."},
    {"prepare", T_OBJECT, offsetof(ForwardObject, prepare), 0,
     "(args, kwargs) -> (args, kwargs), once the lease is held; or None."},
    {"timeout", T_OBJECT, offsetof(ForwardObject, timeout), 0,
     "Seconds that a call waits for its lease; None: as long as it takes."},
    {"active", T_BOOL, offsetof(ForwardObject, active), 0,
     "False: calls take no lease."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(ForwardObject, weak_list),
     READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef Forward_methods[] = {
    {"__deepcopy__", Forward_deepcopy, METH_O,
     "__deepcopy__($self, memo, /)\n--\n\nWhat the keeper makes of it."},
    {"__reduce__", Forward_reduce, METH_NOARGS,
     "__reduce__($self, /)\n--\n\nWhat the keeper makes of it."},
    {"__reduce_ex__", Forward_reduce, METH_O,
     "__reduce_ex__($self, protocol, /)\n--\n\n"
     "What the keeper makes of it."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Forward_slots[] = {
    {Py_tp_doc,
     (void *)"LeasedForward(seat, function, module=None, keeper=None)\n"
             "--\n\nCalls function, of module where there is one, with a "
             "lease on seat."},
    {Py_tp_new, (void *)Forward_new},
    {Py_tp_call, (void *)Forward_call},
    {Py_tp_getattro, (void *)Forward_getattro},
    {Py_tp_methods, Forward_methods},
    {Py_tp_getset, Forward_getset},
    {Py_tp_members, Forward_members},
    {Py_tp_traverse, (void *)Forward_traverse},
    {Py_tp_clear, (void *)Forward_clear},
    {Py_tp_dealloc, (void *)Forward_dealloc},
    {0, NULL},
};

static PyType_Spec Forward_spec = {
    .name = "opguard._C.LeasedForward",
    .basicsize = sizeof(ForwardObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Forward_slots,
};

/* NULL with an exception set, also where there is one already. */
static PyObject *
type_of(PyObject *types, const char *name)
{
    return types == NULL || PyErr_Occurred() != NULL
               ? NULL
               : PyObject_GetAttrString(types, name);
}

int
og_pool_forward_exec(PyObject *module, og_state *state)
{
    og_pool_lease_state *lease = &state->pool_lease;
    PyObject *types = PyImport_ImportModule("types");
    lease->generator = type_of(types, "GeneratorType");
    lease->coroutine = type_of(types, "CoroutineType");
    lease->async_generator = type_of(types, "AsyncGeneratorType");
    lease->method = type_of(types, "MethodType");
    Py_XDECREF(types);
    if (lease->generator == NULL || lease->coroutine == NULL ||
        lease->async_generator == NULL || lease->method == NULL) {
        return -1;
    }
    lease->forward_type =
        PyType_FromModuleAndSpec(module, &Forward_spec, NULL);
    return lease->forward_type == NULL
               ? -1
               : PyModule_AddType(module, (PyTypeObject *)lease->forward_type);
}
