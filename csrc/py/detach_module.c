/* detach, detach_bind, register_detach: what opguard._C offers, and the
 * family's state. */
#include "py/detach_call.h"
#include "py/util.h"

PyDoc_STRVAR(detach_doc,
             "detach($module, value, copy=False, models=(), far=False, /)\n"
             "--\n\n"
             "value with every tensor in it detached and in host memory.\n\n"
             "copy: copy every tensor. models: modules whose parameters and\n"
             "buffers are copied. far: for tests, take host memory for an\n"
             "accelerator's.");

static PyObject *
detach(PyObject *module, PyObject *args)
{
    PyObject *value = NULL, *models = NULL;
    int copy = 0, far = 0;
    if (!PyArg_ParseTuple(args, "O|pO!p:detach", &value, &copy, &PyTuple_Type,
                          &models, &far)) {
        return NULL;
    }
    og_walk walk = {.state = og_state_get(module),
                    .copy = copy,
                    .far = far,
                    .models = models};
    return og_detach_walk(&walk, value);
}

PyDoc_STRVAR(
    detach_bind_doc,
    "detach_bind($module, resolve, fetch, inference_mode, set_grad, "
    "make_subclass, watched, /)\n--\n\n"
    "Say what the walk takes from Python, each may be None.\n\n"
    "resolve(type) -> None or (expand, build, early); fetch(tensors)\n"
    "-> the same in host memory; inference_mode(bool) enters by\n"
    "being made; set_grad(bool); make_subclass(type, tensor, bool);\n"
    "watched: a dict whose growth means that resolve may answer\n"
    "otherwise.");

static PyObject *
detach_bind(PyObject *module, PyObject *args)
{
    og_detach_state *state = &og_state_get(module)->detach;
    PyObject *given[6];
    PyObject **slots[6] = {&state->resolve,        &state->fetch,
                           &state->inference_mode, &state->set_grad,
                           &state->make_subclass,  &state->watched};
    if (!PyArg_UnpackTuple(args, "detach_bind", 6, 6, &given[0], &given[1],
                           &given[2], &given[3], &given[4], &given[5])) {
        return NULL;
    }
    if (given[5] != Py_None && !PyDict_Check(given[5])) {
        PyErr_SetString(PyExc_TypeError, "expected watched to be a dict");
        return NULL;
    }
    for (int i = 0; i < 6; i++) {
        PyObject *old = *slots[i];
        *slots[i] = given[i] == Py_None ? NULL : Py_NewRef(given[i]);
        Py_XDECREF(old);
    }
    state->watched_size = -1;
    og_shape_cache_clear(state);
    Py_RETURN_NONE;
}

PyDoc_STRVAR(register_detach_doc,
             "register_detach($module, type, fn, /)\n--\n\n"
             "Say how detach_to_cpu treats values of type and of its "
             "subclasses.\n\n"
             "fn(value, detach) returns what takes value's place; "
             "detach(part)\ndetaches a part of it, keeping identity and "
             "sharing with the rest.\nA later call for the same type "
             "replaces the earlier; fn None takes it back.\nRaises TypeError "
             "when type is no class or fn not callable, ValueError\nfor a "
             "class whose treatment is fixed.");

static bool
is_fixed(og_state *state, PyObject *type)
{
    PyTypeObject *const fixed[] = {
        &PyList_Type,       &PyTuple_Type,   &PyDict_Type,  &PyUnicode_Type,
        &PyLong_Type,       &PyBool_Type,    &PyFloat_Type, &PyBytes_Type,
        &PyBaseObject_Type, Py_TYPE(Py_None)};
    for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) {
        if (type == (PyObject *)fixed[i]) {
            return true;
        }
    }
    return type == state->ops.tensor_type || type == state->ops.parameter_type;
}

static PyObject *
register_detach(PyObject *module, PyObject *args)
{
    og_state *state = og_state_get(module);
    PyObject *type = NULL, *fn = NULL;
    if (!PyArg_UnpackTuple(args, "register_detach", 2, 2, &type, &fn)) {
        return NULL;
    }
    if (!PyType_Check(type) || (fn != Py_None && !PyCallable_Check(fn))) {
        PyErr_Format(PyExc_TypeError,
                     "expected register_detach(type, fn) with a class and a "
                     "callable fn(value, detach), got %.150R and %.150R",
                     (PyObject *)Py_TYPE(type), (PyObject *)Py_TYPE(fn));
        return NULL;
    }
    if (is_fixed(state, type)) {
        PyErr_Format(PyExc_ValueError,
                     "expected type to be a class whose treatment is open, "
                     "that of %.150R is fixed; register a subclass of it",
                     type);
        return NULL;
    }
    if (fn != Py_None) {
        if (PyDict_SetItem(state->detach.registered, type, fn) < 0) {
            return NULL;
        }
    }
    else {
        int known = PyDict_Contains(state->detach.registered, type);
        if (known < 0 ||
            (known && PyDict_DelItem(state->detach.registered, type) < 0)) {
            return NULL;
        }
    }
    og_shape_cache_clear(&state->detach);
    Py_RETURN_NONE;
}

