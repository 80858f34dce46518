/* opguard._C.Guard: a context manager and decorator whose settings are fixed
 * when it is made; each entry has its own record, so one guard may be entered
 * again while it is entered, and by several threads.
 *
 * Leaving always puts the modes back first, and a failure while leaving never
 * takes the place of the user's exception. */
#include "py/guards_object.h"
#include "py/util.h"

#include <structmember.h>

static PyObject *
optional(PyObject *args, Py_ssize_t index)
{
    PyObject *value = PyTuple_GetItem(args, index);
    return value == Py_None ? NULL : Py_NewRef(value);
}

static int
need_tuple(PyObject *value, const char *name)
{
    if (value != NULL && !PyTuple_Check(value)) {
        PyErr_Format(PyExc_TypeError,
                     "%s: expected a tuple or None, got %R; call "
                     "opguard.call_guard, which makes one",
                     name, Py_TYPE(value));
        return -1;
    }
    return 0;
}

static int
need_modules(const og_guards_state *guards, PyObject *models)
{
    for (Py_ssize_t i = 0; models != NULL && i < PyTuple_Size(models); i++) {
        PyObject *model = PyTuple_GetItem(models, i);
        if (guards->module_type == NULL ||
            !PyObject_TypeCheck(model, (PyTypeObject *)guards->module_type)) {
            PyErr_Format(PyExc_TypeError,
                         "models[%zd]: expected an nn.Module, got %R; leave "
                         "out what has no train and eval mode",
                         i, Py_TYPE(model));
            return -1;
        }
    }
    return 0;
}

/* Guard(kind, flags, models, autocast, devices, caller, on_oom, keep) */
static int
take_settings(GuardObject *self, PyObject *args)
{
    long kind = PyLong_AsLong(PyTuple_GetItem(args, 0));
    long flags = PyLong_AsLong(PyTuple_GetItem(args, 1));
    if (PyErr_Occurred()) {
        return -1;
    }
    if (kind < OG_GRAD_AS_IS || kind > OG_GRAD_ON || flags < 0 || flags > 31) {
        PyErr_Format(PyExc_ValueError,
                     "Guard: expected a kind from 0 to 3 and flags from 0 to "
                     "31, got %ld and %ld; call opguard.call_guard",
                     kind, flags);
        return -1;
    }
    self->kind = (og_grad_kind)kind;
    self->flags = (int)flags;
    self->models = optional(args, 2);
    self->autocast = optional(args, 3);
    self->devices = optional(args, 4);
    self->caller = optional(args, 5);
    self->on_oom = optional(args, 6);
    self->keep = optional(args, 7);
    if (need_tuple(self->models, "models") < 0 ||
        need_tuple(self->autocast, "autocast") < 0 ||
        need_tuple(self->keep, "keep") < 0) {
        return -1;
    }
    return need_modules(&og_guard_state(self)->guards, self->models);
}

