/* Shared by the files that implement `_C.Ledger`; private to them.
 *
 * Building a Python object may run the collector, and with it finalizers that
 * call the ledger. So what a result is made of is copied out first. */
#ifndef OPGUARD_PY_POOL_LEDGER_OBJECT_H
#define OPGUARD_PY_POOL_LEDGER_OBJECT_H

#include "py/pool_ledger.h"
#include "py/state.h"

typedef struct {
    PyObject_HEAD og_ledger *ledger;
} LedgerObject;

#define LEDGER_SMALL 16

/* A tuple of ints as C numbers; small ones need no memory. */
typedef struct og_numbers {
    int64_t *at;
    size_t count;
    int64_t small[LEDGER_SMALL];
} og_numbers;

/* ((pool, bytes), ...) */
typedef struct og_extras {
    og_pool_extra *at;
    size_t count;
    og_pool_extra small[LEDGER_SMALL / 2];
} og_extras;

static inline og_ledger *
ledger_in(PyObject *self)
{
    return ((LedgerObject *)self)->ledger;
}

/* Each returns -1 with an exception set. what: how a message names it. */
int
og_ledger_arguments(const char *name, Py_ssize_t count, Py_ssize_t least,
                    Py_ssize_t most);

int
og_ledger_int(PyObject *value, const char *what, int64_t *result);

int
og_ledger_double(PyObject *value, const char *what, double *result);

/* These two must be released, also after a failure. */
int
og_ledger_numbers(PyObject *value, const char *what, og_numbers *result);

int
og_ledger_extras(PyObject *value, og_extras *result);

void
og_numbers_release(og_numbers *numbers);

void
og_extras_release(og_extras *extras);

/* A tuple of ints. */
PyObject *
og_ledger_tuple(const int64_t *numbers, size_t count);

/* ((owner, unit, count), ...), or pairs (owner, count). */
PyObject *
og_ledger_holder_tuple(const og_pool_holder *holders, size_t count,
                       bool pairs);

/* A struct sequence of a type from values, which are stolen; a NULL among
 * them is an error that is set. */
PyObject *
og_ledger_record(PyTypeObject *type, PyObject **values, Py_ssize_t count);

/* A bool, or NULL with the exception of a negative result. */
PyObject *
og_ledger_bool(int result, const og_error *error);

/* In pool_ledger_requests.c; the others are in pool_ledger.c. */
#define LEDGER_METHOD(name)                                              \
    PyObject *og_ledger_py_##name(PyObject *self, PyObject *const *args, \
                                  Py_ssize_t count)

LEDGER_METHOD(add_owner);
LEDGER_METHOD(drop_owner);
LEDGER_METHOD(forfeit);
LEDGER_METHOD(enter);
LEDGER_METHOD(leave);
LEDGER_METHOD(request);
LEDGER_METHOD(pump);
LEDGER_METHOD(take);
LEDGER_METHOD(cancel);
LEDGER_METHOD(set_waits);
LEDGER_METHOD(waiting);

#endif
