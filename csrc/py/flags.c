/* The family's life cycle, and what Python binds. */
#include "py/flags_road.h"

#include "py/util.h"

PyDoc_STRVAR(flags_bind_doc,
             "flags_bind($module, /, **parts)\n--\n\n"
             "Say what the flag functions work with: torch's, or a test's "
             "own.\n\n"
             "Parts: check check_ index push push_ merge merge_ find is_ok "
             "is_err count max_severity new read read_all (what each calls "
             "where the short road ends), resolve, empty, dispatch_modes, "
             "functorch, function_modes, tracing, exchange, noted; None takes "
             "one away.\nRaises TypeError for another name.");

static PyObject **
find_part(og_flags_state *flags, PyObject *name)
{
#define PART(field)                                            \
    if (PyUnicode_CompareWithASCIIString(name, #field) == 0) { \
        return &flags->field;                                  \
    }
    OG_FLAGS_BOUND(PART)
#undef PART
    return NULL;
}

static PyObject *
flags_bind(PyObject *module, PyObject *args, PyObject *kwargs)
{
    og_flags_state *flags = &og_state_get(module)->flags;
    PyObject *name, *value;
    Py_ssize_t position = 0;
    if (PyTuple_Size(args) != 0) {
        PyErr_SetString(PyExc_TypeError,
                        "flags_bind: expected parts by name only");
        return NULL;
    }
    while (kwargs != NULL && PyDict_Next(kwargs, &position, &name, &value)) {
        PyObject **slot = find_part(flags, name);
        if (slot == NULL) {
            PyErr_Format(PyExc_TypeError,
                         "flags_bind: expected a part of the flag functions, "
                         "got %R; see its help",
                         name);
            return NULL;
        }
        if (slot == &flags->exchange) {
            flags->api = og_dlpack_find(value);
        }
        PyObject *old = *slot;
        *slot = value == Py_None ? NULL : Py_NewRef(value);
        Py_XDECREF(old);
    }
    Py_RETURN_NONE;
}

PyDoc_STRVAR(flags_epoch_doc,
             "flags_epoch($module, epoch, /)\n--\n\n"
             "Say of which epoch the ids are that modules hold in "
             "`_opguard_location`, a tuple (epoch, id); 0 for none.\n\n"
             "Raises TypeError or OverflowError for what is no such int.");

static PyObject *
flags_epoch(PyObject *module, PyObject *epoch)
{
    long long number = PyLong_AsLongLong(epoch);
    if (number == -1 && PyErr_Occurred() != NULL) {
        return NULL;
    }
    og_state_get(module)->flags.epoch = number;
    Py_RETURN_NONE;
}

static PyMethodDef flags_methods[] = {
    {"flags_bind", (PyCFunction)(void (*)(void))flags_bind,
     METH_VARARGS | METH_KEYWORDS, flags_bind_doc},
    {"flags_epoch", flags_epoch, METH_O, flags_epoch_doc},
    {NULL, NULL, 0, NULL},
};

static int
flags_exec(PyObject *module, og_state *state)
{
    if (PyModule_AddFunctions(module, og_flags_record_methods) < 0 ||
        PyModule_AddFunctions(module, og_flags_query_methods) < 0 ||
        PyModule_AddFunctions(module, og_flags_read_methods) < 0 ||
        PyModule_AddFunctions(module, og_flags_out_methods) < 0) {
        return -1;
    }
    return og_intern(&state->flags.name_location, "_opguard_location");
}

static int
flags_traverse(og_state *state, visitproc visit, void *arg)
{
#define VISIT(field) Py_VISIT(state->flags.field);
    OG_FLAGS_BOUND(VISIT)
#undef VISIT
    Py_VISIT(state->flags.name_location);
    return 0;
}

static int
flags_clear(og_state *state)
{
    state->flags.api = NULL;
#define CLEAR(field) Py_CLEAR(state->flags.field);
    OG_FLAGS_BOUND(CLEAR)
#undef CLEAR
    Py_CLEAR(state->flags.name_location);
    return 0;
}

const og_family og_flags_family = {
    .methods = flags_methods,
    .exec = flags_exec,
    .traverse = flags_traverse,
    .clear = flags_clear,
};
