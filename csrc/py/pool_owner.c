/* opguard._C.Owner: the thread or task that asks for a lease.
 *
 * A context variable holds the owner. Contexts are copied into new tasks and
 * into threads of asyncio.to_thread, so what it holds may be another's: then
 * the caller gets an owner of its own, below that one while that one holds a
 * lease, for whoever holds it may wait for what it started. The variable is
 * never reset: the copy that was set dies with its context. */
#include "py/pool_ledger.h"
#include "py/pool_lease.h"
#include "py/state.h"

#include <structmember.h>

/* asyncio, where somebody imported it: 1, 0 or -1. */
static OG_COLD int
find_asyncio(og_pool_lease_state *lease)
{
    PyObject *asyncio =
        PyDict_GetItemString(PyImport_GetModuleDict(), "asyncio");
    if (asyncio == NULL) {
        return 0;
    }
    Py_INCREF(asyncio); /* its attributes may be found by code that drops it */
    PyObject *loop = PyObject_GetAttrString(asyncio, "_get_running_loop");
    PyObject *task =
        loop == NULL ? NULL : PyObject_GetAttrString(asyncio, "current_task");
    Py_DECREF(asyncio);
    if (task != NULL && lease->current_task == NULL) {
        lease->running_loop = loop;
        lease->current_task = task;
    }
    else {
        Py_XDECREF(loop);
        Py_XDECREF(task);
    }
    if (lease->current_task != NULL) {
        return 1;
    }
    if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear(); /* it is being imported: no loop runs */
        return 0;
    }
    return -1;
}

/* *task: a new reference to the task that runs in this thread, or NULL. */
static int
find_task(og_pool_lease_state *lease, PyObject **task)
{
    *task = NULL;
    int found = lease->current_task != NULL ? 1 : find_asyncio(lease);
    if (found <= 0) {
        return found;
    }
    PyObject *loop = PyObject_CallNoArgs(lease->running_loop);
    if (loop == NULL) {
        return -1;
    }
    if (loop != Py_None) {
        *task = PyObject_CallFunctionObjArgs(lease->current_task, loop, NULL);
    }
    bool failed = loop != Py_None && *task == NULL;
    Py_DECREF(loop);
    if (*task == Py_None) {
        Py_CLEAR(*task);
    }
    return failed ? -1 : 0;
}

/* As find_task, in one step where a task is likely: expected is one's owner.
 */
static int
find_likely_task(og_pool_lease_state *lease, const OwnerObject *expected,
                 PyObject **task)
{
    if (expected == NULL || expected->task == NULL) {
        return find_task(lease, task);
    }
    *task = PyObject_CallNoArgs(lease->current_task);
    if (*task == Py_None) {
        Py_CLEAR(*task);
        return 0;
    }
    if (*task != NULL) {
        return 0;
    }
    if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) {
        return -1;
    }
    PyErr_Clear(); /* no loop runs in this thread */
    return find_task(lease, task);
}

static inline int64_t
thread_number(void)
{
    return (int64_t)PyThreadState_GetID(PyThreadState_Get());
}

static bool
is_caller(const OwnerObject *owner, int64_t thread, PyObject *task)
{
    if (owner->thread_number != thread ||
        (owner->task == NULL) != (task == NULL)) {
        return false;
    }
    return task == NULL || PyWeakref_GetObject(owner->task) == task;
}

static int
owner_holds(const OwnerObject *owner)
{
    return og_ledger_owner_holds(owner->ledger, owner->id, NULL) > 0;
}

static OwnerObject *
owner_alloc(og_pool_lease_state *lease, PyObject *ledger_object,
            og_ledger *ledger)
{
    PyTypeObject *type = (PyTypeObject *)lease->owner_type;
    allocfunc alloc = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    OwnerObject *self = (OwnerObject *)alloc(type, 0);
    if (self == NULL) {
        return NULL;
    }
    self->ledger_object = Py_NewRef(ledger_object);
    self->ledger = ledger;
    return self;
}

