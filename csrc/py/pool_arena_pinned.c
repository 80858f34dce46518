/* PinnedMemory: host memory that arenas copy from and to. */
#include "py/pool_arena.h"

#include <string.h>

bool
og_arena_take(bool *busy)
{
    if (*busy) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected one call at a time, another thread is at "
                        "work on this memory");
        return false;
    }
    return *busy = true;
}

DriverObject *
og_arena_arguments(PyTypeObject *type, PyObject *args, PyObject *kwargs,
                   long long *nbytes)
{
    static char *names[] = {"driver", "nbytes", NULL};
    PyObject *driver = NULL;
    PyObject *expected = og_arena_state_of(type)->driver_type;
    return PyArg_ParseTupleAndKeywords(args, kwargs, "O!L", names, expected,
                                       &driver, nbytes)
               ? (DriverObject *)driver
               : NULL;
}

static PyObject *
Pinned_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    long long nbytes = 0;
    DriverObject *driver = og_arena_arguments(type, args, kwargs, &nbytes);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PinnedObject *self =
        driver == NULL ? NULL : (PinnedObject *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->driver = (DriverObject *)Py_NewRef((PyObject *)driver);
    og_error err = {OG_OK, ""};
    og_status status;
    Py_BEGIN_ALLOW_THREADS
        status = og_pinned_new(driver->device, nbytes, &self->pinned, &err);
    Py_END_ALLOW_THREADS
    if (status != OG_OK) {
        og_arena_raise(&err);
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    return (PyObject *)self;
}

static int
Pinned_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((PinnedObject *)self)->driver);
    return 0;
}

static void
Pinned_dealloc(PyObject *object)
{
    PinnedObject *self = (PinnedObject *)object;
    PyObject_GC_UnTrack(object);
    Py_BEGIN_ALLOW_THREADS
        og_pinned_free(self->pinned);
    Py_END_ALLOW_THREADS
    Py_XDECREF((PyObject *)self->driver);
    og_arena_dealloc(object);
}

bool
og_pinned_take(PinnedObject *self)
{
    if (self->pinned == NULL) {
        PyErr_SetString(PyExc_ValueError,
                        "expected pinned memory that is open, it was closed");
        return false;
    }
    return og_arena_take(&self->busy);
}

PyDoc_STRVAR(close_doc,
             "close($self, /)\n--\n\n"
             "Give the memory back, after the copies that are queued; closed "
             "again is nothing.\n\nRaises RuntimeError while another thread "
             "works on it.");

static PyObject *
Pinned_close(PyObject *object, PyObject *unused)
{
    (void)unused;
    PinnedObject *self = (PinnedObject *)object;
    if (self->pinned != NULL) {
        if (!og_arena_take(&self->busy)) {
            return NULL;
        }
        og_pinned *pinned = self->pinned;
        self->pinned = NULL;
        Py_BEGIN_ALLOW_THREADS
            og_pinned_free(pinned);
        Py_END_ALLOW_THREADS
        self->busy = false;
    }
    Py_RETURN_NONE;
}

/* at and a buffer that lies whole in the block; the buffer is taken. */
static bool
read_range(PinnedObject *self, PyObject *args, bool writable, int64_t *at,
           Py_buffer *buffer)
{
    long long from = 0;
    const char *format = writable ? "Lw*" : "Ly*";
    if (!PyArg_ParseTuple(args, format, &from, buffer)) {
        return false;
    }
    if (!og_pinned_take(self)) {
        PyBuffer_Release(buffer);
        return false;
    }
    og_error err = {OG_OK, ""};
    if (og_device_check_process(self->driver->device, &err) != OG_OK) {
        og_arena_raise(&err);
        PyBuffer_Release(buffer);
        self->busy = false;
        return false;
    }
    int64_t nbytes = self->pinned->nbytes;
    if (from < 0 || from > nbytes || buffer->len > nbytes - from) {
        PyErr_Format(PyExc_ValueError,
                     "expected %zd bytes from %lld to lie in a pinned block "
                     "of %lld",
                     buffer->len, from, (long long)nbytes);
        PyBuffer_Release(buffer);
        self->busy = false;
        return false;
    }
    *at = from;
    return true;
}

PyDoc_STRVAR(fill_doc,
             "fill($self, at, source, /)\n--\n\n"
             "Copy a buffer into the block, from byte `at` on.\n\n"
             "Raises ValueError where it does not fit.");

static PyObject *
Pinned_fill(PyObject *object, PyObject *args)
{
    PinnedObject *self = (PinnedObject *)object;
    Py_buffer source;
    int64_t at = 0;
    if (!read_range(self, args, false, &at, &source)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        memcpy(self->pinned->memory + at, source.buf, (size_t)source.len);
    Py_END_ALLOW_THREADS
    self->busy = false;
    PyBuffer_Release(&source);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(pour_doc,
             "pour($self, at, target, /)\n--\n\n"
             "Copy the block from byte `at` on into a buffer, only where they "
             "differ;\nreturns the bytes of the 4096-byte blocks written."
             "\n\nRaises ValueError where the block has not so many bytes.");

static PyObject *
Pinned_pour(PyObject *object, PyObject *args)
{
    PinnedObject *self = (PinnedObject *)object;
    Py_buffer target;
    int64_t at = 0, changed;
    if (!read_range(self, args, true, &at, &target)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        changed =
            og_copy_changed(target.buf, self->pinned->memory + at, target.len);
    Py_END_ALLOW_THREADS
    self->busy = false;
    PyBuffer_Release(&target);
    return PyLong_FromLongLong(changed);
}

static PyObject *
Pinned_get_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    og_pinned *pinned = ((PinnedObject *)self)->pinned;
    return PyLong_FromLongLong(pinned == NULL ? 0 : pinned->nbytes);
}

static PyMethodDef Pinned_methods[] = {
    {"close", Pinned_close, METH_NOARGS, close_doc},
    {"fill", Pinned_fill, METH_VARARGS, fill_doc},
    {"pour", Pinned_pour, METH_VARARGS, pour_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Pinned_getset[] = {
    {"nbytes", Pinned_get_nbytes, NULL, "Bytes; 0 once it is closed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(Pinned_doc,
             "PinnedMemory(driver, nbytes)\n--\n\n"
             "Host memory of exactly so many bytes that the GPU copies from "
             "and to by itself.\n\n"
             "Raises MemoryError where the host has none, ValueError for less "
             "than a byte.");

static PyType_Slot Pinned_slots[] = {
    {Py_tp_doc, (void *)Pinned_doc},
    {Py_tp_new, (void *)Pinned_new},
    {Py_tp_methods, Pinned_methods},
    {Py_tp_getset, Pinned_getset},
    {Py_tp_traverse, (void *)Pinned_traverse},
    {Py_tp_dealloc, (void *)Pinned_dealloc},
    {0, NULL},
};

static PyType_Spec Pinned_spec = {
    .name = "opguard._C.PinnedMemory",
    .basicsize = sizeof(PinnedObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Pinned_slots,
};

PyObject *
og_pinned_make_type(PyObject *module)
{
    return PyType_FromModuleAndSpec(module, &Pinned_spec, NULL);
}
