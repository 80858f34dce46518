/* exchange_paths: two names of one file system change places in one step,
 * which Python's os module has no name for. Nothing here follows symbolic
 * links. */
#include "py/files.h"

#include <errno.h>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <stdio.h>
#endif

/* Linux's RENAME_EXCHANGE, of a header that older C libraries lack. */
#define EXCHANGE 2u

/* 0, or -1 with errno set. */
static int
exchange(const char *first, const char *second)
{
#if defined(__linux__) && defined(SYS_renameat2)
    return (int)syscall(SYS_renameat2, AT_FDCWD, first, AT_FDCWD, second,
                        EXCHANGE);
#elif defined(__APPLE__)
    return renamex_np(first, second, RENAME_SWAP);
#else
    (void)first;
    (void)second;
    errno = ENOSYS;
    return -1;
#endif
}

PyDoc_STRVAR(exchange_paths_doc,
             "exchange_paths($module, first, second, /)\n--\n\n"
             "Let two paths of one file system change places in one step.\n\n"
             "Raises OSError: FileNotFoundError when one of them is not "
             "there, and\nwith errno EINVAL, ENOSYS or ENOTSUP where the "
             "file system cannot do it.");

static PyObject *
exchange_paths(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *first = NULL, *second = NULL, *result = NULL;
    if (!PyArg_ParseTuple(args, "O&O&:exchange_paths", PyUnicode_FSConverter,
                          &first, PyUnicode_FSConverter, &second)) {
        return NULL; /* the converter has released what it had made */
    }
    const char *from = PyBytes_AsString(first);
    const char *to = PyBytes_AsString(second);
    if (from != NULL && to != NULL) {
        int failed = 0;
        Py_BEGIN_ALLOW_THREADS
            failed = exchange(from, to);
        Py_END_ALLOW_THREADS
        if (failed == 0) {
            result = Py_NewRef(Py_None);
        }
        else {
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, to);
        }
    }
    Py_DECREF(first);
    Py_DECREF(second);
    return result;
}

static PyMethodDef files_methods[] = {
    {"exchange_paths", exchange_paths, METH_VARARGS, exchange_paths_doc},
    {NULL, NULL, 0, NULL},
};

const og_family og_files_family = {
    .methods = files_methods,
};
