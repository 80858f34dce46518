/* DeviceArena, addresses on a GPU whose memory comes and goes, and tensors
 * over it; the family of all that arenas need. */
#include "py/pool_arena.h"

#include "py/dlpack.h"
#include "py/state.h"

#include <stdlib.h>

typedef struct ArenaObject {
    PyObject_HEAD DriverObject *driver;
    og_arena *arena; /* NULL only while it is made */
    bool busy;
} ArenaObject;

/* --- DeviceArena --------------------------------------------------------- */

static PyObject *
Arena_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    long long nbytes = 0;
    DriverObject *driver = og_arena_arguments(type, args, kwargs, &nbytes);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    ArenaObject *self =
        driver == NULL ? NULL : (ArenaObject *)allocate(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->driver = (DriverObject *)Py_NewRef((PyObject *)driver);
    og_error err = {OG_OK, ""};
    if (og_arena_new(driver->device, nbytes, &self->arena, &err) != OG_OK) {
        og_arena_raise(&err);
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    return (PyObject *)self;
}

static int
Arena_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((ArenaObject *)self)->driver);
    return 0;
}

static void
Arena_dealloc(PyObject *object)
{
    ArenaObject *self = (ArenaObject *)object;
    PyObject_GC_UnTrack(object);
    /* It waits for what is queued, which may need the GIL to get on. */
    Py_BEGIN_ALLOW_THREADS
        og_arena_free(self->arena);
    Py_END_ALLOW_THREADS
    Py_XDECREF((PyObject *)self->driver);
    og_arena_dealloc(object);
}

typedef og_status (*part_function)(og_arena *, int64_t, int64_t, og_error *);

static PyObject *
change_part(PyObject *object, PyObject *args, part_function function)
{
    ArenaObject *self = (ArenaObject *)object;
    long long start = 0, end = 0;
    og_error err = {OG_OK, ""};
    og_status status;
    if (!PyArg_ParseTuple(args, "LL", &start, &end) ||
        !og_arena_take(&self->busy)) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        status = function(self->arena, start, end, &err);
    Py_END_ALLOW_THREADS
    self->busy = false;
    return status == OG_OK ? Py_NewRef(Py_None) : og_arena_raise(&err);
}

PyDoc_STRVAR(
    map_doc,
    "map($self, start, end, /)\n--\n\n"
    "Put memory behind the bytes [start, end), multiples of the "
    "granularity.\n\n"
    "Raises MemoryError where the GPU has none left, and then nothing "
    "has changed;\nValueError for a part that has memory already.");

static PyObject *
Arena_map(PyObject *self, PyObject *args)
{
    return change_part(self, args, og_arena_map);
}

PyDoc_STRVAR(
    unmap_doc,
    "unmap($self, start, end, /)\n--\n\n"
    "Give the memory of a part back that was mapped by these numbers; "
    "nothing\nthat is queued may still use it.\n\n"
    "Raises ValueError for another part.");

static PyObject *
Arena_unmap(PyObject *self, PyObject *args)
{
    return change_part(self, args, og_arena_unmap);
}

