/* DeviceDriver, one GPU through the CUDA driver; DeviceEvent, a point in what
 * was queued on it. */
#include "py/pool_arena.h"

#include "py/state.h"

#include <structmember.h>

typedef struct EventObject {
    PyObject_HEAD DriverObject *driver;
    og_cu_event event; /* NULL: all was done already */
} EventObject;

PyObject *
og_arena_raise(const og_error *err)
{
    PyObject *type = PyExc_RuntimeError;
    if (err->status == OG_NO_MEMORY) {
        type = PyExc_MemoryError;
    }
    else if (err->status == OG_BAD_ARGUMENT) {
        type = PyExc_ValueError;
    }
    else if (err->status == OG_NOT_FOUND) {
        type = PyExc_OSError;
    }
    PyErr_SetString(type, err->message);
    return NULL;
}

og_arena_state *
og_arena_state_of(PyTypeObject *type)
{
    return &((og_state *)PyType_GetModuleState(type))->arena;
}

void
og_arena_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(self);
    Py_DECREF(type);
}

/* --- DeviceDriver -------------------------------------------------------- */

/* A stream as an int, as torch's `Stream.cuda_stream` is; 0: the default. */
static bool
as_stream(PyObject *value, og_cu_stream *stream)
{
    unsigned long long number = PyLong_AsUnsignedLongLong(value);
    *stream = (og_cu_stream)(uintptr_t)number;
    return PyErr_Occurred() == NULL;
}

/* Names the streams that may capture; false with an exception. */
static bool
watch(og_device *device, PyObject *streams)
{
    PyObject *list = PySequence_List(streams);
    Py_ssize_t count = list == NULL ? 0 : PyList_Size(list);
    og_cu_stream *found = PyMem_Calloc((size_t)count + 1, sizeof *found);
    og_error err = {OG_OK, ""};
    bool done = list != NULL && found != NULL;
    if (list != NULL && found == NULL) {
        PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; done && i < count; i++) {
        done = as_stream(PyList_GetItem(list, i), &found[i]);
    }
    if (done && og_device_watch(device, found, (size_t)count, &err) != OG_OK) {
        og_arena_raise(&err);
        done = false;
    }
    PyMem_Free(found);
    Py_XDECREF(list);
    return done;
}

static PyObject *
Driver_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"library", "ordinal", "ring", "streams", NULL};
    PyObject *library = Py_None, *path = NULL, *streams = NULL;
    int ordinal = 0;
    long long ring = 32 << 20;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|OiLO:DeviceDriver", names,
                                     &library, &ordinal, &ring, &streams)) {
        return NULL;
    }
    if (library != Py_None && !PyUnicode_FSConverter(library, &path)) {
        return NULL;
    }
    const char *name = path == NULL ? NULL : PyBytes_AsString(path);
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    DriverObject *self = (DriverObject *)allocate(type, 0);
    if (self != NULL) {
        og_error err = {OG_OK, ""};
        og_status status;
        Py_BEGIN_ALLOW_THREADS
            status = og_device_open(name, ordinal, ring, &self->device, &err);
        Py_END_ALLOW_THREADS
        if (status != OG_OK) {
            og_arena_raise(&err);
        }
        if (status != OG_OK ||
            (streams != NULL && !watch(self->device, streams))) {
            Py_DECREF((PyObject *)self);
            self = NULL;
        }
    }
    Py_XDECREF(path);
    return (PyObject *)self;
}

static int
Driver_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    return 0;
}

static void
Driver_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    /* It waits for the last copies. */
    Py_BEGIN_ALLOW_THREADS
        og_device_close(((DriverObject *)self)->device);
    Py_END_ALLOW_THREADS
    og_arena_dealloc(self);
}

PyDoc_STRVAR(memory_doc,
             "memory($self, /)\n--\n\n"
             "(free, total) bytes of the GPU, whoever uses the rest.\n\n"
             "Raises RuntimeError where the driver fails.");

static PyObject *
Driver_memory(PyObject *self, PyObject *unused)
{
    (void)unused;
    int64_t available = 0, total = 0;
    og_error err = {OG_OK, ""};
    og_status status;
    Py_BEGIN_ALLOW_THREADS
        status = og_device_memory(((DriverObject *)self)->device, &available,
                                  &total, &err);
    Py_END_ALLOW_THREADS
    return status != OG_OK
               ? og_arena_raise(&err)
               : Py_BuildValue("(LL)", (long long)available, (long long)total);
}

