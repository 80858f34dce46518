/* load_ops, ops_info: the ops library seen from Python. It is opened here and
 * not linked, so that sanitizing and the container walk work without torch. */
#include "py/state.h"

#include <dlfcn.h>

PyDoc_STRVAR(load_ops_doc,
             "load_ops($module, path, /)\n--\n\n"
             "Open the ops library at path, which registers "
             "torch.ops.opguard.*.\n\n"
             "torch must have been imported. A second call does nothing.\n"
             "Raises ImportError when the library or a function of torch it "
             "needs is missing.");

static PyObject *
load_ops(PyObject *module, PyObject *path)
{
    og_ops_state *ops = &og_state_get(module)->ops;
    PyObject *bytes = NULL;
    if (ops->table != NULL) {
        Py_RETURN_NONE;
    }
    if (!PyUnicode_FSConverter(path, &bytes)) {
        return NULL;
    }
    void *library = dlopen(PyBytes_AsString(bytes), RTLD_NOW | RTLD_LOCAL);
    Py_DECREF(bytes);
    if (library == NULL) {
        PyErr_Format(PyExc_ImportError,
                     "expected opguard's ops library to load, the loader "
                     "says: %s; install torch >= 2.10 and opguard again",
                     dlerror());
        return NULL;
    }
    const og_ops *(*table)(void) = NULL;
    og_status (*registered)(og_error *) = NULL;
    og_error err = {OG_OK, ""};
    *(void **)&table = dlsym(library, "og_ops_table");
    *(void **)&registered = dlsym(library, "og_ops_registered");
    if (table == NULL || registered == NULL ||
        table()->size < sizeof(og_ops)) {
        PyErr_Format(PyExc_ImportError,
                     "expected the ops library of this opguard at %R, it is "
                     "another's; install opguard again",
                     path);
        return NULL;
    }
    if (registered(&err) != OG_OK) {
        PyErr_SetString(PyExc_ImportError, err.message);
        return NULL;
    }
    ops->table = table();
    Py_RETURN_NONE;
}

PyDoc_STRVAR(ops_info_doc,
             "ops_info($module, /)\n--\n\n"
             "What the ops library found: {'isa': str, 'cuda': str}.\n\n"
             "'cuda' is '' when the CUDA kernels can be loaded, else the "
             "reason why not.\nRaises RuntimeError before load_ops.");

static PyObject *
ops_info(PyObject *module, PyObject *ignored)
{
    (void)ignored;
    const og_ops *table = og_state_get(module)->ops.table;
    og_error err = {OG_OK, ""};
    if (table == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the ops library to be loaded, it is not; "
                        "import opguard, which does it");
        return NULL;
    }
    bool ready = table->cuda_ready(&err) == OG_OK;
    return Py_BuildValue("{s:s,s:s}", "isa", table->cpu_isa(), "cuda",
                         ready ? "" : err.message);
}

PyDoc_STRVAR(bind_types_doc,
             "bind_types($module, tensor, parameter, /)\n--\n\n"
             "Say which classes are tensors and parameters.\n\n"
             "The package binds torch's; tests without torch bind their own.\n"
             "Raises TypeError when one is not a class.");

static PyObject *
bind_types(PyObject *module, PyObject *args)
{
    og_ops_state *ops = &og_state_get(module)->ops;
    PyObject *tensor = NULL, *parameter = NULL;
    if (!PyArg_ParseTuple(args, "O!O!:bind_types", &PyType_Type, &tensor,
                          &PyType_Type, &parameter)) {
        return NULL;
    }
    PyObject *old_tensor = ops->tensor_type;
    PyObject *old_parameter = ops->parameter_type;
    ops->tensor_type = Py_NewRef(tensor);
    ops->parameter_type = Py_NewRef(parameter);
    Py_XDECREF(old_tensor);
    Py_XDECREF(old_parameter);
    Py_RETURN_NONE;
}

static int
ops_traverse(og_state *state, visitproc visit, void *arg)
{
    Py_VISIT(state->ops.tensor_type);
    Py_VISIT(state->ops.parameter_type);
    return 0;
}

static int
ops_clear(og_state *state)
{
    Py_CLEAR(state->ops.tensor_type);
    Py_CLEAR(state->ops.parameter_type);
    return 0;
}

static PyMethodDef ops_methods[] = {
    {"bind_types", bind_types, METH_VARARGS, bind_types_doc},
    {"load_ops", load_ops, METH_O, load_ops_doc},
    {"ops_info", ops_info, METH_NOARGS, ops_info_doc},
    {NULL, NULL, 0, NULL},
};

const og_family og_ops_family = {
    .methods = ops_methods,
    .traverse = ops_traverse,
    .clear = ops_clear,
};
