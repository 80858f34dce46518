/* _C.SpillMap: a private map of a file as a buffer, so that a tensor over it
 * keeps it alive. Everything that asks the kernel runs without the GIL. */
#include "py/pool_pages.h"

#include <errno.h>
#include <string.h>
#include <structmember.h>

#include "core/pool_pages.h"

typedef struct MapObject {
    PyObject_HEAD og_pages pages;
} MapObject;

static const char *const methods[] = {"scan", "pagemap", "compare"};

static PyObject *
raise_errno(int code)
{
    errno = code;
    return PyErr_SetFromErrno(PyExc_OSError);
}

/* A method of the three; -1 with an exception set. */
static int
method_named(const char *name)
{
    for (int i = 0; i < 3; i++) {
        if (strcmp(methods[i], name) == 0) {
            return i;
        }
    }
    PyErr_Format(PyExc_ValueError,
                 "expected method to be scan, pagemap or compare, got "
                 "'%.50s'",
                 name);
    return -1;
}

static PyObject *
Map_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"fd",      "offset", "nbytes", "method",
                               "address", "grain",  NULL};
    int fd = -1, failed = 0, grain = 1;
    long long offset = 0, nbytes = 0;
    unsigned long long address = 0;
    const char *name = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iLL|zKi:SpillMap",
                                     keywords, &fd, &offset, &nbytes, &name,
                                     &address, &grain)) {
        return NULL;
    }
    if (grain != 1 && grain != 2 && grain != 4 && grain != 8) {
        PyErr_Format(PyExc_ValueError,
                     "expected grain to be 1, 2, 4 or 8, got %d", grain);
        return NULL;
    }
    if (nbytes <= 0 || offset < 0) {
        PyErr_Format(PyExc_ValueError,
                     "expected nbytes above 0 and offset of at least 0, got "
                     "%lld and %lld",
                     nbytes, offset);
        return NULL;
    }
    int method = name == NULL ? 0 : method_named(name);
    if (method < 0) {
        return NULL;
    }
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    MapObject *self = (MapObject *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_map(&self->pages, fd, offset, (size_t)nbytes,
                              (void *)(uintptr_t)address);
    Py_END_ALLOW_THREADS
    if (name != NULL) { /* else it is the best */
        self->pages.method = (og_pages_method)method;
    }
    self->pages.grain = (size_t)grain;
    if (failed != 0) {
        Py_DECREF(self);
        return raise_errno(failed);
    }
    return (PyObject *)self;
}

static void
Map_dealloc(PyObject *op)
{
    PyTypeObject *type = Py_TYPE(op);
    MapObject *self = (MapObject *)op;
    if (self->pages.start != NULL) {
        Py_BEGIN_ALLOW_THREADS
            og_pages_unmap(&self->pages);
        Py_END_ALLOW_THREADS
    }
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(op);
    Py_DECREF(type);
}

static int
Map_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    MapObject *self = (MapObject *)op;
    return PyBuffer_FillInfo(view, op, self->pages.start,
                             (Py_ssize_t)self->pages.nbytes, 0, flags);
}

/* start and end of a method, all of the map by default; -1 with an exception
 * set. */
static int
take_range(MapObject *self, PyObject *const *args, Py_ssize_t count,
           size_t *start, size_t *end)
{
    if (count != 0 && count != 2) {
        PyErr_Format(PyExc_TypeError,
                     "expected start and end, or neither, got %zd arguments",
                     count);
        return -1;
    }
    long long range[2] = {0, (long long)self->pages.nbytes};
    for (Py_ssize_t i = 0; i < count; i++) {
        range[i] = PyLong_AsLongLong(args[i]);
        if (range[i] == -1 && PyErr_Occurred()) {
            return -1;
        }
    }
    if (range[0] < 0 || range[0] > range[1]) {
        PyErr_Format(PyExc_ValueError,
                     "expected 0 <= start <= end, got %lld and %lld", range[0],
                     range[1]);
        return -1;
    }
    *start = (size_t)range[0];
    *end = (size_t)range[1];
    return 0;
}