static PyObject *
copy_pinned(PyObject *object, PyObject *args, bool in)
{
    ArenaObject *self = (ArenaObject *)object;
    PyObject *other = NULL;
    PyObject *expected = og_arena_state_of(Py_TYPE(object))->pinned_type;
    long long start = 0, at = 0, nbytes = 0;
    og_error err = {OG_OK, ""};
    og_status status;
    if (!PyArg_ParseTuple(args, "LO!LL", &start, expected, &other, &at,
                          &nbytes)) {
        return NULL;
    }
    PinnedObject *pinned = (PinnedObject *)other;
    if (!og_pinned_take(pinned)) {
        return NULL;
    }
    if (pinned->driver != self->driver) {
        PyErr_SetString(PyExc_ValueError,
                        "expected pinned memory of the arena's own driver");
        pinned->busy = false;
        return NULL;
    }
    if (!og_arena_take(&self->busy)) {
        pinned->busy = false;
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        status = in ? og_arena_copy_in(self->arena, start, pinned->pinned, at,
                                       nbytes, &err)
                    : og_arena_copy_out(self->arena, start, pinned->pinned, at,
                                        nbytes, &err);
    Py_END_ALLOW_THREADS
    self->busy = pinned->busy = false;
    return status == OG_OK ? Py_NewRef(Py_None) : og_arena_raise(&err);
}

PyDoc_STRVAR(copy_in_doc,
             "copy_in($self, start, pinned, at, nbytes, /)\n--\n\n"
             "Queue one copy from pinned memory, on the driver's side stream; "
             "both stay until\n`driver.copies()` is reached.\n\n"
             "Raises ValueError where a range has no memory, RuntimeError "
             "where the driver fails.");

static PyObject *
Arena_copy_in(PyObject *self, PyObject *args)
{
    return copy_pinned(self, args, true);
}

PyDoc_STRVAR(copy_out_doc,
             "copy_out($self, start, pinned, at, nbytes, /)\n--\n\n"
             "Queue one copy into pinned memory; see copy_in.");

static PyObject *
Arena_copy_out(PyObject *self, PyObject *args)
{
    return copy_pinned(self, args, false);
}

PyDoc_STRVAR(stage_in_doc,
             "stage_in($self, start, source, /)\n--\n\n"
             "Copy a buffer in through the driver's ring; the buffer is free "
             "when it returns,\nthe last copies may be on their way.\n\n"
             "Raises ValueError where the arena has no memory there, "
             "RuntimeError where\nthe driver fails.");

static PyObject *
Arena_stage_in(PyObject *object, PyObject *args)
{
    ArenaObject *self = (ArenaObject *)object;
    long long start = 0;
    Py_buffer source;
    og_error err = {OG_OK, ""};
    og_status status;
    if (!PyArg_ParseTuple(args, "Ly*", &start, &source)) {
        return NULL;
    }
    if (!og_arena_take(&self->busy)) {
        PyBuffer_Release(&source);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        status = og_arena_stage_in(self->arena, start, source.buf, source.len,
                                   &err);
    Py_END_ALLOW_THREADS
    self->busy = false;
    PyBuffer_Release(&source);
    return status == OG_OK ? Py_NewRef(Py_None) : og_arena_raise(&err);
}

PyDoc_STRVAR(
    stage_out_doc,
    "stage_out($self, start, target, /)\n--\n\n"
    "Copy out through the ring into a buffer, only where they differ; "
    "returns the\nbytes of the 4096-byte blocks written.\n\n"
    "Raises ValueError where the arena has no memory there, "
    "RuntimeError where\nthe driver fails.");

static PyObject *
Arena_stage_out(PyObject *object, PyObject *args)
{
    ArenaObject *self = (ArenaObject *)object;
    long long start = 0;
    Py_buffer target;
    int64_t changed = 0;
    og_error err = {OG_OK, ""};
    og_status status;
    if (!PyArg_ParseTuple(args, "Lw*", &start, &target)) {
        return NULL;
    }
    if (!og_arena_take(&self->busy)) {
        PyBuffer_Release(&target);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        status = og_arena_stage_out(self->arena, start, target.buf, target.len,
                                    &changed, &err);
    Py_END_ALLOW_THREADS
    self->busy = false;
    PyBuffer_Release(&target);
    return status == OG_OK ? PyLong_FromLongLong(changed)
                           : og_arena_raise(&err);
}

/* --- tensors over an arena ----------------------------------------------- */

typedef struct lent {
    og_dlpack_managed managed;
    int64_t shape[1];
    int64_t strides[1];
} lent;

/* Whoever drops the last tensor may do so without the GIL. */
static void
lent_free(og_dlpack_managed *managed)
{
    if (Py_IsInitialized()) {
        PyGILState_STATE gil = PyGILState_Ensure();
        Py_DECREF((PyObject *)managed->context);
        PyGILState_Release(gil);
    }
    free(managed);
}

#define CAPSULE "dltensor_versioned"

/* A capsule that nobody made a tensor of still has its first name. */
static void
capsule_free(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, CAPSULE)) {
        lent_free(PyCapsule_GetPointer(capsule, CAPSULE));
    }
}

PyDoc_STRVAR(dlpack_doc,
             "dlpack($self, start, nbytes, device_type, /)\n--\n\n"
             "Bytes of the arena as a DLPack capsule of uint8, whether they "
             "have memory now\nor not; device_type 2 is CUDA, 1 the host (an "
             "emulated driver's).\nThe arena lives as long as what is made of "
             "it.\n\nRaises ValueError where the arena is shorter.");

static PyObject *
Arena_dlpack(PyObject *object, PyObject *args)
{
    ArenaObject *self = (ArenaObject *)object;
    long long start = 0, nbytes = 0;
    int kind = 0;
    if (!PyArg_ParseTuple(args, "LLi", &start, &nbytes, &kind)) {
        return NULL;
    }
    if (start < 0 || nbytes < 0 || start > self->arena->nbytes ||
        nbytes > self->arena->nbytes - start) {
        return PyErr_Format(PyExc_ValueError,
                            "expected %lld bytes from %lld to lie in an arena "
                            "of %lld",
                            nbytes, start, (long long)self->arena->nbytes);
    }
    lent *one = calloc(1, sizeof *one);
    if (one == NULL) {
        return PyErr_NoMemory();
    }
    uintptr_t address = (uintptr_t)self->arena->address + (uintptr_t)start;
    one->managed.version.major = OG_DLPACK_MAJOR;
    one->managed.context = object;
    one->managed.deleter = lent_free;
    one->managed.tensor.data = (void *)address;
    one->managed.tensor.device_type = kind;
    one->managed.tensor.device_index =
        kind == 1 ? 0 : self->driver->device->ordinal;
    one->managed.tensor.ndim = 1;
    one->managed.tensor.code = 1; /* unsigned */
    one->managed.tensor.bits = 8;
    one->managed.tensor.lanes = 1;
    one->managed.tensor.shape = one->shape;
    one->managed.tensor.strides = one->strides;
    one->shape[0] = nbytes;
    one->strides[0] = 1;
    PyObject *capsule = PyCapsule_New(one, CAPSULE, capsule_free);
    if (capsule == NULL) {
        free(one);
        return NULL;
    }
    Py_INCREF(object);
    return capsule;
}

static PyObject *
Arena_get_address(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromUnsignedLongLong(((ArenaObject *)self)->arena->address);
}

static PyObject *
Arena_get_nbytes(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((ArenaObject *)self)->arena->nbytes);
}