/* --- state --- */

static int
exec_bases(og_detach_state *state)
{
    PyObject *collections = PyImport_ImportModule("collections");
    PyObject *types =
        collections == NULL ? NULL : PyImport_ImportModule("types");
    int result = types == NULL ? -1 : 0;
    if (result == 0) {
        PyObject **bases = state->bases;
        bases[OG_BASE_OBJECT] = Py_NewRef((PyObject *)&PyBaseObject_Type);
        bases[OG_BASE_LIST] = Py_NewRef((PyObject *)&PyList_Type);
        bases[OG_BASE_TUPLE] = Py_NewRef((PyObject *)&PyTuple_Type);
        bases[OG_BASE_DICT] = Py_NewRef((PyObject *)&PyDict_Type);
        bases[OG_BASE_SET] = Py_NewRef((PyObject *)&PySet_Type);
        bases[OG_BASE_FROZENSET] = Py_NewRef((PyObject *)&PyFrozenSet_Type);
        bases[OG_BASE_PROXY] = Py_NewRef((PyObject *)&PyDictProxy_Type);
        bases[OG_BASE_DEFAULTDICT] =
            PyObject_GetAttrString(collections, "defaultdict");
        bases[OG_BASE_ORDERED] =
            PyObject_GetAttrString(collections, "OrderedDict");
        bases[OG_BASE_DEQUE] = PyObject_GetAttrString(collections, "deque");
        bases[OG_BASE_NAMESPACE] =
            PyObject_GetAttrString(types, "SimpleNamespace");
        result = bases[OG_BASE_DEFAULTDICT] == NULL ||
                         bases[OG_BASE_ORDERED] == NULL ||
                         bases[OG_BASE_DEQUE] == NULL ||
                         bases[OG_BASE_NAMESPACE] == NULL
                     ? -1
                     : 0;
    }
    for (int i = 0; result == 0 && i < OG_BASE_COUNT; i++) {
        if (state->bases[i] != NULL) {
            state->news[i] =
                PyObject_GetAttrString(state->bases[i], "__new__");
            result = state->news[i] == NULL ? -1 : 0;
        }
    }
    Py_XDECREF(collections);
    Py_XDECREF(types);
    return result;
}

static int
exec_members(og_detach_state *state)
{
    PyObject *space =
        PyObject_GetAttrString((PyObject *)&PyType_Type, "__dict__");
    if (space == NULL) {
        return -1;
    }
    state->type_mro = PyMapping_GetItemString(space, "__mro__");
    state->type_dict = PyMapping_GetItemString(space, "__dict__");
    Py_DECREF(space);
    const struct {
        PyObject *of;
        const char *name;
        PyObject **slot;
    } members[] = {
        {state->bases[OG_BASE_ORDERED], "items", &state->ordered_items},
        {state->bases[OG_BASE_ORDERED], "__setitem__", &state->ordered_set},
        {state->bases[OG_BASE_DEQUE], "__init__", &state->deque_init},
        {state->bases[OG_BASE_DEQUE], "extend", &state->deque_extend},
        {state->bases[OG_BASE_DEQUE], "maxlen", &state->deque_maxlen},
        {state->bases[OG_BASE_DEFAULTDICT], "default_factory",
         &state->default_factory},
    };
    for (size_t i = 0; i < sizeof members / sizeof *members; i++) {
        *members[i].slot =
            PyObject_GetAttrString(members[i].of, members[i].name);
        if (*members[i].slot == NULL) {
            return -1;
        }
    }
    return state->type_mro == NULL || state->type_dict == NULL ? -1 : 0;
}

static int
exec_names(og_detach_state *state)
{
    const struct {
        PyObject **slot;
        const char *name;
    } names[] = {
        {&state->name_detach, "detach"},
        {&state->name_clone, "clone"},
        {&state->name_cpu, "cpu"},
        {&state->name_is_cpu, "is_cpu"},
        {&state->name_is_meta, "is_meta"},
        {&state->name_requires_grad, "requires_grad"},
        {&state->name_is_inference, "is_inference"},
        {&state->name_base, "_base"},
        {&state->name_storage, "untyped_storage"},
        {&state->name_nbytes, "nbytes"},
        {&state->name_as_subclass, "as_subclass"},
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (og_intern(names[i].slot, names[i].name) < 0) {
            return -1;
        }
    }
    return 0;
}