static PyObject *
Guard_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Py_ssize_t count = PyTuple_Size(args);
    if ((count != 0 && count != 8) ||
        (kwargs != NULL && PyDict_Size(kwargs) != 0)) {
        PyErr_Format(PyExc_TypeError,
                     "Guard: expected no argument or 8 by position, got %zd; "
                     "call opguard.call_guard, which takes names",
                     count);
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    GuardObject *self = (GuardObject *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->kind = OG_GRAD_INFERENCE;
    self->flags = OG_GUARD_DETACH | OG_GUARD_SANITIZE;
    if (count != 0 && take_settings(self, args) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

og_guard_settings
og_guard_get_settings(PyObject *guard)
{
    GuardObject *self = (GuardObject *)guard;
    return (og_guard_settings){self->models, self->autocast, self->devices,
                               self->keep,   self->kind,     self->flags};
}

static PyObject *
Guard_enter(PyObject *object, PyObject *ignored)
{
    (void)ignored;
    GuardObject *self = (GuardObject *)object;
    og_entry *entry = og_guard_enter(self, og_guard_state(self), true);
    if (entry == NULL) {
        return NULL;
    }
    entry->below = self->top;
    self->top = entry;
    return Py_NewRef(object);
}

static int
raise_foreign(const GuardObject *self)
{
    PyErr_SetString(
        PyExc_RuntimeError,
        self->top == NULL
            ? "expected the guard to be entered before it is exited, it is "
              "not; use it by `with`"
            : "expected the guard to be exited in the thread that entered it, "
              "this is another and cannot leave that thread's modes; exit it "
              "there");
    return -1;
}

static PyObject *
Guard_exit(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    GuardObject *self = (GuardObject *)object;
    PyObject *error = count >= 2 ? args[1] : Py_None;
    og_entry *entry = og_guard_own_entry(self, true);
    if (entry == NULL) {
        (void)raise_foreign(self);
        if (error == Py_None || !PyExceptionInstance_Check(error)) {
            return NULL;
        }
        PyErr_WriteUnraisable(object);
        Py_RETURN_FALSE;
    }
    if (!PyExceptionInstance_Check(error)) {
        if (og_guard_exit_clean(self, og_guard_state(self), entry) < 0) {
            return NULL;
        }
        Py_RETURN_FALSE;
    }
    /* Not PyErr_SetObject, which would chain what is being handled. */
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(error)), Py_NewRef(error),
                  PyException_GetTraceback(error));
    og_guard_exit_failed(self, og_guard_state(self), entry);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    Py_RETURN_FALSE;
}

static PyObject *
Guard_call(PyObject *object, PyObject *args, PyObject *kwargs)
{
    GuardObject *self = (GuardObject *)object;
    og_state *state = og_guard_state(self);
    og_entry *entry = og_guard_own_entry(self, false);
    if (entry == NULL) {
        return og_guard_decorate(self, state, args, kwargs);
    }
    if (og_guard_measure(self, &state->guards, entry) < 0) {
        return NULL;
    }
    PyObject *result = og_guard_call_entered(self, state, args, kwargs);
    if (result == NULL && (self->flags & OG_GUARD_SANITIZE)) {
        og_guard_settings settings = og_guard_get_settings(object);
        PyObject *handled = PyErr_GetHandledException();
        settings.flags &= ~OG_GUARD_COLLECT_ON_EXCEPTION;
        og_guard_failed(state, &settings, handled);
        Py_XDECREF(handled);
    }
    return result;
}

PyDoc_STRVAR(run_doc,
             "run($self, function, args, kwargs, /)\n--\n\n"
             "function(*args, **kwargs) inside an entry of its own; what it "
             "returns is detached.");

static PyObject *
Guard_run(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    GuardObject *self = (GuardObject *)object;
    og_state *state = og_guard_state(self);
    if (count != 3 || !PyTuple_Check(args[1]) || !PyDict_Check(args[2])) {
        PyErr_SetString(PyExc_TypeError,
                        "run: expected a function, a tuple and a dict; call "
                        "the decorated function instead");
        return NULL;
    }
    og_entry *entry = og_guard_enter(self, state, false);
    if (entry == NULL) {
        return NULL;
    }
    PyObject *result =
        og_guard_call_again(self, state, args[0], args[1], args[2]);
    if (result == NULL) {
        og_guard_exit_failed(self, state, entry);
        return NULL;
    }
    if (og_guard_exit_clean(self, state, entry) < 0) {
        Py_DECREF(result);
        return NULL;
    }
    return og_guard_detach_result(self, state, result, self->models);
}

PyDoc_STRVAR(step_doc,
             "step($self, inner, yields, /)\n--\n\n"
             "What drives inner, a generator or coroutine, with the modes on "
             "only while its frames run.\n\n"
             "yields: what it hands out at a suspension is detached too.");

static PyObject *
Guard_step(PyObject *object, PyObject *const *args, Py_ssize_t count)
{
    if (count != 2) {
        PyErr_Format(PyExc_TypeError,
                     "step: expected a body and a bool, got %zd arguments; "
                     "decorate the function instead",
                     count);
        return NULL;
    }
    int yields = PyObject_IsTrue(args[1]);
    if (yields < 0) {
        return NULL;
    }
    return og_stepper_new(og_guard_state((GuardObject *)object), object,
                          args[0], yields);
}

/* For Python, which traces a guard by its settings inside torch.compile. */
static PyObject *
Guard_get_settings(PyObject *object, void *ignored)
{
    (void)ignored;
    GuardObject *self = (GuardObject *)object;
    return Py_BuildValue("(iiOOO)", (int)self->kind, self->flags,
                         self->models == NULL ? Py_None : self->models,
                         self->autocast == NULL ? Py_None : self->autocast,
                         self->caller == NULL ? Py_None : self->caller);
}

static PyObject *
Guard_get_memory(PyObject *object, void *ignored)
{
    (void)ignored;
    GuardObject *self = (GuardObject *)object;
    og_guards_state *guards = &og_guard_state(self)->guards;
    og_entry *entry = og_guard_own_entry(self, false);
    if (entry != NULL && og_guard_measure(self, guards, entry) < 0) {
        return NULL;
    }
    if (self->memory == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected a guard that has measured memory, it has "
                        "not; pass device_list= or call g(...) in its block");
        return NULL;
    }
    return Py_NewRef(self->memory);
}