PyDoc_STRVAR(capturing_doc,
             "capturing($self, /)\n--\n\n"
             "Whether a CUDA graph is being captured on one of the streams "
             "that were named\nwhen the driver was opened.\n\n"
             "Raises RuntimeError where the driver fails.");

static PyObject *
Driver_capturing(PyObject *self, PyObject *unused)
{
    (void)unused;
    bool captures = false;
    og_error err = {OG_OK, ""};
    og_status status;
    Py_BEGIN_ALLOW_THREADS
        status = og_device_capturing(((DriverObject *)self)->device, &captures,
                                     &err);
    Py_END_ALLOW_THREADS
    return status == OG_OK ? PyBool_FromLong(captures) : og_arena_raise(&err);
}

static PyObject *
new_event(PyObject *self, og_mark mark, og_cu_stream stream)
{
    DriverObject *driver = (DriverObject *)self;
    PyTypeObject *type =
        (PyTypeObject *)og_arena_state_of(Py_TYPE(self))->event_type;
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    EventObject *event = (EventObject *)allocate(type, 0);
    og_error err = {OG_OK, ""};
    og_status status;
    if (event == NULL) {
        return NULL;
    }
    event->driver = (DriverObject *)Py_NewRef(self);
    Py_BEGIN_ALLOW_THREADS
        status =
            og_event_record(driver->device, mark, stream, &event->event, &err);
    Py_END_ALLOW_THREADS
    if (status != OG_OK) {
        Py_DECREF((PyObject *)event);
        return og_arena_raise(&err);
    }
    return (PyObject *)event;
}

PyDoc_STRVAR(copies_doc,
             "copies($self, /)\n--\n\n"
             "The end of all copies of arenas that were queued so far, as a "
             "DeviceEvent.\n\nRaises RuntimeError where the driver fails.");

static PyObject *
Driver_copies(PyObject *self, PyObject *unused)
{
    (void)unused;
    return new_event(self, OG_MARK_COPIES, NULL);
}

PyDoc_STRVAR(
    work_doc,
    "work($self, stream=None, /)\n--\n\n"
    "The end of what was queued so far on a stream (an int, 0 the "
    "default one),\nor on every stream of this process, as a "
    "DeviceEvent. A driver older than\n12.5 cannot mark all streams: "
    "they are waited for at once.\n\n"
    "Raises RuntimeError where the driver fails, and for every stream "
    "while `capturing()`:\nit would spoil that capture.");

static PyObject *
Driver_work(PyObject *self, PyObject *args)
{
    PyObject *value = Py_None;
    og_cu_stream stream = NULL;
    if (!PyArg_UnpackTuple(args, "work", 0, 1, &value) ||
        (value != Py_None && !as_stream(value, &stream))) {
        return NULL;
    }
    return new_event(self, value == Py_None ? OG_MARK_ALL : OG_MARK_STREAM,
                     stream);
}

static PyObject *
Driver_get_granularity(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLongLong(((DriverObject *)self)->device->granularity);
}

static PyObject *
Driver_get_ordinal(PyObject *self, void *unused)
{
    (void)unused;
    return PyLong_FromLong(((DriverObject *)self)->device->ordinal);
}