static int
exec_shapes(og_detach_state *state)
{
    og_shape **shapes[] = {&state->list_shape, &state->tuple_shape,
                           &state->dict_shape};
    const og_base bases[] = {OG_BASE_LIST, OG_BASE_TUPLE, OG_BASE_DICT};
    for (int i = 0; i < 3; i++) {
        *shapes[i] = og_shape_new(bases[i]);
        if (*shapes[i] == NULL) {
            return -1;
        }
        (*shapes[i])->exact = true;
        (*shapes[i])->keep_same = bases[i] == OG_BASE_TUPLE;
    }
    return 0;
}

static int
detach_exec(PyObject *module, og_state *state)
{
    og_detach_state *detach_state = &state->detach;
    if (exec_bases(detach_state) < 0 || exec_members(detach_state) < 0 ||
        exec_names(detach_state) < 0 || exec_shapes(detach_state) < 0) {
        return -1;
    }
    detach_state->call_type = og_call_type(module);
    detach_state->registered = PyDict_New();
    return detach_state->call_type == NULL || detach_state->registered == NULL
               ? -1
               : 0;
}

/* Every reference of the state, for traverse and clear. */
static int
each(og_detach_state *s, int (*act)(PyObject **, visitproc, void *),
     visitproc visit, void *arg)
{
    PyObject **const slots[] = {&s->call_type,
                                &s->type_mro,
                                &s->type_dict,
                                &s->ordered_items,
                                &s->ordered_set,
                                &s->deque_init,
                                &s->deque_extend,
                                &s->deque_maxlen,
                                &s->default_factory,
                                &s->name_detach,
                                &s->name_clone,
                                &s->name_cpu,
                                &s->name_is_cpu,
                                &s->name_is_meta,
                                &s->name_requires_grad,
                                &s->name_is_inference,
                                &s->name_base,
                                &s->name_storage,
                                &s->name_nbytes,
                                &s->name_as_subclass,
                                &s->resolve,
                                &s->fetch,
                                &s->inference_mode,
                                &s->set_grad,
                                &s->make_subclass,
                                &s->watched,
                                &s->bound,
                                &s->registered,
                                &s->cdata.descriptor,
                                &s->data.descriptor,
                                &s->requires_grad.descriptor,
                                &s->is_leaf.descriptor,
                                &s->base.descriptor,
                                &s->is_inference,
                                &s->clone};
    for (size_t i = 0; i < sizeof slots / sizeof *slots; i++) {
        int result = act(slots[i], visit, arg);
        if (result != 0) {
            return result;
        }
    }
    for (int i = 0; i < OG_BASE_COUNT; i++) {
        int result = act(&s->bases[i], visit, arg);
        result = result != 0 ? result : act(&s->news[i], visit, arg);
        if (result != 0) {
            return result;
        }
    }
    return 0;
}

static int
act_visit(PyObject **slot, visitproc visit, void *arg)
{
    Py_VISIT(*slot);
    return 0;
}

static int
act_clear(PyObject **slot, visitproc visit, void *arg)
{
    (void)visit, (void)arg;
    Py_CLEAR(*slot);
    return 0;
}

/* A shape in use by a walk has more owners than the cache, so what it holds
 * is visited only when the cache is the one. */
static int
visit_shapes(og_detach_state *state, visitproc visit, void *arg)
{
    for (size_t i = 0; i < OG_SHAPE_CACHE; i++) {
        og_shape *shape = state->cache[i].shape;
        Py_VISIT(state->cache[i].weak);
        if (shape != NULL && shape->references == 1) {
            Py_VISIT(shape->slots);
            Py_VISIT(shape->handler);
        }
    }
    return 0;
}

static int
detach_traverse(og_state *state, visitproc visit, void *arg)
{
    int result = each(&state->detach, act_visit, visit, arg);
    return result != 0 ? result : visit_shapes(&state->detach, visit, arg);
}

static int
detach_clear(og_state *state)
{
    og_detach_state *s = &state->detach;
    og_shape **shapes[] = {&s->list_shape, &s->tuple_shape, &s->dict_shape};
    og_shape_cache_clear(s);
    for (int i = 0; i < 3; i++) {
        if (*shapes[i] != NULL) {
            og_shape_release(*shapes[i]);
            *shapes[i] = NULL;
        }
    }
    s->fast = false;
    return each(s, act_clear, NULL, NULL);
}

static PyMethodDef detach_methods[] = {
    {"detach", detach, METH_VARARGS, detach_doc},
    {"detach_bind", detach_bind, METH_VARARGS, detach_bind_doc},
    {"register_detach", register_detach, METH_VARARGS, register_detach_doc},
    {NULL, NULL, 0, NULL},
};

const og_family og_detach_family = {
    .methods = detach_methods,
    .exec = detach_exec,
    .traverse = detach_traverse,
    .clear = detach_clear,
};