PyDoc_STRVAR(check_doc,
             "check($self, /)\n--\n\n"
             "OSError ESTALE where the file is not as it was mapped.");

static PyObject *
Map_check(PyObject *op, PyObject *unused)
{
    (void)unused;
    MapObject *self = (MapObject *)op;
    int failed = 0;
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_check(&self->pages);
    Py_END_ALLOW_THREADS
    return failed != 0 ? raise_errno(failed) : Py_NewRef(Py_None);
}

PyDoc_STRVAR(populate_doc,
             "populate($self, start=..., end=..., /)\n--\n\n"
             "Bring pages in; OSError ESTALE where the file is too short.");

static PyObject *
Map_populate(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    MapObject *self = (MapObject *)op;
    size_t start = 0, end = 0;
    int failed = 0;
    if (take_range(self, args, count, &start, &end) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_populate(&self->pages, start, end);
    Py_END_ALLOW_THREADS
    return failed != 0 ? raise_errno(failed) : Py_NewRef(Py_None);
}

PyDoc_STRVAR(changed_doc,
             "changed($self, start=..., end=..., /)\n--\n\n"
             "Bytes in pages that were copied on write.");

static PyObject *
Map_changed(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    MapObject *self = (MapObject *)op;
    size_t start = 0, end = 0;
    int64_t bytes = 0;
    int failed = 0;
    if (take_range(self, args, count, &start, &end) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_changed(&self->pages, start, end, &bytes);
    Py_END_ALLOW_THREADS
    return failed != 0 ? raise_errno(failed) : PyLong_FromLongLong(bytes);
}

PyDoc_STRVAR(resident_doc,
             "resident($self, start=..., end=..., /)\n--\n\n"
             "Bytes in pages that this process holds.");

static PyObject *
Map_resident(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    MapObject *self = (MapObject *)op;
    size_t start = 0, end = 0;
    int64_t bytes = 0;
    int failed = 0;
    if (take_range(self, args, count, &start, &end) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_resident(&self->pages, start, end, &bytes);
    Py_END_ALLOW_THREADS
    return failed != 0 ? raise_errno(failed) : PyLong_FromLongLong(bytes);
}

PyDoc_STRVAR(give_back_doc,
             "give_back($self, start=..., end=..., /)\n--\n\n"
             "Put changed pages into the file, then give all back; the bytes "
             "written.\n\nAfter an OSError what was changed is still in "
             "memory. Where the file must not\nbe written changed pages "
             "stay.");

static PyObject *
Map_give_back(PyObject *op, PyObject *const *args, Py_ssize_t count)
{
    MapObject *self = (MapObject *)op;
    size_t start = 0, end = 0;
    int64_t bytes = 0;
    int failed = 0;
    if (take_range(self, args, count, &start, &end) < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_give_back(&self->pages, start, end, &bytes);
    Py_END_ALLOW_THREADS
    return failed != 0 ? raise_errno(failed) : PyLong_FromLongLong(bytes);
}

PyDoc_STRVAR(move_doc,
             "move($self, fd, /)\n--\n\n"
             "Go over to another file, a copy of the present one: changed "
             "pages are written\nthere. The bytes written.");

static PyObject *
Map_move(PyObject *op, PyObject *other)
{
    MapObject *self = (MapObject *)op;
    int64_t bytes = 0;
    int failed = 0, fd = PyObject_AsFileDescriptor(other);
    if (fd < 0) {
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
        failed = og_pages_move(&self->pages, fd, &bytes);
    Py_END_ALLOW_THREADS
    return failed != 0 ? raise_errno(failed) : PyLong_FromLongLong(bytes);
}

static PyObject *
Map_fileno(PyObject *op, PyObject *unused)
{
    (void)unused;
    return PyLong_FromLong(((MapObject *)op)->pages.fd);
}

static PyMethodDef Map_methods[] = {
    {"check", Map_check, METH_NOARGS, check_doc},
    {"populate", (PyCFunction)(void (*)(void))Map_populate, METH_FASTCALL,
     populate_doc},
    {"changed", (PyCFunction)(void (*)(void))Map_changed, METH_FASTCALL,
     changed_doc},
    {"resident", (PyCFunction)(void (*)(void))Map_resident, METH_FASTCALL,
     resident_doc},
    {"give_back", (PyCFunction)(void (*)(void))Map_give_back, METH_FASTCALL,
     give_back_doc},
    {"move", Map_move, METH_O, move_doc},
    {"fileno", Map_fileno, METH_NOARGS,
     "fileno($self, /)\n--\n\nThe descriptor that the map holds."},
    {NULL, NULL, 0, NULL},
};

static PyObject *
Map_get_address(PyObject *op, void *unused)
{
    (void)unused;
    return PyLong_FromVoidPtr(((MapObject *)op)->pages.start);
}

static PyObject *
Map_get_nbytes(PyObject *op, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(((MapObject *)op)->pages.nbytes);
}

static PyObject *
Map_get_broken(PyObject *op, void *unused)
{
    (void)unused;
    return PyBool_FromLong(og_pages_broken(&((MapObject *)op)->pages));
}

static PyObject *
Map_get_method(PyObject *op, void *unused)
{
    (void)unused;
    return PyUnicode_FromString(methods[((MapObject *)op)->pages.method]);
}

static PyObject *
Map_get_grain(PyObject *op, void *unused)
{
    (void)unused;
    return PyLong_FromSize_t(((MapObject *)op)->pages.grain);
}

static PyObject *
Map_get_writable(PyObject *op, void *unused)
{
    (void)unused;
    return PyBool_FromLong(og_pages_writable(&((MapObject *)op)->pages));
}

static PyGetSetDef Map_getset[] = {
    {"address", Map_get_address, NULL, "Where the map starts.", NULL},
    {"nbytes", Map_get_nbytes, NULL, "As asked for, in bytes.", NULL},
    {"broken", Map_get_broken, NULL,
     "Whether bytes were read that the file no longer has.", NULL},
    {"grain", Map_get_grain, NULL, "Bytes of the smallest element.", NULL},
    {"method", Map_get_method, NULL, "How changed pages are found.", NULL},
    {"writable", Map_get_writable, NULL,
     "Whether changed pages can go into the file.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyDoc_STRVAR(
    Map_doc,
    "SpillMap(fd, offset, nbytes, method=None, address=0, grain=1)\n--\n\n"
    "nbytes of a file from offset on, mapped privately: a buffer.\n\n"
    "With an address the map is there already and stays its owner's: nothing "
    "is\nwritten to its file. grain: bytes of the smallest element in it; of "
    "two writes\nthat come together as pages go, whole elements are taken.");

static PyType_Slot Map_slots[] = {
    {Py_tp_doc, (void *)Map_doc},
    {Py_tp_new, (void *)Map_new},
    {Py_tp_dealloc, (void *)Map_dealloc},
    {Py_tp_methods, Map_methods},
    {Py_tp_getset, Map_getset},
    {Py_bf_getbuffer, (void *)Map_getbuffer},
    {0, NULL},
};

static PyType_Spec Map_spec = {
    .name = "opguard._C.SpillMap",
    .basicsize = sizeof(MapObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Map_slots,
};

static int
pool_pages_exec(PyObject *module, struct og_state *state)
{
    (void)state;
    PyObject *type = PyType_FromModuleAndSpec(module, &Map_spec, NULL);
    if (type == NULL) {
        return -1;
    }
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

const og_family og_pool_pages_family = {
    .exec = pool_pages_exec,
};