/* From now on it is listed: it has its id. */
static void
owner_link(og_pool_lease_state *lease, OwnerObject *self)
{
    self->older = lease->owners;
    if (lease->owners != NULL) {
        lease->owners->newer = self;
    }
    lease->owners = self;
}

/* The caller's owner, made and put into the context. inherited may be NULL. */
static OG_COLD OwnerObject *
owner_make(og_pool_lease_state *lease, PyObject *ledger_object,
           og_ledger *ledger, OwnerObject *inherited, PyObject *task)
{
    int64_t thread = thread_number();
    OwnerObject *self = owner_alloc(lease, ledger_object, ledger);
    if (self == NULL) {
        return NULL;
    }
    self->thread = PyThread_get_thread_ident();
    self->thread_number = thread;
    int64_t parent = 0;
    OwnerObject *at = inherited;
    for (; at != NULL; at = at->beside) {
        bool holds = owner_holds(at) > 0;
        if (holds && at->ledger == ledger) {
            parent = at->id;
        }
        else if (holds && self->beside == NULL &&
                 is_caller(at, thread, task)) {
            self->beside = (OwnerObject *)Py_NewRef((PyObject *)at);
        }
    }
    og_error err;
    if (task != NULL && (self->task = PyWeakref_NewRef(task, NULL)) == NULL) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    if (og_ledger_add_owner(ledger, parent, thread, &self->id, &err) < 0) {
        og_ledger_raise(&err);
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    owner_link(lease, self);
    PyObject *token =
        PyObject_CallFunctionObjArgs(lease->owner_set, (PyObject *)self, NULL);
    if (token == NULL) {
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    Py_DECREF(token);
    return self;
}

/* The caller's owner, where its context has none at hand: of a task, of
 * another ledger, made now. got: what the context has. */
static OG_COLD OwnerObject *
find_owner(og_pool_lease_state *lease, PyObject *ledger_object,
           og_ledger *ledger, PyObject *got)
{
    /* What carries contexts over may set anything. */
    OwnerObject *inherited = (PyObject *)Py_TYPE(got) == lease->owner_type
                                 ? (OwnerObject *)got
                                 : NULL;
    OwnerObject *found = inherited;
    PyObject *task;
    if (find_likely_task(lease, inherited, &task) < 0) {
        return NULL;
    }
    int64_t thread = thread_number();
    while (found != NULL &&
           (found->ledger != ledger || !is_caller(found, thread, task))) {
        found = found->beside;
    }
    if (found != NULL) {
        Py_INCREF((PyObject *)found);
    }
    else {
        found = owner_make(lease, ledger_object, ledger, inherited, task);
    }
    Py_XDECREF(task);
    return found;
}

/* Whether owner is this thread's own, as far as the owner knows. */
static inline bool
is_of_thread(const og_pool_lease_state *lease, PyObject *owner,
             const og_ledger *ledger)
{
    const OwnerObject *self = (const OwnerObject *)owner;
    return (PyObject *)Py_TYPE(owner) == lease->owner_type &&
           self->ledger == ledger && self->task == NULL &&
           self->thread_number == thread_number();
}

/* Most calls come from a thread's own context, and no loop runs there. */
OG_HOT OwnerObject *
og_pool_owner_now(og_state *state, PyObject *ledger_object, og_ledger *ledger)
{
    og_pool_lease_state *lease = &state->pool_lease;
    PyObject *got = PyObject_CallNoArgs(lease->owner_get);
    if (got == NULL) {
        return NULL;
    }
    OwnerObject *found = NULL;
    PyObject *loop = Py_None;
    if (is_of_thread(lease, got, ledger) && lease->current_task != NULL) {
        loop = PyObject_CallNoArgs(lease->running_loop);
        if (loop == Py_None) {
            Py_DECREF(loop);
            return (OwnerObject *)got;
        }
        Py_XDECREF(loop);
    }
    if (loop != NULL) {
        found = find_owner(lease, ledger_object, ledger, got);
    }
    Py_DECREF(got);
    return found;
}

/* --- the type ------------------------------------------------------------ */

static void
Owner_dealloc(PyObject *object)
{
    OwnerObject *self = (OwnerObject *)object;
    PyTypeObject *type = Py_TYPE(object);
    og_state *state = (og_state *)PyType_GetModuleState(type);
    /* Before anything is told of its end: who is told may list all that are
     * alive. */
    if (self->newer != NULL) {
        self->newer->older = self->older;
    }
    else if (state->pool_lease.owners == self) {
        state->pool_lease.owners = self->older;
    }
    if (self->older != NULL) {
        self->older->newer = self->newer;
    }
    if (self->weak_list != NULL) {
        PyObject_ClearWeakRefs(object);
    }
    if (self->id > 0) {
        (void)og_ledger_drop_owner(self->ledger, self->id, NULL);
    }
    Py_XDECREF(self->task);
    Py_XDECREF((PyObject *)self->beside);
    Py_XDECREF(self->ledger_object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static PyObject *
Owner_get_task(PyObject *object, void *ignored)
{
    (void)ignored;
    OwnerObject *self = (OwnerObject *)object;
    PyObject *task =
        self->task == NULL ? Py_None : PyWeakref_GetObject(self->task);
    return Py_XNewRef(task);
}

/* What one entry says, kept while lists are made: that may collect garbage,
 * and with it leases that are in the owner's list. */
typedef struct held_row {
    og_pool_units *units;
    PyObject *code;
    int place;
} held_row;

static PyObject *
row_as_tuple(const held_row *row)
{
    PyObject *units = PyTuple_New((Py_ssize_t)row->units->count);
    for (size_t i = 0; units != NULL && i < row->units->count; i++) {
        PyObject *id = PyLong_FromLongLong(row->units->ids[i]);
        if (id == NULL || PyTuple_SetItem(units, (Py_ssize_t)i, id) < 0) {
            Py_CLEAR(units);
        }
    }
    PyObject *code = row->code == NULL ? Py_None : row->code;
    int line = row->code == NULL ? 0 : og_pool_line(code, row->place);
    PyObject *result = units == NULL || line < 0
                           ? NULL
                           : Py_BuildValue("(OOi)", units, code, line);
    Py_XDECREF(units);
    return result;
}

static PyObject *
Owner_get_held(PyObject *object, void *ignored)
{
    (void)ignored;
    OwnerObject *self = (OwnerObject *)object;
    size_t count = 0, i = 0;
    for (og_pool_entry *at = self->entries; at != NULL; at = at->next) {
        count++;
    }
    held_row *rows = PyMem_Calloc(count + 1, sizeof *rows);
    if (rows == NULL) {
        return PyErr_NoMemory();
    }
    for (og_pool_entry *at = self->entries; at != NULL; at = at->next, i++) {
        rows[i] = (held_row){at->hold.units, Py_XNewRef(at->code), at->place};
        at->hold.units->uses++;
    }
    PyObject *held = PyTuple_New((Py_ssize_t)count);
    for (i = 0; i < count; i++) {
        PyObject *row = held == NULL ? NULL : row_as_tuple(rows + i);
        if (row == NULL || PyTuple_SetItem(held, (Py_ssize_t)i, row) < 0) {
            Py_CLEAR(held);
        }
        og_pool_units_drop(rows[i].units);
        Py_XDECREF(rows[i].code);
    }
    PyMem_Free(rows);
    return held;
}

static PyGetSetDef Owner_getset[] = {
    {"task", Owner_get_task, NULL, "The asyncio task while it is alive.",
     NULL},
    {"held", Owner_get_held, NULL,
     "Leases of `with` blocks, newest first: (units, code, line).", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef Owner_members[] = {
    {"id", T_LONGLONG, offsetof(OwnerObject, id), READONLY,
     "The ledger's id of it."},
    {"thread", T_ULONG, offsetof(OwnerObject, thread), READONLY,
     "threading.get_ident() there."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(OwnerObject, weak_list),
     READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Owner_slots[] = {
    {Py_tp_doc, (void *)"A thread or task that asks a ledger for leases."},
    {Py_tp_members, Owner_members},
    {Py_tp_getset, Owner_getset},
    {Py_tp_dealloc, (void *)Owner_dealloc},
    {0, NULL},
};

static PyType_Spec Owner_spec = {
    .name = "opguard._C.Owner",
    .basicsize = sizeof(OwnerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE |
             Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = Owner_slots,
};

static PyObject *
pool_owner(PyObject *module, PyObject *ledger)
{
    og_state *state = og_state_get(module);
    og_ledger *core = og_ledger_of(state, ledger);
    return core == NULL ? NULL
                        : (PyObject *)og_pool_owner_now(state, ledger, core);
}

static PyObject *
pool_owners(PyObject *module, PyObject *ledger)
{
    og_state *state = og_state_get(module);
    og_ledger *core = og_ledger_of(state, ledger);
    PyObject *all = core == NULL ? NULL : PyList_New(0);
    /* An append may collect garbage, and with it owners: begin again then
     * would not end, so the next one is kept alive first. */
    OwnerObject *at = state->pool_lease.owners;
    Py_XINCREF((PyObject *)at);
    while (at != NULL) {
        if (all != NULL && at->ledger == core &&
            PyList_Append(all, (PyObject *)at) < 0) {
            Py_CLEAR(all);
        }
        OwnerObject *older = at->older;
        Py_XINCREF((PyObject *)older);
        Py_DECREF((PyObject *)at);
        at = older;
    }
    return all;
}

PyDoc_STRVAR(pool_owner_doc,
             "pool_owner($module, ledger, /)\n--\n\n"
             "The Owner of this thread or task in ledger.");
PyDoc_STRVAR(pool_owners_doc,
             "pool_owners($module, ledger, /)\n--\n\n"
             "All Owners of ledger that are alive, the newest first.");

PyMethodDef og_pool_owner_methods[] = {
    {"pool_owner", pool_owner, METH_O, pool_owner_doc},
    {"pool_owners", pool_owners, METH_O, pool_owners_doc},
    {NULL, NULL, 0, NULL},
};

/* A default of its own, so that asking for it needs no argument. */
static PyObject *
make_variable(void)
{
    PyObject *contextvars = PyImport_ImportModule("contextvars");
    PyObject *type = contextvars == NULL
                         ? NULL
                         : PyObject_GetAttrString(contextvars, "ContextVar");
    PyObject *args =
        type == NULL ? NULL : Py_BuildValue("(s)", "opguard.pool_owner");
    PyObject *named =
        args == NULL ? NULL : Py_BuildValue("{sO}", "default", Py_None);
    PyObject *variable =
        named == NULL ? NULL : PyObject_Call(type, args, named);
    Py_XDECREF(contextvars);
    Py_XDECREF(type);
    Py_XDECREF(args);
    Py_XDECREF(named);
    return variable;
}

int
og_pool_owner_exec(PyObject *module, og_state *state)
{
    og_pool_lease_state *lease = &state->pool_lease;
    lease->owner_type = PyType_FromModuleAndSpec(module, &Owner_spec, NULL);
    if (lease->owner_type == NULL) {
        return -1;
    }
    PyObject *variable = make_variable();
    if (variable == NULL) {
        return -1;
    }
    lease->owner_get = PyObject_GetAttrString(variable, "get");
    if (lease->owner_get != NULL) {
        lease->owner_set = PyObject_GetAttrString(variable, "set");
    }
    Py_DECREF(variable);
    return lease->owner_set == NULL ||
                   PyModule_AddType(module,
                                    (PyTypeObject *)lease->owner_type) < 0
               ? -1
               : 0;
}
