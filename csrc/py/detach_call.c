/* The object a registered function gets as `detach`: called with a part of
 * the value, it goes on with the walk it belongs to. */
#include "py/detach_call.h"

typedef struct CallObject {
    PyObject_HEAD og_walk *walk; /* borrowed; NULL when the walk is over */
    unsigned long thread;
} CallObject;

static PyObject *
Call_call(PyObject *self, PyObject *args, PyObject *kwargs)
{
    CallObject *call = (CallObject *)self;
    PyObject *value = NULL;
    if (kwargs != NULL && PyDict_Size(kwargs) > 0) {
        PyErr_SetString(PyExc_TypeError,
                        "expected detach(value) without keywords");
        return NULL;
    }
    if (!PyArg_UnpackTuple(args, "detach", 1, 1, &value)) {
        return NULL;
    }
    if (call->walk == NULL || call->thread != PyThread_get_thread_ident()) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected detach to be called while its registered "
                        "function runs and in its thread; use "
                        "opguard.detach_to_cpu elsewhere");
        return NULL;
    }
    if (Py_EnterRecursiveCall(" in a function of register_detach")) {
        return NULL;
    }
    PyObject *result = og_walk_run(call->walk, value);
    Py_LeaveRecursiveCall();
    return result;
}

static void
Call_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

static PyType_Slot Call_slots[] = {
    {Py_tp_call, (void *)Call_call},
    {Py_tp_dealloc, (void *)Call_dealloc},
    {Py_tp_doc, (void *)"Detaches a part of the value a registered function "
                        "was given."},
    {0, NULL},
};

static PyType_Spec Call_spec = {
    .name = "opguard._C.DetachPart",
    .basicsize = sizeof(CallObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION |
             Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Call_slots,
};

PyObject *
og_call_type(PyObject *module)
{
    return PyType_FromModuleAndSpec(module, &Call_spec, NULL);
}

PyObject *
og_call_new(og_walk *walk)
{
    if (walk->call == NULL) {
        PyTypeObject *type = (PyTypeObject *)walk->state->detach.call_type;
        allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
        CallObject *call = (CallObject *)allocate(type, 0);
        if (call == NULL) {
            return NULL;
        }
        call->walk = walk;
        call->thread = PyThread_get_thread_ident();
        walk->call = (PyObject *)call;
    }
    return walk->call;
}

void
og_call_end(og_walk *walk)
{
    if (walk->call != NULL) {
        ((CallObject *)walk->call)->walk = NULL;
    }
}
