/* `_C.Ledger`: csrc/core/pool_ledger.h for Python, ints and tuples of ints.
 * Each method is one whole step of the ledger, under the GIL. */
#include "py/pool_ledger_object.h"

/* --- pools --- */

static PyObject *
add_pool(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t budget, pool = 0;
    og_error error;
    if (og_ledger_arguments("add_pool", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "budget", &budget) < 0) {
        return NULL;
    }
    if (og_ledger_add_pool(ledger_in(self), budget, &pool, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    return PyLong_FromLongLong(pool); /* below 64: it needs no memory */
}

static PyObject *
set_budget(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t pool, budget;
    og_error error;
    if (og_ledger_arguments("set_budget", count, 2, 2) < 0 ||
        og_ledger_int(args[0], "pool", &pool) < 0 ||
        og_ledger_int(args[1], "budget", &budget) < 0) {
        return NULL;
    }
    int pump = og_ledger_set_budget(ledger_in(self), pool, budget, &error);
    return og_ledger_bool(pump, &error);
}

static og_state *
state_of(PyObject *self)
{
    return (og_state *)PyType_GetModuleState(Py_TYPE(self));
}

static PyObject *
pool_info(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t pool;
    og_error error;
    og_pool_info info;
    if (og_ledger_arguments("pool", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "pool", &pool) < 0) {
        return NULL;
    }
    if (og_ledger_pool(ledger_in(self), pool, &info, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    PyObject *values[] = {
        PyLong_FromLongLong(info.budget),  PyLong_FromLongLong(info.used),
        PyLong_FromLongLong(info.idle),    PyLong_FromLongLong(info.extra),
        PyLong_FromLongLong(info.waiting),
    };
    return og_ledger_record(state_of(self)->pool_ledger.pool_type, values, 5);
}

static PyObject *
set_policy(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    static const char *const names[] = {"lru", "cost", "rank"};
    if (og_ledger_arguments("set_policy", count, 1, 1) < 0) {
        return NULL;
    }
    for (int i = 0; PyUnicode_Check(args[0]) && i < 3; i++) {
        if (PyUnicode_CompareWithASCIIString(args[0], names[i]) == 0) {
            (void)og_ledger_set_policy(ledger_in(self), (og_pool_policy)i,
                                       NULL);
            return Py_NewRef(Py_None);
        }
    }
    return PyErr_Format(PyExc_ValueError,
                        "expected a policy \"lru\", \"cost\" or \"rank\", got "
                        "%.150R",
                        args[0]);
}

/* --- units --- */

static PyObject *
add_unit(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t pool, bytes, priority = 0, pinned = 0, unit = 0;
    double cost = 1.0;
    og_error error;
    if (og_ledger_arguments("add_unit", count, 2, 5) < 0 ||
        og_ledger_int(args[0], "pool", &pool) < 0 ||
        og_ledger_int(args[1], "nbytes", &bytes) < 0 ||
        (count > 2 && og_ledger_int(args[2], "priority", &priority) < 0) ||
        (count > 3 && og_ledger_int(args[3], "pinned", &pinned) < 0) ||
        (count > 4 && og_ledger_double(args[4], "cost", &cost) < 0)) {
        return NULL;
    }
    if (og_ledger_add_unit(ledger_in(self), pool, bytes, priority, pinned != 0,
                           cost, &unit, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    PyObject *result = PyLong_FromLongLong(unit);
    if (result == NULL) {
        (void)og_ledger_remove_unit(ledger_in(self), unit, NULL);
    }
    return result;
}

static PyObject *
set_unit(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    static const char *const names[] = {"nbytes", "priority", "pinned", "cost",
                                        "rank"};
    int64_t unit, whole = 0;
    double real = 0;
    og_error error;
    int field = 0;
    if (og_ledger_arguments("set_unit", count, 3, 3) < 0 ||
        og_ledger_int(args[0], "unit", &unit) < 0) {
        return NULL;
    }
    while (field < 5 &&
           (!PyUnicode_Check(args[1]) ||
            PyUnicode_CompareWithASCIIString(args[1], names[field]) != 0)) {
        field++;
    }
    if (field == 5) {
        return PyErr_Format(PyExc_ValueError,
                            "expected a field \"nbytes\", \"priority\", "
                            "\"pinned\", \"cost\" or \"rank\", got %.150R",
                            args[1]);
    }
    if (field < OG_FIELD_COST) {
        if (og_ledger_int(args[2], names[field], &whole) < 0) {
            return NULL;
        }
        int pump = og_ledger_set_unit(ledger_in(self), unit,
                                      (og_unit_field)field, whole, &error);
        return og_ledger_bool(pump, &error);
    }
    if (og_ledger_double(args[2], names[field], &real) < 0) {
        return NULL;
    }
    int status = og_ledger_set_score(ledger_in(self), unit,
                                     (og_unit_field)field, real, &error);
    return og_ledger_bool(status, &error);
}

static PyObject *
unit_info(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t unit;
    og_error error;
    og_unit_info info;
    if (og_ledger_arguments("unit", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "unit", &unit) < 0) {
        return NULL;
    }
    if (og_ledger_unit(ledger_in(self), unit, &info, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    PyObject *values[] = {
        PyLong_FromLongLong(info.pool),     PyLong_FromLongLong(info.bytes),
        PyLong_FromLong(info.state),        PyBool_FromLong(info.condemned),
        PyLong_FromLongLong(info.leases),   PyBool_FromLong(info.pinned),
        PyLong_FromLongLong(info.priority), PyLong_FromLongLong(info.tick),
        PyLong_FromLongLong(info.uses),     PyFloat_FromDouble(info.cost),
        PyFloat_FromDouble(info.rank),
    };
    return og_ledger_record(state_of(self)->pool_ledger.unit_type, values, 11);
}

static PyObject *
list_units(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t pool;
    og_error error;
    og_pool_info info;
    if (og_ledger_arguments("units", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "pool", &pool) < 0) {
        return NULL;
    }
    og_ledger *ledger = ledger_in(self);
    if (og_ledger_pool(ledger, pool, &info, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    size_t total = og_ledger_units(ledger, pool, NULL, 0);
    int64_t *ids = PyMem_Malloc((total + 1) * sizeof *ids);
    if (ids == NULL) {
        return PyErr_NoMemory();
    }
    (void)og_ledger_units(ledger, pool, ids, total);
    PyObject *result = og_ledger_tuple(ids, total);
    PyMem_Free(ids);
    return result;
}

/* --- methods of one unit that say whether to pump --- */

static PyObject *
step(PyObject *self, PyObject *const *args, Py_ssize_t count, const char *name,
     int (*function)(og_ledger *, int64_t, og_error *))
{
    int64_t unit;
    og_error error;
    if (og_ledger_arguments(name, count, 1, 1) < 0 ||
        og_ledger_int(args[0], "unit", &unit) < 0) {
        return NULL;
    }
    return og_ledger_bool(function(ledger_in(self), unit, &error), &error);
}

#define STEP(name, function)                                     \
    static PyObject *name(PyObject *self, PyObject *const *args, \
                          Py_ssize_t count)                      \
    {                                                            \
        return step(self, args, count, #name, function);         \
    }

STEP(remove_unit, og_ledger_remove_unit)
STEP(condemn, og_ledger_condemn)
STEP(loaded, og_ledger_loaded)
STEP(failed, og_ledger_failed)
STEP(evicted, og_ledger_evicted)
STEP(kept, og_ledger_kept)
STEP(spared, og_ledger_spared)

static PyObject *
choose(PyObject *self, int64_t pool, int64_t bytes, bool condemned)
{
    og_ledger *ledger = ledger_in(self);
    og_error error;
    size_t most = og_ledger_units(ledger, pool, NULL, 0);
    int64_t *ids = PyMem_Malloc((most + 1) * sizeof *ids);
    if (ids == NULL) {
        return PyErr_NoMemory();
    }
    int64_t count = condemned
                        ? og_ledger_reclaim_condemned(ledger, pool, &error)
                        : og_ledger_reclaim(ledger, pool, bytes, &error);
    PyObject *result = NULL;
    if (count < 0) {
        result = og_ledger_raise(&error);
    }
    else {
        og_ledger_chosen(ledger, ids);
        result = og_ledger_tuple(ids, (size_t)count);
        for (int64_t i = 0; result == NULL && i < count; i++) {
            og_ledger_unchoose(ledger, ids[i]);
        }
    }
    PyMem_Free(ids);
    return result;
}

static PyObject *
reclaim(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t pool, bytes, tick = 0;
    if (og_ledger_arguments("reclaim", count, 2, 3) < 0 ||
        og_ledger_int(args[0], "pool", &pool) < 0 ||
        og_ledger_int(args[1], "nbytes", &bytes) < 0 ||
        (count > 2 && og_ledger_int(args[2], "tick", &tick) < 0)) {
        return NULL;
    }
    return choose(self, pool, bytes, false);
}

static PyObject *
reclaim_condemned(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t pool;
    if (og_ledger_arguments("reclaim_condemned", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "pool", &pool) < 0) {
        return NULL;
    }
    return choose(self, pool, 0, true);
}

static PyObject *
holders(PyObject *self, PyObject *const *args, Py_ssize_t count)
{
    int64_t unit;
    size_t total = 0;
    og_error error;
    if (og_ledger_arguments("holders", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "unit", &unit) < 0) {
        return NULL;
    }
    og_ledger *ledger = ledger_in(self);
    if (og_ledger_holders(ledger, unit, NULL, 0, &total, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    og_pool_holder *found = PyMem_Malloc((total + 1) * sizeof *found);
    if (found == NULL) {
        return PyErr_NoMemory();
    }
    (void)og_ledger_holders(ledger, unit, found, total, &total, NULL);
    PyObject *result = og_ledger_holder_tuple(found, total, true);
    PyMem_Free(found);
    return result;
}

/* --- the type --- */

static PyObject *
Ledger_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    if (PyTuple_Size(args) > 0 ||
        (kwargs != NULL && PyDict_Size(kwargs) > 0)) {
        PyErr_SetString(PyExc_TypeError, "expected no arguments of Ledger");
        return NULL;
    }
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    LedgerObject *self = (LedgerObject *)allocate(type, 0);
    if (self != NULL && (self->ledger = og_ledger_new()) == NULL) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void
Ledger_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    og_ledger_free(ledger_in(self));
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

#define OWN(name, function, doc) \
    {#name, (PyCFunction)(void (*)(void))function, METH_FASTCALL, doc}
#define SHARED(name, doc) OWN(name, og_ledger_py_##name, doc)

static PyMethodDef Ledger_methods[] = {
    OWN(add_pool, add_pool, "A pool of so many bytes: its index."),
    OWN(set_budget, set_budget, "Changes a budget; True: pump."),
    OWN(pool, pool_info, "(budget, used) in bytes; .idle .extra .waiting."),
    OWN(set_policy, set_policy, "\"lru\", \"cost\" or \"rank\"."),
    OWN(add_unit, add_unit, "A unit of a pool: its id."),
    OWN(set_unit, set_unit, "Sets a field by its name; True: pump."),
    OWN(remove_unit, remove_unit, "Nobody can ask for it; True: pump."),
    OWN(unit, unit_info, "What is known of a unit."),
    OWN(units, list_units, "The ids of a pool's units."),
    OWN(condemn, condemn, "It goes first; True: it is idle now."),
    OWN(loaded, loaded, "A load has ended well; True: pump."),
    OWN(failed, failed, "A load has failed; True: pump."),
    OWN(evicted, evicted, "Its bytes are given back; True: pump."),
    OWN(kept, kept, "Its user kept its bytes; True: pump."),
    OWN(spared, spared, "Nobody tried to evict it; True: pump."),
    OWN(reclaim, reclaim, "Idle units worth nbytes, now EVICTING."),
    OWN(reclaim_condemned, reclaim_condemned,
        "Idle condemned units, now EVICTING."),
    OWN(holders, holders, "((owner, count), ...) of a unit."),
    SHARED(add_owner, "A thread or task: its id."),
    SHARED(drop_owner, "It asks for nothing more."),
    SHARED(forfeit, "All it holds is left, all it asked for is cancelled."),
    SHARED(enter, "The fast road: leases on what is READY."),
    SHARED(leave, "Gives leases and extra bytes back; True: pump."),
    SHARED(request, "Asks for a set of units, whole or not at all."),
    SHARED(pump, "Decides what waits: the tickets decided."),
    SHARED(take, "The answer of a ticket; it ends unless it waits."),
    SHARED(cancel, "Ends a ticket, whatever it has; True: pump."),
    SHARED(set_waits,
           "All waits outside of it: owner, holder, flags of each."),
    SHARED(waiting, "((ticket, owner, units, need), ...) in order."),
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(Ledger_doc, "Ledger()\n--\n\nWho holds what in the pools.");

static PyType_Slot Ledger_slots[] = {
    {Py_tp_doc, (void *)Ledger_doc},
    {Py_tp_new, (void *)Ledger_new},
    {Py_tp_dealloc, (void *)Ledger_dealloc},
    {Py_tp_methods, Ledger_methods},
    {0, NULL},
};

static PyType_Spec Ledger_spec = {
    .name = "opguard._C.Ledger",
    .basicsize = sizeof(LedgerObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = Ledger_slots,
};

static int
add_constants(PyObject *module)
{
    static const struct {
        const char *name;
        long value;
    } constants[] = {
        {"UNIT_ABSENT", OG_UNIT_ABSENT},
        {"UNIT_LOADING", OG_UNIT_LOADING},
        {"UNIT_READY", OG_UNIT_READY},
        {"UNIT_EVICTING", OG_UNIT_EVICTING},
        {"POOL_GRANTED", OG_POOL_GRANTED},
        {"POOL_WAIT", OG_POOL_WAIT},
        {"POOL_TOO_LARGE", OG_POOL_TOO_LARGE},
        {"POOL_DEADLOCK", OG_POOL_DEADLOCK},
        {"POOL_BUSY", OG_POOL_BUSY},
        {"POOL_GONE", OG_POOL_GONE},
        {"POOL_TRY", OG_POOL_TRY},
        {"POOL_BLOCKS_THREAD", OG_POOL_BLOCKS_THREAD},
        {"POOL_ENDS", OG_POOL_ENDS},
    };
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
        if (PyModule_AddIntConstant(module, constants[i].name,
                                    constants[i].value) < 0) {
            return -1;
        }
    }
    return 0;
}

/* Only the first `unpacked` are items of the tuple, the others attributes. */
static PyTypeObject *
make_record(PyObject *module, const char *name, const char *const *names,
            int unpacked)
{
    PyStructSequence_Field fields[16] = {{NULL, NULL}};
    PyStructSequence_Desc desc = {name, NULL, fields, unpacked};
    for (size_t i = 0; names[i] != NULL; i++) {
        fields[i].name = names[i];
    }
    PyTypeObject *type = PyStructSequence_NewType(&desc);
    if (type != NULL && PyModule_AddType(module, type) < 0) {
        Py_CLEAR(type);
    }
    return type;
}

static int
exec(PyObject *module, og_state *state)
{
    static const char *const pool_names[] = {"budget", "used",    "idle",
                                             "extra",  "waiting", NULL};
    static const char *const unit_names[] = {
        "pool",     "nbytes", "state", "condemned", "leases", "pinned",
        "priority", "tick",   "uses",  "cost",      "rank",   NULL};
    static const char *const answer_names[] = {
        "verdict", "ticket", "evict", "load", "pending",
        "holders", "need",   "have",  "pool", NULL};
    og_pool_ledger_state *own = &state->pool_ledger;
    own->type =
        (PyTypeObject *)PyType_FromModuleAndSpec(module, &Ledger_spec, NULL);
    if (own->type == NULL || PyModule_AddType(module, own->type) < 0) {
        return -1;
    }
    own->pool_type = make_record(module, "opguard._C.PoolInfo", pool_names, 2);
    own->unit_type =
        make_record(module, "opguard._C.UnitInfo", unit_names, 11);
    own->answer_type =
        make_record(module, "opguard._C.PoolAnswer", answer_names, 8);
    if (own->pool_type == NULL || own->unit_type == NULL ||
        own->answer_type == NULL) {
        return -1;
    }
    return add_constants(module);
}

static int
traverse(og_state *state, visitproc visit, void *arg)
{
    Py_VISIT(state->pool_ledger.type);
    Py_VISIT(state->pool_ledger.pool_type);
    Py_VISIT(state->pool_ledger.unit_type);
    Py_VISIT(state->pool_ledger.answer_type);
    return 0;
}

static int
clear(og_state *state)
{
    Py_CLEAR(state->pool_ledger.type);
    Py_CLEAR(state->pool_ledger.pool_type);
    Py_CLEAR(state->pool_ledger.unit_type);
    Py_CLEAR(state->pool_ledger.answer_type);
    return 0;
}

og_ledger *
og_ledger_of(og_state *state, PyObject *object)
{
    PyTypeObject *type = state->pool_ledger.type;
    if (type == NULL || !PyObject_TypeCheck(object, type)) {
        PyErr_Format(PyExc_TypeError,
                     "expected ledger to be a Ledger, got %.150R",
                     Py_TYPE(object));
        return NULL;
    }
    return ledger_in(object);
}

const og_family og_pool_ledger_family = {
    .exec = exec,
    .traverse = traverse,
    .clear = clear,
};