static PyObject *
Arena_get_mapped(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((ArenaObject *)self)->arena->mapped);
}

static PyMethodDef Arena_methods[] = {
    {"map", Arena_map, METH_VARARGS, map_doc},
    {"unmap", Arena_unmap, METH_VARARGS, unmap_doc},
    {"copy_in", Arena_copy_in, METH_VARARGS, copy_in_doc},
    {"copy_out", Arena_copy_out, METH_VARARGS, copy_out_doc},
    {"stage_in", Arena_stage_in, METH_VARARGS, stage_in_doc},
    {"stage_out", Arena_stage_out, METH_VARARGS, stage_out_doc},
    {"dlpack", Arena_dlpack, METH_VARARGS, dlpack_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Arena_getset[] = {
    {"address", Arena_get_address, NULL, "Where it begins, for good.", NULL},
    {"nbytes", Arena_get_nbytes, NULL,
     "Bytes, a multiple of the driver's granularity.", NULL},
    {"mapped", Arena_get_mapped, NULL, "Bytes that have memory now.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(Arena_doc,
             "DeviceArena(driver, nbytes)\n--\n\n"
             "Addresses on a GPU, reserved for good; memory comes by map and "
             "goes by unmap.\n\n"
             "Raises RuntimeError where the GPU cannot map, ValueError for "
             "less than a byte.");

static PyType_Slot Arena_slots[] = {
    {Py_tp_doc, (void *)Arena_doc},
    {Py_tp_new, (void *)Arena_new},
    {Py_tp_methods, Arena_methods},
    {Py_tp_getset, Arena_getset},
    {Py_tp_traverse, (void *)Arena_traverse},
    {Py_tp_dealloc, (void *)Arena_dealloc},
    {0, NULL},
};

static PyType_Spec Arena_spec = {
    .name = "opguard._C.DeviceArena",
    .basicsize = sizeof(ArenaObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Arena_slots,
};

PyObject *
og_arena_make_type(PyObject *module)
{
    return PyType_FromModuleAndSpec(module, &Arena_spec, NULL);
}

/* --- the family ---------------------------------------------------------- */

static int
add_type(PyObject *module, PyObject **slot, PyObject *(*make)(PyObject *))
{
    *slot = make(module);
    return *slot == NULL ? -1
                         : PyModule_AddType(module, (PyTypeObject *)*slot);
}

static int
arena_exec(PyObject *module, og_state *state)
{
    og_arena_state *arena = &state->arena;
    return add_type(module, &arena->driver_type, og_driver_make_type) < 0 ||
                   add_type(module, &arena->event_type, og_event_make_type) <
                       0 ||
                   add_type(module, &arena->arena_type, og_arena_make_type) <
                       0 ||
                   add_type(module, &arena->pinned_type, og_pinned_make_type) <
                       0
               ? -1
               : 0;
}

static int
arena_traverse(og_state *state, visitproc visit, void *arg)
{
    Py_VISIT(state->arena.driver_type);
    Py_VISIT(state->arena.event_type);
    Py_VISIT(state->arena.arena_type);
    Py_VISIT(state->arena.pinned_type);
    return 0;
}

static int
arena_clear(og_state *state)
{
    Py_CLEAR(state->arena.driver_type);
    Py_CLEAR(state->arena.event_type);
    Py_CLEAR(state->arena.arena_type);
    Py_CLEAR(state->arena.pinned_type);
    return 0;
}

const og_family og_arena_family = {
    .exec = arena_exec,
    .traverse = arena_traverse,
    .clear = arena_clear,
};
