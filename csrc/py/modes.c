/* Autograd's and autocast's modes: entered, left, and for a body that is
 * suspended, set aside and put back.
 *
 * torch's inference mode is an object that enters when made and leaves when
 * released; it is spent then, so each entry makes its own. */
#include "py/guards.h"

/* Torch's parts are bound one by one, and gone once the module is cleared. */
static int
need(PyObject *part)
{
    if (part == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the grad modes to be bound before a guard "
                        "uses them, they are not; import opguard.guards");
        return -1;
    }
    return 0;
}

static int
call_flag(PyObject *function)
{
    if (need(function) < 0) {
        return -1;
    }
    PyObject *value = PyObject_CallNoArgs(function);
    int result = value == NULL ? -1 : PyObject_IsTrue(value);
    Py_XDECREF(value);
    return result;
}

static int
set_grad(og_guards_state *guards, bool enabled)
{
    if (need(guards->set_grad) < 0) {
        return -1;
    }
    PyObject *done = PyObject_CallFunctionObjArgs(
        guards->set_grad, enabled ? Py_True : Py_False, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

static PyObject *
make_inference(og_guards_state *guards, bool enabled)
{
    if (need(guards->inference_type) < 0) {
        return NULL;
    }
    return PyObject_CallFunctionObjArgs(guards->inference_type,
                                        enabled ? Py_True : Py_False, NULL);
}

static int
enter_grad(og_guards_state *guards, og_modes *modes, og_grad_kind kind)
{
    if (kind == OG_GRAD_AS_IS) {
        return 0;
    }
    if (kind == OG_GRAD_INFERENCE) {
        modes->inference = make_inference(guards, true);
        return modes->inference == NULL ? -1 : 0;
    }
    int grad = need(guards->set_grad) < 0 ? -1 : call_flag(guards->is_grad);
    if (grad < 0) {
        return -1;
    }
    if (kind == OG_GRAD_ON) {
        int inference = call_flag(guards->is_inference);
        if (inference < 0) {
            return -1;
        }
        if (inference) {
            modes->inference = make_inference(guards, false);
            if (modes->inference == NULL) {
                return -1;
            }
        }
    }
    modes->grad_before = (signed char)(grad + 1);
    return set_grad(guards, kind == OG_GRAD_ON);
}

static int
call_method(PyObject *object, const char *name)
{
    PyObject *done = PyObject_CallMethod(object, name, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* Leaves after a failure: the exception that is set stays. */
static void
undo(og_guards_state *guards, og_modes *modes)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (og_modes_leave(guards, modes) < 0) {
        PyErr_WriteUnraisable(guards->guard_type);
    }
    PyErr_Restore(type, value, trace);
}

/* Makes and enters autocast, or undoes all of modes: -1. */
static int
enter_autocast(og_guards_state *guards, og_modes *modes, PyObject *arguments)
{
    if (need(guards->autocast) == 0) {
        modes->autocast = PyObject_Call(guards->autocast, arguments, NULL);
    }
    if (modes->autocast == NULL || call_method(modes->autocast, "enter") < 0) {
        Py_CLEAR(modes->autocast);
        undo(guards, modes);
        return -1;
    }
    return 0;
}

int
og_modes_enter(og_guards_state *guards, og_modes *modes, og_grad_kind kind,
               PyObject *autocast)
{
    if (enter_grad(guards, modes, kind) < 0) {
        undo(guards, modes);
        return -1;
    }
    if (autocast == NULL) {
        return 0;
    }
    return enter_autocast(guards, modes, autocast);
}

/* Keeps the first exception of several. */
typedef struct first_error {
    PyObject *type, *value, *trace;
} first_error;

static void
note_error(og_guards_state *guards, first_error *first)
{
    if (first->type == NULL) {
        PyErr_Fetch(&first->type, &first->value, &first->trace);
    }
    else {
        PyErr_WriteUnraisable(guards->guard_type);
    }
}

int
og_modes_leave(og_guards_state *guards, og_modes *modes)
{
    first_error first = {NULL, NULL, NULL};
    if (modes->autocast != NULL) {
        if (call_method(modes->autocast, "leave") < 0) {
            note_error(guards, &first);
        }
        Py_CLEAR(modes->autocast);
    }
    Py_CLEAR(modes->own);
    if (modes->grad_before != 0 &&
        set_grad(guards, modes->grad_before == 2) < 0) {
        note_error(guards, &first);
    }
    modes->grad_before = 0;
    Py_CLEAR(modes->inference);
    if (first.type != NULL) {
        PyErr_Restore(first.type, first.value, first.trace);
        return -1;
    }
    return 0;
}

/* Takes the body back to the modes it had given itself. */
static int
restore_own(og_guards_state *guards, og_modes *modes, og_own_modes *own,
            og_grad_kind kind)
{
    int grad = kind == OG_GRAD_ON;
    if (own->shield != NULL) {
        Py_CLEAR(own->shield); /* back in the body's inference mode */
        return set_grad(guards, own->grad);
    }
    if (kind == OG_GRAD_INFERENCE && !own->inference) {
        modes->own = make_inference(guards, false);
        if (modes->own == NULL) {
            return -1;
        }
        grad = 1;
    }
    return own->grad == grad ? 0 : set_grad(guards, own->grad);
}

int
og_modes_resume(og_guards_state *guards, og_modes *modes, og_own_modes *own,
                og_grad_kind kind, PyObject *autocast)
{
    if (kind == OG_GRAD_OFF || kind == OG_GRAD_ON) {
        int inference =
            guards->is_inference == NULL ? 0 : call_flag(guards->is_inference);
        if (inference < 0) {
            return -1;
        }
        modes->inference_before = (signed char)(inference + 1);
    }
    if (enter_grad(guards, modes, kind) < 0) {
        undo(guards, modes);
        return -1;
    }
    if (own->known && restore_own(guards, modes, own, kind) < 0) {
        undo(guards, modes);
        return -1;
    }
    if (modes->autocast != NULL) {
        if (call_method(modes->autocast, "resume") < 0) {
            undo(guards, modes);
            return -1;
        }
    }
    else if (autocast != NULL) {
        return enter_autocast(guards, modes, autocast);
    }
    return 0;
}

/* Remembers what the body had switched; hides an inference mode of its own
 * that leaving ours would not end. */
static int
save_own(og_guards_state *guards, og_modes *modes, og_own_modes *own,
         og_grad_kind kind)
{
    int grad = call_flag(guards->is_grad);
    int inference = call_flag(guards->is_inference);
    if (grad < 0 || inference < 0) {
        return -1;
    }
    own->known = 1;
    own->grad = (signed char)grad;
    own->inference = (signed char)inference;
    if (kind == OG_GRAD_INFERENCE) {
        return 0;
    }
    bool now = modes->inference == NULL && modes->inference_before == 2;
    if ((bool)inference != now) {
        own->shield = make_inference(guards, now);
        return own->shield == NULL ? -1 : 0;
    }
    return 0;
}

int
og_modes_suspend(og_guards_state *guards, og_modes *modes, og_own_modes *own,
                 og_grad_kind kind)
{
    first_error first = {NULL, NULL, NULL};
    PyObject *autocast = modes->autocast;
    modes->autocast = NULL;
    if (autocast != NULL && call_method(autocast, "suspend") < 0) {
        note_error(guards, &first);
        Py_CLEAR(autocast);
    }
    if (kind != OG_GRAD_AS_IS && save_own(guards, modes, own, kind) < 0) {
        note_error(guards, &first);
    }
    if (og_modes_leave(guards, modes) < 0) {
        note_error(guards, &first);
    }
    modes->autocast = autocast;
    if (first.type != NULL) {
        PyErr_Restore(first.type, first.value, first.trace);
        return -1;
    }
    return 0;
}