static PyMethodDef Driver_methods[] = {
    {"memory", Driver_memory, METH_NOARGS, memory_doc},
    {"capturing", Driver_capturing, METH_NOARGS, capturing_doc},
    {"copies", Driver_copies, METH_NOARGS, copies_doc},
    {"work", Driver_work, METH_VARARGS, work_doc},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef Driver_getset[] = {
    {"granularity", Driver_get_granularity, NULL,
     "Bytes that memory is mapped in; 0 where the GPU cannot map.", NULL},
    {"ordinal", Driver_get_ordinal, NULL, "Number of the GPU.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(Driver_doc,
             "DeviceDriver(library=None, ordinal=0, ring=33554432, "
             "streams=())\n--\n\n"
             "One GPU through the CUDA driver, which is opened here.\n\n"
             "library: path of the driver, None for the system's. ring: bytes "
             "of pinned\nmemory that pageable memory is copied through. "
             "streams: ints, those that CUDA\ngraphs are captured on.\n"
             "Raises OSError where there is no driver or no such GPU.");

static PyType_Slot Driver_slots[] = {
    {Py_tp_doc, (void *)Driver_doc},
    {Py_tp_new, (void *)Driver_new},
    {Py_tp_methods, Driver_methods},
    {Py_tp_getset, Driver_getset},
    {Py_tp_traverse, (void *)Driver_traverse},
    {Py_tp_dealloc, (void *)Driver_dealloc},
    {0, NULL},
};

static PyType_Spec Driver_spec = {
    .name = "opguard._C.DeviceDriver",
    .basicsize = sizeof(DriverObject),
    .flags =
        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Driver_slots,
};

PyObject *
og_driver_make_type(PyObject *module)
{
    return PyType_FromModuleAndSpec(module, &Driver_spec, NULL);
}

/* --- DeviceEvent --------------------------------------------------------- */

static int
Event_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((EventObject *)self)->driver);
    return 0;
}

static void
Event_dealloc(PyObject *self)
{
    EventObject *event = (EventObject *)self;
    PyObject_GC_UnTrack(self);
    if (event->driver != NULL) {
        og_event_free(event->driver->device, event->event);
        Py_DECREF((PyObject *)event->driver);
    }
    og_arena_dealloc(self);
}

static PyObject *
outcome(og_status status, const og_error *err)
{
    return status == OG_OK ? Py_NewRef(Py_None) : og_arena_raise(err);
}

PyDoc_STRVAR(wait_doc,
             "wait($self, /)\n--\n\n"
             "Block this thread until it is reached.\n\n"
             "Raises RuntimeError where the driver fails.");

static PyObject *
Event_wait(PyObject *self, PyObject *unused)
{
    (void)unused;
    EventObject *event = (EventObject *)self;
    og_error err = {OG_OK, ""};
    og_status status;
    Py_BEGIN_ALLOW_THREADS
        status = og_event_finish(event->driver->device, event->event, &err);
    Py_END_ALLOW_THREADS
    return outcome(status, &err);
}

PyDoc_STRVAR(done_doc,
             "done($self, /)\n--\n\n"
             "Whether it is reached; never waits.\n\n"
             "Raises RuntimeError where the driver fails.");

static PyObject *
Event_done(PyObject *self, PyObject *unused)
{
    (void)unused;
    EventObject *event = (EventObject *)self;
    og_error err = {OG_OK, ""};
    bool done = false;
    og_status status =
        og_event_done(event->driver->device, event->event, &done, &err);
    return status == OG_OK ? PyBool_FromLong(done) : og_arena_raise(&err);
}

PyDoc_STRVAR(hold_doc,
             "hold($self, stream, /)\n--\n\n"
             "Let what is queued on a stream from now on wait for it; this "
             "thread goes on.\n\nRaises RuntimeError where the driver fails.");

static PyObject *
Event_hold(PyObject *self, PyObject *value)
{
    EventObject *event = (EventObject *)self;
    og_error err = {OG_OK, ""};
    og_cu_stream stream = NULL;
    if (!as_stream(value, &stream)) {
        return NULL;
    }
    return outcome(
        og_event_hold(event->driver->device, event->event, stream, &err),
        &err);
}

static PyMethodDef Event_methods[] = {
    {"wait", Event_wait, METH_NOARGS, wait_doc},
    {"done", Event_done, METH_NOARGS, done_doc},
    {"hold", Event_hold, METH_O, hold_doc},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot Event_slots[] = {
    {Py_tp_doc, (void *)"A point in what was queued on a GPU; made by a "
                        "DeviceDriver."},
    {Py_tp_methods, Event_methods},
    {Py_tp_traverse, (void *)Event_traverse},
    {Py_tp_dealloc, (void *)Event_dealloc},
    {0, NULL},
};

static PyType_Spec Event_spec = {
    .name = "opguard._C.DeviceEvent",
    .basicsize = sizeof(EventObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
             Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Event_slots,
};

PyObject *
og_event_make_type(PyObject *module)
{
    return PyType_FromModuleAndSpec(module, &Event_spec, NULL);
}
