/* opguard._C.Done: an awaitable that has its answer, for `async with` blocks
 * whose lease needs no waiting. It never suspends, so that no other task runs
 * between the count and the block. */
#include "py/pool_lease.h"
#include "py/state.h"

typedef struct {
    PyObject_HEAD PyObject *value;
} DoneObject;

PyObject *
og_pool_done(og_state *state, PyObject *value)
{
    PyTypeObject *type = (PyTypeObject *)state->pool_lease.done_type;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    DoneObject *self = (DoneObject *)alloc(type, 0);
    if (self != NULL) {
        self->value = Py_NewRef(value);
    }
    return (PyObject *)self;
}

static PySendResult
Done_am_send(PyObject *object, PyObject *sent, PyObject **result)
{
    (void)sent;
    *result = Py_NewRef(((DoneObject *)object)->value);
    return PYGEN_RETURN;
}

static PyObject *
Done_next(PyObject *object)
{
    PyObject *value = ((DoneObject *)object)->value;
    PyObject *stop =
        PyObject_CallFunctionObjArgs(PyExc_StopIteration, value, NULL);
    if (stop != NULL) {
        PyErr_SetObject(PyExc_StopIteration, stop);
        Py_DECREF(stop);
    }
    return NULL;
}

static PyObject *
return_self(PyObject *object)
{
    return Py_NewRef(object);
}

static int
Done_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(((DoneObject *)object)->value);
    return 0;
}

static void
Done_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    Py_CLEAR(((DoneObject *)object)->value);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyType_Slot Done_slots[] = {
    {Py_tp_doc, (void *)"An awaitable that does not wait."},
    {Py_tp_iter, (void *)return_self},
    {Py_tp_iternext, (void *)Done_next},
    {Py_am_await, (void *)return_self},
    {Py_am_send, (void *)Done_am_send},
    {Py_tp_traverse, (void *)Done_traverse},
    {Py_tp_dealloc, (void *)Done_dealloc},
    {0, NULL},
};

static PyType_Spec Done_spec = {
    .name = "opguard._C.Done",
    .basicsize = sizeof(DoneObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
             Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Done_slots,
};

int
og_pool_done_exec(PyObject *module, og_state *state)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &Done_spec, NULL);
    state->pool_lease.done_type = type;
    return type == NULL ? -1 : 0;
}
