/* What a guard calls: g(model, ...), g(function, ...), g(value), decorated
 * functions; and the second try after running out of memory. */
#include "py/guards_object.h"

/* --- calling ------------------------------------------------------------- */

/* 1: try again; 0: no; -1 with a new exception set. The exception that was
 * set has been taken out and is error. */
static int
ask_again(GuardObject *self, og_state *state, PyObject *error, int *tries)
{
    PyObject *hook = self->on_oom;
    if (hook == NULL || state->guards.is_oom == NULL) {
        return 0;
    }
    PyObject *oom =
        PyObject_CallFunctionObjArgs(state->guards.is_oom, error, NULL);
    int result = oom == NULL ? -1 : PyObject_IsTrue(oom);
    Py_XDECREF(oom);
    if (result <= 0) {
        return result;
    }
    og_guard_settings settings = og_guard_get_settings((PyObject *)self);
    PyObject *handled = PyErr_GetHandledException();
    og_sanitize(state, error, handled, settings.keep);
    Py_XDECREF(handled);
    if (hook == Py_True) { /* "retry": once, after freeing */
        if ((*tries)++ > 0) {
            return 0;
        }
        og_guard_release(state, &settings, true);
        return 1;
    }
    og_guard_release(state, &settings, false);
    /* As in an `except`: what the hook raises gets error as its context, by
     * the interpreter, which makes no ring when it is error itself. */
    handled = PyErr_GetHandledException();
    PyErr_SetHandledException(error);
    PyObject *again = PyObject_CallFunctionObjArgs(hook, error, NULL);
    PyErr_SetHandledException(handled);
    Py_XDECREF(handled);
    result = again == NULL ? -1 : PyObject_IsTrue(again);
    Py_XDECREF(again);
    return result;
}

/* callable(*args, **kwargs), again as on_oom says: a new reference. */
PyObject *
og_guard_call_again(GuardObject *self, og_state *state, PyObject *callable,
                    PyObject *args, PyObject *kwargs)
{
    int tries = 0;
    for (;;) {
        PyObject *result = PyObject_Call(callable, args, kwargs);
        if (result != NULL || self->on_oom == NULL) {
            return result;
        }
        PyObject *type, *value, *trace;
        if (PyErr_Occurred() == NULL) {
            PyErr_NoMemory(); /* as in og_guard_failed */
        }
        PyErr_Fetch(&type, &value, &trace);
        PyErr_NormalizeException(&type, &value, &trace);
        if (trace != NULL) {
            (void)PyException_SetTraceback(value, trace);
        }
        Py_CLEAR(trace);
        int again = ask_again(self, state, value, &tries);
        if (again == 0) {
            PyErr_Restore(type, value, PyException_GetTraceback(value));
            return NULL;
        }
        Py_XDECREF(type);
        Py_XDECREF(value);
        if (again < 0) {
            return NULL;
        }
    }
}

/* Steals value; detached when the guard says so. */
PyObject *
og_guard_detach_result(GuardObject *self, og_state *state, PyObject *value,
                       PyObject *models)
{
    if (value == NULL || !(self->flags & OG_GUARD_DETACH)) {
        return value;
    }
    PyObject *result = og_detach(state, value, models, false);
    Py_DECREF(value);
    return result;
}

/* models and model, which is added when it is not there: a new reference. */
static PyObject *
with_model(PyObject *models, PyObject *model)
{
    if (models == NULL) {
        return PyTuple_Pack(1, model);
    }
    PyObject *one = PyTuple_Pack(1, model);
    PyObject *all = one == NULL ? NULL : PySequence_Concat(models, one);
    Py_XDECREF(one);
    return all;
}

/* g(model, ...): the model leased for the time of its call. */
static PyObject *
call_model(GuardObject *self, og_state *state, PyObject *model, PyObject *args,
           PyObject *kwargs)
{
    PyObject *one = PyTuple_Pack(1, model);
    PyObject *result = NULL, *models = NULL;
    og_lease *lease = one == NULL
                          ? NULL
                          : og_lease_take(&state->guards, one,
                                          (self->flags & OG_GUARD_TRAIN) != 0);
    Py_XDECREF(one);
    if (lease == NULL) {
        return NULL;
    }
    result = og_guard_call_again(self, state, model, args, kwargs);
    saved_error error;
    PyErr_Fetch(&error.type, &error.value, &error.trace);
    if (og_lease_return(&state->guards, lease) < 0) {
        if (result != NULL) {
            Py_DECREF(result);
            return NULL;
        }
        PyErr_WriteUnraisable(model);
    }
    PyErr_Restore(error.type, error.value, error.trace);
    if (result != NULL && (self->flags & OG_GUARD_DETACH)) {
        models = with_model(self->models, model);
        if (models == NULL) {
            Py_DECREF(result);
            return NULL;
        }
        result = og_guard_detach_result(self, state, result, models);
        Py_DECREF(models);
    }
    return result;
}

/* g(...) inside its `with`. */
PyObject *
og_guard_call_entered(GuardObject *self, og_state *state, PyObject *args,
                      PyObject *kwargs)
{
    if (self->caller != NULL) {
        PyObject *made =
            og_guard_call_again(self, state, self->caller, args, kwargs);
        return og_guard_detach_result(self, state, made, self->models);
    }
    if (PyTuple_Size(args) < 1) {
        PyErr_SetString(PyExc_TypeError,
                        "g(): expected a model or a callable with its "
                        "arguments, or a value to detach, got nothing; pass "
                        "it first");
        return NULL;
    }
    PyObject *first = PyTuple_GetItem(args, 0);
    PyTypeObject *module = (PyTypeObject *)state->guards.module_type;
    if (!PyCallable_Check(first)) {
        if (PyTuple_Size(args) > 1 ||
            (kwargs != NULL && PyDict_Size(kwargs) > 0)) {
            PyErr_Format(PyExc_TypeError,
                         "g(): expected a callable before other arguments, "
                         "got %R; pass one value to have it detached",
                         Py_TYPE(first));
            return NULL;
        }
        return og_detach(state, first, self->models, false);
    }
    PyObject *rest = PyTuple_GetSlice(args, 1, PyTuple_Size(args));
    if (rest == NULL) {
        return NULL;
    }
    PyObject *result;
    if (module != NULL && PyObject_TypeCheck(first, module)) {
        result = call_model(self, state, first, rest, kwargs);
    }
    else {
        result = og_guard_call_again(self, state, first, rest, kwargs);
        result = og_guard_detach_result(self, state, result, self->models);
    }
    Py_DECREF(rest);
    return result;
}

PyObject *
og_guard_decorate(GuardObject *self, og_state *state, PyObject *args,
                  PyObject *kwargs)
{
    if (self->top != NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected g() to be called in the thread that entered "
                        "the guard, this is another, whose modes are its own; "
                        "enter a guard in this thread too");
        return NULL;
    }
    if (state->guards.decorate == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the guard to be entered before it is "
                        "called, it is not; use it by `with`");
        return NULL;
    }
    if (PyTuple_Size(args) != 1 ||
        (kwargs != NULL && PyDict_Size(kwargs) > 0)) {
        PyErr_SetString(PyExc_TypeError,
                        "expected the guard to be entered by `with` before it "
                        "is called with several arguments, it is not; enter "
                        "it, or pass one function to be decorated");
        return NULL;
    }
    return PyObject_CallFunctionObjArgs(state->guards.decorate,
                                        (PyObject *)self,
                                        PyTuple_GetItem(args, 0), NULL);
}