/* --- the type ------------------------------------------------------------ */

static int
Guard_traverse(PyObject *object, visitproc visit, void *arg)
{
    GuardObject *self = (GuardObject *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->models);
    Py_VISIT(self->autocast);
    Py_VISIT(self->devices);
    Py_VISIT(self->caller);
    Py_VISIT(self->on_oom);
    Py_VISIT(self->keep);
    Py_VISIT(self->memory);
    for (og_entry *entry = self->top; entry != NULL; entry = entry->below) {
        Py_VISIT(entry->handled);
        Py_VISIT(entry->memory);
    }
    return 0;
}

static int
Guard_clear(PyObject *object)
{
    GuardObject *self = (GuardObject *)object;
    Py_CLEAR(self->models);
    Py_CLEAR(self->autocast);
    Py_CLEAR(self->devices);
    Py_CLEAR(self->caller);
    Py_CLEAR(self->on_oom);
    Py_CLEAR(self->keep);
    Py_CLEAR(self->memory);
    return 0;
}

static void
Guard_dealloc(PyObject *object)
{
    GuardObject *self = (GuardObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    if (self->weak_list != NULL) {
        PyObject_ClearWeakRefs(object);
    }
    if (self->top != NULL) {
        og_guard_abandon(self);
    }
    (void)Guard_clear(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyMethodDef Guard_methods[] = {
    {"__enter__", Guard_enter, METH_NOARGS,
     "__enter__($self, /)\n--\n\nEnter; returns the guard."},
    {"__exit__", (PyCFunction)(void (*)(void))Guard_exit, METH_FASTCALL,
     "__exit__($self, kind=None, error=None, trace=None, /)\n--\n\nLeave."},
    {"run", (PyCFunction)(void (*)(void))Guard_run, METH_FASTCALL, run_doc},
    {"step", (PyCFunction)(void (*)(void))Guard_step, METH_FASTCALL, step_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Guard_getset[] = {
    {"settings", Guard_get_settings, NULL,
     "(kind, flags, models, autocast, caller) as they were given.", NULL},
    {"memory", Guard_get_memory, NULL,
     "What each device held, by device: memory[device].before, .peak and "
     ".after in bytes.",
     NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Guard_members[] = {
    {"__weaklistoffset__", T_PYSSIZET, offsetof(GuardObject, weak_list),
     READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

PyDoc_STRVAR(Guard_doc,
             "Guard(kind=1, flags=3, models=None, autocast=None, "
             "devices=None, caller=None, on_oom=None, keep=None, /)\n--\n\n"
             "The guard g: made by call_guard and its parts.\n\n"
             "Inside `with`: g(model, *args) runs the model in eval and "
             "returns its result detached; g(value) returns value detached; "
             "g.memory tells what devices held. Elsewhere g(function) "
             "decorates.");

static PyType_Slot Guard_slots[] = {
    {Py_tp_doc, (void *)Guard_doc},
    {Py_tp_new, (void *)Guard_new},
    {Py_tp_call, (void *)Guard_call},
    {Py_tp_methods, Guard_methods},
    {Py_tp_getset, Guard_getset},
    {Py_tp_members, Guard_members},
    {Py_tp_traverse, (void *)Guard_traverse},
    {Py_tp_clear, (void *)Guard_clear},
    {Py_tp_dealloc, (void *)Guard_dealloc},
    {0, NULL},
};

static PyType_Spec Guard_spec = {
    .name = "opguard._C.Guard",
    .basicsize = sizeof(GuardObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Guard_slots,
};

/* --- the family ---------------------------------------------------------- */

/* clang-format off */
#define BOUND(X)                                                              \
    X(inference_type)                                                         \
    X(is_inference)                                                           \
    X(set_grad)                                                               \
    X(is_grad)                                                                \
    X(module_type)                                                            \
    X(module_train)                                                           \
    X(autocast)                                                               \
    X(decorate)                                                               \
    X(release)                                                                \
    X(measure)                                                                \
    X(is_oom)                                                                 \
    X(await_warning)
/* clang-format on */

PyDoc_STRVAR(bind_guards_doc,
             "bind_guards($module, /, **parts)\n--\n\n"
             "Say what the guards work with: torch's, or a test's own.\n\n"
             "Parts: inference_type is_inference set_grad is_grad module_type "
             "module_train autocast decorate release measure is_oom "
             "await_warning; None takes one away.\n"
             "Raises TypeError for another name.");

static PyObject **
find_part(og_guards_state *guards, PyObject *name)
{
#define PART(field)                                            \
    if (PyUnicode_CompareWithASCIIString(name, #field) == 0) { \
        return &guards->field;                                 \
    }
    BOUND(PART)
#undef PART
    return NULL;
}

static PyObject *
bind_guards(PyObject *module, PyObject *args, PyObject *kwargs)
{
    og_guards_state *guards = &og_state_get(module)->guards;
    PyObject *name, *value;
    Py_ssize_t position = 0;
    if (PyTuple_Size(args) != 0) {
        PyErr_SetString(PyExc_TypeError,
                        "bind_guards: expected parts by name only");
        return NULL;
    }
    while (kwargs != NULL && PyDict_Next(kwargs, &position, &name, &value)) {
        PyObject **slot = find_part(guards, name);
        if (slot == NULL || (slot == &guards->module_type &&
                             value != Py_None && !PyType_Check(value))) {
            PyErr_Format(PyExc_TypeError,
                         "bind_guards: expected a part of the guards, with a "
                         "class as module_type, got %R; see its help",
                         name);
            return NULL;
        }
        PyObject *old = *slot;
        *slot = value == Py_None ? NULL : Py_NewRef(value);
        Py_XDECREF(old);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(guard_sanitize_doc,
             "guard_sanitize($module, error, handled, keep, /)\n--\n\n"
             "Sanitize error as a guard does when it is left by it.\n\n"
             "handled: what the caller was handling before, or None. keep: a "
             "tuple of exception types that are left as they are, or None.");

static PyObject *
guard_sanitize(PyObject *module, PyObject *args)
{
    PyObject *error, *handled, *keep;
    if (!PyArg_ParseTuple(args, "OOO:guard_sanitize", &error, &handled,
                          &keep)) {
        return NULL;
    }
    if (!PyExceptionInstance_Check(error) ||
        need_tuple(keep == Py_None ? NULL : keep, "keep") < 0) {
        if (!PyErr_Occurred()) {
            PyErr_Format(PyExc_TypeError,
                         "error: expected an exception, got %R; pass the one "
                         "that was caught",
                         Py_TYPE(error));
        }
        return NULL;
    }
    og_sanitize_exit(og_state_get(module), error,
                     PyExceptionInstance_Check(handled) ? handled : NULL,
                     keep == Py_None ? NULL : keep);
    Py_RETURN_NONE;
}

static int
guards_exec(PyObject *module, og_state *state)
{
    og_guards_state *guards = &state->guards;
    if (og_intern(&guards->name_training, "training") < 0 ||
        og_intern(&guards->name_modules, "_modules") < 0 ||
        og_intern(&guards->name_train, "train") < 0 ||
        og_leases_exec(guards) < 0) {
        return -1;
    }
    guards->guard_type = PyType_FromModuleAndSpec(module, &Guard_spec, NULL);
    if (guards->guard_type == NULL ||
        PyModule_AddObjectRef(module, "Guard", guards->guard_type) < 0) {
        return -1;
    }
    return og_stepper_exec(module, state);
}

static int
guards_traverse(og_state *state, visitproc visit, void *arg)
{
#define VISIT(field) Py_VISIT(state->guards.field);
    BOUND(VISIT)
#undef VISIT
    Py_VISIT(state->guards.guard_type);
    Py_VISIT(state->guards.stepper_type);
    Py_VISIT(state->guards.running_loop);
    return 0;
}

static int
guards_clear(og_state *state)
{
#define CLEAR(field) Py_CLEAR(state->guards.field);
    BOUND(CLEAR)
#undef CLEAR
    Py_CLEAR(state->guards.guard_type);
    Py_CLEAR(state->guards.stepper_type);
    Py_CLEAR(state->guards.running_loop);
    Py_CLEAR(state->guards.name_training);
    Py_CLEAR(state->guards.name_modules);
    Py_CLEAR(state->guards.name_train);
    og_leases_clear(&state->guards);
    return 0;
}

static PyMethodDef guards_methods[] = {
    {"bind_guards", (PyCFunction)(void (*)(void))bind_guards,
     METH_VARARGS | METH_KEYWORDS, bind_guards_doc},
    {"guard_sanitize", guard_sanitize, METH_VARARGS, guard_sanitize_doc},
    {NULL, NULL, 0, NULL},
};

const og_family og_guards_family = {
    .methods = guards_methods,
    .exec = guards_exec,
    .traverse = guards_traverse,
    .clear = guards_clear,
};
