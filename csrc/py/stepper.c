/* opguard._C.Stepper: drives a generator or coroutine for a guard. Each step
 * enters the guard's modes, lets the body run until it hands out something or
 * ends, sets aside what modes the body gave itself, and leaves. */
#include "py/guards.h"

#include "py/state.h"

typedef struct {
    PyObject_HEAD PyObject *guard;
    PyObject *inner; /* NULL once it has ended */
    og_modes modes;
    og_own_modes own;
    bool yields;
    bool running; /* a step is under way: its modes are not another's */
} StepperObject;

typedef enum step_kind { STEP_SEND, STEP_THROW, STEP_CLOSE } step_kind;

static og_state *
state_of(StepperObject *self)
{
    return (og_state *)PyType_GetModuleState(Py_TYPE((PyObject *)self));
}

PyObject *
og_stepper_new(og_state *state, PyObject *guard, PyObject *inner, bool yields)
{
    PyTypeObject *type = (PyTypeObject *)state->guards.stepper_type;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    StepperObject *self = (StepperObject *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->guard = Py_NewRef(guard);
    self->inner = Py_NewRef(inner);
    self->yields = yields;
    return (PyObject *)self;
}

/* What `throw` of the body came to. */
static PySendResult
throw_into(PyObject *inner, PyObject *args, PyObject **result)
{
    PyObject *throw = PyObject_GetAttrString(inner, "throw");
    *result = throw == NULL ? NULL : PyObject_CallObject(throw, args);
    Py_XDECREF(throw);
    if (*result != NULL) {
        return PYGEN_NEXT;
    }
    if (!PyErr_ExceptionMatches(PyExc_StopIteration)) {
        return PYGEN_ERROR;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    *result = PyObject_GetAttrString(value, "value");
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return *result == NULL ? PYGEN_ERROR : PYGEN_RETURN;
}

static PySendResult
close_body(PyObject *inner, PyObject **result)
{
    PyObject *close = PyObject_GetAttrString(inner, "close");
    if (close == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return PYGEN_ERROR;
        }
        PyErr_Clear();
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    *result = PyObject_CallNoArgs(close);
    Py_DECREF(close);
    return *result == NULL ? PYGEN_ERROR : PYGEN_RETURN;
}

/* The body's frames run: nothing of this step may be relied on but inner. */
static PySendResult
advance(PyObject *inner, step_kind kind, PyObject *arg, PyObject **result)
{
    switch (kind) {
        case STEP_SEND:
            return PyIter_Send(inner, arg, result);
        case STEP_THROW:
            return throw_into(inner, arg, result);
        default:
            return close_body(inner, result);
    }
}

/* Leaves the modes; a failure to is raised, unless the body failed first. */
static PySendResult
leave(StepperObject *self, og_guards_state *guards, og_lease *lease,
      const og_guard_settings *settings, PySendResult outcome,
      PyObject **result)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    int left = outcome == PYGEN_NEXT
                   ? og_modes_suspend(guards, &self->modes, &self->own,
                                      settings->kind)
                   : og_modes_leave(guards, &self->modes);
    if (left < 0 && type != NULL) {
        PyErr_WriteUnraisable(self->guard);
    }
    if (left < 0 && type == NULL) {
        PyErr_Fetch(&type, &value, &trace);
    }
    if (lease != NULL && og_lease_return(guards, lease) < 0) {
        if (type == NULL) {
            PyErr_Fetch(&type, &value, &trace);
        }
        else {
            PyErr_WriteUnraisable(self->guard);
        }
    }
    if (type != NULL) {
        PyErr_Restore(type, value, trace);
        Py_CLEAR(*result);
        return PYGEN_ERROR;
    }
    return outcome;
}

/* Detaches what the step gave, sanitizes what it raised. */
static PySendResult
finish(StepperObject *self, og_state *state, PySendResult outcome,
       const og_guard_settings *settings, PyObject **result)
{
    if (outcome != PYGEN_ERROR && (settings->flags & OG_GUARD_DETACH) &&
        (outcome == PYGEN_RETURN || self->yields) && *result != Py_None) {
        PyObject *given = *result;
        *result = og_detach(state, given, settings->models, false);
        Py_DECREF(given);
        if (*result == NULL) {
            outcome = PYGEN_ERROR;
        }
    }
    if (outcome == PYGEN_ERROR &&
        !PyErr_ExceptionMatches(PyExc_StopAsyncIteration)) {
        PyObject *handled = PyErr_GetHandledException();
        og_guard_failed(state, settings, handled);
        Py_XDECREF(handled);
    }
    return outcome;
}

static PySendResult
step(StepperObject *self, step_kind kind, PyObject *arg, PyObject **result)
{
    og_state *state = state_of(self);
    og_guard_settings settings = og_guard_get_settings(self->guard);
    og_lease *lease = NULL;
    *result = NULL;
    if (self->running) {
        PyErr_SetString(PyExc_ValueError,
                        "expected the guarded body to be suspended, it is "
                        "already executing; step it from one place at a time");
        return PYGEN_ERROR;
    }
    if (self->inner == NULL) {
        *result = Py_NewRef(Py_None);
        return PYGEN_RETURN;
    }
    self->running = true;
    if (settings.models != NULL) {
        lease = og_lease_take(&state->guards, settings.models,
                              (settings.flags & OG_GUARD_TRAIN) != 0);
        if (lease == NULL) {
            self->running = false;
            return PYGEN_ERROR;
        }
    }
    if (og_modes_resume(&state->guards, &self->modes, &self->own,
                        settings.kind, settings.autocast) < 0) {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        if (lease != NULL && og_lease_return(&state->guards, lease) < 0) {
            PyErr_WriteUnraisable(self->guard);
        }
        PyErr_Restore(type, value, trace);
        self->running = false;
        return PYGEN_ERROR;
    }
    PyObject *inner = Py_NewRef(self->inner);
    state->guards.steps++;
    PySendResult outcome = advance(inner, kind, arg, result);
    state->guards.steps--;
    outcome = leave(self, &state->guards, lease, &settings, outcome, result);
    self->running = false;
    if (outcome != PYGEN_NEXT) {
        Py_CLEAR(self->inner);
    }
    Py_DECREF(inner);
    return finish(self, state, outcome, &settings, result);
}

/* As an iterator: the end is a StopIteration with the value. */
static PyObject *
as_iterator(PySendResult outcome, PyObject *result)
{
    if (outcome != PYGEN_RETURN) {
        return outcome == PYGEN_NEXT ? result : NULL;
    }
    if (result == Py_None) {
        PyErr_SetNone(PyExc_StopIteration);
    }
    else {
        /* made here, for a tuple or exception would be taken apart */
        PyObject *stop =
            PyObject_CallFunctionObjArgs(PyExc_StopIteration, result, NULL);
        if (stop != NULL) {
            PyErr_SetObject(PyExc_StopIteration, stop);
            Py_DECREF(stop);
        }
    }
    Py_DECREF(result);
    return NULL;
}

static PySendResult
Stepper_am_send(PyObject *self, PyObject *value, PyObject **result)
{
    return step((StepperObject *)self, STEP_SEND, value, result);
}

static PyObject *
Stepper_next(PyObject *self)
{
    PyObject *result;
    PySendResult outcome =
        step((StepperObject *)self, STEP_SEND, Py_None, &result);
    return as_iterator(outcome, result);
}

static PyObject *
Stepper_send(PyObject *self, PyObject *value)
{
    PyObject *result;
    PySendResult outcome =
        step((StepperObject *)self, STEP_SEND, value, &result);
    return as_iterator(outcome, result);
}

static PyObject *
Stepper_throw(PyObject *self, PyObject *args)
{
    PyObject *result;
    PySendResult outcome =
        step((StepperObject *)self, STEP_THROW, args, &result);
    return as_iterator(outcome, result);
}

static PyObject *
Stepper_close(PyObject *self, PyObject *ignored)
{
    (void)ignored;
    PyObject *result;
    PySendResult outcome =
        step((StepperObject *)self, STEP_CLOSE, NULL, &result);
    return outcome == PYGEN_ERROR ? NULL : result;
}

static PyObject *
Stepper_self(PyObject *self)
{
    return Py_NewRef(self);
}

static int
Stepper_traverse(PyObject *object, visitproc visit, void *arg)
{
    StepperObject *self = (StepperObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->guard);
    Py_VISIT(self->inner);
    Py_VISIT(self->modes.autocast);
    return 0;
}

static int
Stepper_clear(PyObject *object)
{
    StepperObject *self = (StepperObject *)object;
    Py_CLEAR(self->inner);
    Py_CLEAR(self->modes.autocast);
    return 0;
}

static void
Stepper_dealloc(PyObject *object)
{
    StepperObject *self = (StepperObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    (void)Stepper_clear(object);
    Py_CLEAR(self->guard);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef Stepper_methods[] = {
    {"send", Stepper_send, METH_O,
     "send($self, value, /)\n--\n\nOne step, value handed in."},
    {"throw", Stepper_throw, METH_VARARGS,
     "throw($self, error, /)\n--\n\nOne step, error raised in the body."},
    {"close", Stepper_close, METH_NOARGS,
     "close($self, /)\n--\n\nEnd the body."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Stepper_slots[] = {
    {Py_tp_doc, (void *)"Drives one body under a guard; see Guard.step."},
    {Py_tp_methods, Stepper_methods},
    {Py_tp_iter, (void *)Stepper_self},
    {Py_tp_iternext, (void *)Stepper_next},
    {Py_am_await, (void *)Stepper_self},
    {Py_am_send, (void *)Stepper_am_send},
    {Py_tp_traverse, (void *)Stepper_traverse},
    {Py_tp_clear, (void *)Stepper_clear},
    {Py_tp_dealloc, (void *)Stepper_dealloc},
    {0, NULL},
};

static PyType_Spec Stepper_spec = {
    .name = "opguard._C.Stepper",
    .basicsize = sizeof(StepperObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
             Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Stepper_slots,
};

int
og_stepper_exec(PyObject *module, og_state *state)
{
    state->guards.stepper_type =
        PyType_FromModuleAndSpec(module, &Stepper_spec, NULL);
    return state->guards.stepper_type == NULL ? -1 : 0;
}
