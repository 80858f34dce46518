/* opguard._C.sanitize_exception and what guards call: the walk from exception
 * to exception, and the state the parts share. */
#include "py/sanitize_walk.h"
#include "py/util.h"

#include <stdlib.h>
#include <string.h>

static const char *const name_texts[OG_NAME_COUNT] = {
    "tb_next",
    "tb_frame",
    "tb_lasti",
    "tb_lineno",
    "gi_frame",
    "f_locals",
    "f_globals",
    "clear",
    "shape",
    "dtype",
    "device",
    "nbytes",
    "__notes__",
    "_opguard_guarded",
    "__opguard_empty__",
    "co_names",
    "co_name",
    "co_filename",
    "_parameters",
    "_modules",
};

static int
push_members(og_walk *walk, PyObject *exc)
{
    PyObject *member_of = walk->state->sanitize.members;
    if (!PyObject_TypeCheck(exc, (PyTypeObject *)PyExc_BaseExceptionGroup)) {
        return 0;
    }
    descrgetfunc get =
        (descrgetfunc)PyType_GetSlot(Py_TYPE(member_of), Py_tp_descr_get);
    PyObject *members = get(member_of, exc, (PyObject *)Py_TYPE(exc));
    int result = 0;
    if (members != NULL && PyTuple_Check(members)) {
        for (Py_ssize_t i = 0; result == 0 && i < PyTuple_Size(members); i++) {
            PyObject *member = PyTuple_GetItem(members, i);
            if (PyExceptionInstance_Check(member)) {
                result = og_walk_push(walk, member);
            }
        }
    }
    Py_XDECREF(members);
    og_forget();
    return result;
}

static int
push_linked(og_walk *walk, PyObject *exc)
{
    PyObject *cause = PyException_GetCause(exc);
    PyObject *context = PyException_GetContext(exc);
    int result = 0;
    if (cause != NULL) {
        result = og_walk_push(walk, cause);
    }
    if (result == 0 && context != NULL) {
        result = og_walk_push(walk, context);
    }
    Py_XDECREF(cause);
    Py_XDECREF(context);
    return result == 0 ? push_members(walk, exc) : result;
}

/* Marks frames that what the caller handles goes through as not ours. */
static int
protect_frames(og_walk *walk, PyObject *exc)
{
    og_sanitize_state *s = &walk->state->sanitize;
    PyObject *at = PyException_GetTraceback(exc);
    while (at != NULL && at != Py_None) {
        PyObject *frame = PyObject_GetAttr(at, s->names[OG_NAME_TB_FRAME]);
        PyObject *next = PyObject_GetAttr(at, s->names[OG_NAME_TB_NEXT]);
        /* Held: hostile code met on the walk may let go of the traceback. */
        bool failed = frame == NULL || next == NULL ||
                      og_refs_push(&walk->holds, at) < 0 ||
                      og_map_put(&walk->entries, at, at) < 0 ||
                      og_map_put(&walk->frames, frame, NULL) < 0;
        Py_XDECREF(frame);
        Py_DECREF(at);
        if (failed) {
            Py_XDECREF(next);
            og_forget();
            return -1;
        }
        at = next;
    }
    Py_XDECREF(at);
    return 0;
}

/* The whole chain of handled counts as seen. It lives on in the interpreter,
 * and on the queue until the walk ends. */
static int
protect(og_walk *walk, PyObject *handled)
{
    int result = og_walk_push(walk, handled);
    for (size_t i = 0; result == 0 && i < walk->queue.count; i++) {
        PyObject *exc = walk->queue.items[i];
        result = protect_frames(walk, exc);
        if (result == 0) {
            result = push_linked(walk, exc);
        }
    }
    return result;
}

static int
walk_one(og_walk *walk, PyObject *exc)
{
    if (walk->deep && push_linked(walk, exc) < 0) {
        return -1;
    }
    PyObject *old = PyException_GetTraceback(exc);
    if (old != NULL) {
        PyObject *made = og_walk_traceback(walk, old);
        if (made != NULL && made != old) {
            (void)PyException_SetTraceback(exc, made);
        }
        Py_DECREF(old);
        Py_XDECREF(made);
        og_forget();
    }
    return og_walk_payload(walk, exc);
}

static void
walk_free(og_walk *walk)
{
    og_map_free(&walk->seen);
    og_map_free(&walk->frames);
    og_map_free(&walk->entries);
    og_refs_free(&walk->holds);
    og_refs_free(&walk->queue);
}

static void
sanitize(og_state *state, PyObject *exc, PyObject *handled, PyObject *keep,
         bool deep)
{
    og_walk walk;
    memset(&walk, 0, offsetof(og_walk, note));
    walk.state = state;
    walk.keep = keep;
    walk.deep = deep;
    if (handled != NULL && handled != Py_None && protect(&walk, handled) < 0) {
        walk_free(&walk);
        return;
    }
    size_t first = walk.queue.count;
    if (og_walk_push(&walk, exc) == 0 && walk.queue.count > first) {
        og_note_begin(state, &walk.note, exc);
        for (size_t i = first; i < walk.queue.count; i++) {
            if (walk_one(&walk, walk.queue.items[i]) < 0) {
                break;
            }
        }
        og_note_end(state, &walk.note, exc);
    }
    walk_free(&walk);
}

static bool
keeps_frames(void)
{
    const char *value = getenv("OPGUARD_KEEP_FRAMES");
    return value != NULL && value[0] != '\0' && strcmp(value, "0") != 0;
}

static void
sanitize_calmly(og_state *state, PyObject *exc, PyObject *handled,
                PyObject *keep, bool deep)
{
    PyObject *type, *value, *traceback;
    if (exc == NULL || !PyExceptionInstance_Check(exc) ||
        state->sanitize.names[0] == NULL || keeps_frames()) {
        return;
    }
    PyErr_Fetch(&type, &value, &traceback);
    Py_INCREF(exc);
    sanitize(state, exc, handled, keep, deep);
    Py_DECREF(exc);
    PyErr_Restore(type, value, traceback);
}

void
og_sanitize(og_state *state, PyObject *exc, PyObject *handled, PyObject *keep)
{
    sanitize_calmly(state, exc, handled, keep, true);
}

/* Asks for the handler that runs after the cell, when IPython is there. */
static void
ask_ipython(og_state *state)
{
    if (state->sanitize.ipython_asked) {
        return;
    }
    PyObject *modules = PyImport_GetModuleDict();
    if (modules == NULL || !PyDict_Check(modules) ||
        PyDict_GetItemString(modules, "IPython") == NULL ||
        PyDict_GetItemString(modules, "opguard") == NULL) {
        return;
    }
    PyObject *handler = PyImport_ImportModule("opguard._ipython");
    PyObject *done = handler == NULL
                         ? NULL
                         : PyObject_CallMethod(handler, "register", NULL);
    state->sanitize.ipython_asked = done == Py_True || handler == NULL;
    Py_XDECREF(handler);
    Py_XDECREF(done);
    og_forget();
}

void
og_sanitize_exit(og_state *state, PyObject *exc, PyObject *handled,
                 PyObject *keep)
{
    PyObject *type, *value, *traceback;
    if (exc == NULL || !PyExceptionInstance_Check(exc) ||
        state->sanitize.names[0] == NULL || keeps_frames()) {
        return;
    }
    og_sanitize(state, exc, handled, keep);
    PyErr_Fetch(&type, &value, &traceback);
    PyObject *dict = PyObject_GenericGetDict(exc, NULL);
    if (dict != NULL) {
        (void)PyDict_SetItem(dict, state->sanitize.names[OG_NAME_MARK],
                             Py_True);
        Py_DECREF(dict);
    }
    og_forget();
    ask_ipython(state);
    PyErr_Restore(type, value, traceback);
}

PyDoc_STRVAR(sanitize_doc,
             "sanitize_exception($module, exc, handled=None, keep=None, "
             "deep=True, /)\n--\n\n"
             "Free exc of what it holds alive; returns exc.\n\n"
             "handled: the exception the caller was handling, left alone.\n"
             "keep: tuple of exception types whose payload stays.\n"
             "Raises TypeError when exc is no exception or keep no tuple of "
             "types.");

static PyObject *
sanitize_exception(PyObject *module, PyObject *args)
{
    PyObject *exc, *handled = NULL, *keep = NULL;
    int deep = 1;
    if (!PyArg_ParseTuple(args, "O|OOp:sanitize_exception", &exc, &handled,
                          &keep, &deep)) {
        return NULL;
    }
    if (!PyExceptionInstance_Check(exc)) {
        return PyErr_Format(PyExc_TypeError,
                            "expected exc to be an exception, got %.200R; "
                            "pass the object caught by except",
                            Py_TYPE(exc));
    }
    if (keep == Py_None) {
        keep = NULL;
    }
    for (Py_ssize_t i = 0; keep != NULL; i++) {
        if (!PyTuple_Check(keep)) {
            return PyErr_Format(PyExc_TypeError,
                                "expected keep to be a tuple of exception "
                                "types, got %.200R; write keep=(Type,)",
                                Py_TYPE(keep));
        }
        if (i >= PyTuple_Size(keep)) {
            break;
        }
        if (!PyExceptionClass_Check(PyTuple_GetItem(keep, i))) {
            return PyErr_Format(PyExc_TypeError,
                                "expected keep[%zd] to be an exception type, "
                                "got %.200R; write keep=(Type,)",
                                i, PyTuple_GetItem(keep, i));
        }
    }
    if (handled != NULL && !PyExceptionInstance_Check(handled)) {
        handled = NULL;
    }
    sanitize_calmly(module == NULL ? NULL : og_state_get(module), exc, handled,
                    keep, deep != 0);
    return Py_NewRef(exc);
}

PyDoc_STRVAR(sanitize_exit_doc,
             "sanitize_exit($module, exc, handled=None, keep=None, /)\n--\n\n"
             "What guards do when exc leaves them; returns None.\n\n"
             "As sanitize_exception, and marks exc for the IPython handler.");

static PyObject *
sanitize_exit(PyObject *module, PyObject *args)
{
    PyObject *exc, *handled = NULL, *keep = NULL;
    if (!PyArg_ParseTuple(args, "O|OO:sanitize_exit", &exc, &handled, &keep)) {
        return NULL;
    }
    if (keep != NULL && !PyTuple_Check(keep)) {
        keep = NULL;
    }
    if (handled != NULL && !PyExceptionInstance_Check(handled)) {
        handled = NULL;
    }
    og_sanitize_exit(og_state_get(module), exc, handled, keep);
    Py_RETURN_NONE;
}

/* The types that stand for tensors and for objects that hold some. */
static int
exec_summaries(og_sanitize_state *s)
{
    PyStructSequence_Field tensor_fields[] = {
        {"shape", "the size of each dimension, a tuple of int"},
        {"dtype", "the dtype, as the tensor's own attribute gave it"},
        {"device", "the device, as the tensor's own attribute gave it"},
        {NULL, NULL},
    };
    PyStructSequence_Desc tensor_desc = {
        "opguard.sanitizing.TensorSummary",
        "What stands for a tensor in the payload of a sanitized exception.",
        tensor_fields,
        3,
    };
    PyStructSequence_Field object_fields[] = {
        {"type", "the qualified name of the object's class"},
        {NULL, NULL},
    };
    PyStructSequence_Desc object_desc = {
        "opguard.sanitizing.ObjectSummary",
        "What stands for an object that holds tensors, such as a module, in "
        "the payload of a sanitized exception.",
        object_fields,
        1,
    };
    s->tensor_summary = (PyObject *)PyStructSequence_NewType(&tensor_desc);
    s->object_summary = (PyObject *)PyStructSequence_NewType(&object_desc);
    return s->tensor_summary == NULL || s->object_summary == NULL ? -1 : 0;
}

/* slot = import_module(module).name, and it must be a type. */
static int
import_type(PyObject **slot, const char *module, const char *name)
{
    PyObject *from = PyImport_ImportModule(module);
    PyObject *found = from == NULL ? NULL : PyObject_GetAttrString(from, name);
    Py_XDECREF(from);
    *slot = found;
    return found == NULL ? -1 : 0;
}

/* slot = type.__dict__[name], past any override in a subclass. */
static int
type_entry(PyObject **slot, PyObject *type, const char *name)
{
    PyObject *dict = PyObject_GetAttrString(type, "__dict__");
    *slot = dict == NULL ? NULL : PyMapping_GetItemString(dict, name);
    Py_XDECREF(dict);
    return *slot == NULL ? -1 : 0;
}

static PyObject *
text_tuple(const char *const *texts, size_t count)
{
    PyObject *result = PyTuple_New((Py_ssize_t)count);
    for (size_t i = 0; result != NULL && i < count; i++) {
        PyObject *text = PyUnicode_InternFromString(texts[i]);
        if (text == NULL || PyTuple_SetItem(result, (Py_ssize_t)i, text)) {
            Py_CLEAR(result);
        }
    }
    return result;
}

/* Instructions are numbered anew in every release. */
static PyObject *
instruction_numbers(void)
{
    static const char *const names[] = {"RETURN_GENERATOR", "RESUME", "NOP"};
    PyObject *opcode = PyImport_ImportModule("opcode");
    PyObject *map =
        opcode == NULL ? NULL : PyObject_GetAttrString(opcode, "opmap");
    char text[3] = {0, 0, 0};
    PyObject *number = map;
    for (size_t i = 0; i < 3 && number != NULL; i++) {
        number = PyMapping_GetItemString(map, names[i]);
        text[i] = number == NULL ? 0 : (char)PyLong_AsLong(number);
        Py_XDECREF(number);
    }
    Py_XDECREF(opcode);
    Py_XDECREF(map);
    return number == NULL ? NULL : PyBytes_FromStringAndSize(text, 3);
}

static int
exec_types(og_sanitize_state *s)
{
    if (import_type(&s->frame_type, "types", "FrameType") < 0 ||
        import_type(&s->code_type, "types", "CodeType") < 0 ||
        import_type(&s->cell_type, "types", "CellType") < 0 ||
        import_type(&s->function_type, "types", "FunctionType") < 0 ||
        import_type(&s->traceback_type, "types", "TracebackType") < 0 ||
        import_type(&s->module_type, "types", "ModuleType") < 0 ||
        import_type(&s->namespace_type, "types", "SimpleNamespace") < 0 ||
        import_type(&s->deque_type, "collections", "deque") < 0 ||
        import_type(&s->ordered_type, "collections", "OrderedDict") < 0 ||
        type_entry(&s->args, PyExc_BaseException, "args") < 0 ||
        type_entry(&s->members, PyExc_BaseExceptionGroup, "exceptions") < 0 ||
        type_entry(&s->type_dict, (PyObject *)&PyType_Type, "__dict__") < 0 ||
        type_entry(&s->type_mro, (PyObject *)&PyType_Type, "__mro__") < 0) {
        return -1;
    }
    s->frame_traverse = (traverseproc)PyType_GetSlot(
        (PyTypeObject *)s->frame_type, Py_tp_traverse);
    s->frame_clear =
        (inquiry)PyType_GetSlot((PyTypeObject *)s->frame_type, Py_tp_clear);
    s->cell_traverse = (traverseproc)PyType_GetSlot(
        (PyTypeObject *)s->cell_type, Py_tp_traverse);
    return 0;
}

static int
sanitize_exec(PyObject *module, og_state *state)
{
    static const char *const hide[] = {
        "__tracebackhide__", "__traceback_hide__", "_rich_traceback_omit",
        "_rich_traceback_guard"};
    static const char *const globals[] = {
        "__name__",    "__file__",   "__loader__",       "__spec__",
        "__package__", "__unittest", "__tracebackhide__"};
    og_sanitize_state *s = &state->sanitize;
    for (size_t i = 0; i < OG_NAME_COUNT; i++) {
        if (og_intern(&s->names[i], name_texts[i]) < 0) {
            return -1;
        }
    }
    s->hide_names = text_tuple(hide, sizeof hide / sizeof *hide);
    s->global_names = text_tuple(globals, sizeof globals / sizeof *globals);
    s->numbers = instruction_numbers();
    if (s->hide_names == NULL || s->global_names == NULL ||
        s->numbers == NULL || exec_summaries(s) < 0 || exec_types(s) < 0) {
        return -1;
    }
    if (PyModule_AddObjectRef(module, "TensorSummary", s->tensor_summary) <
        0) {
        return -1;
    }
    return PyModule_AddObjectRef(module, "ObjectSummary", s->object_summary);
}

/* The members from first to last are all PyObject *. */
static PyObject **
objects_of(og_sanitize_state *s, size_t *count)
{
    *count = (offsetof(og_sanitize_state, frame_traverse) -
              offsetof(og_sanitize_state, names)) /
             sizeof(PyObject *);
    return (PyObject **)(void *)s;
}

static int
sanitize_traverse(og_state *state, visitproc visit, void *arg)
{
    size_t count;
    PyObject **objects = objects_of(&state->sanitize, &count);
    for (size_t i = 0; i < count; i++) {
        Py_VISIT(objects[i]);
    }
    return og_codes_traverse(&state->sanitize, visit, arg);
}

static int
sanitize_clear(og_state *state)
{
    size_t count;
    PyObject **objects = objects_of(&state->sanitize, &count);
    for (size_t i = 0; i < count; i++) {
        Py_CLEAR(objects[i]);
    }
    og_codes_free(&state->sanitize);
    return 0;
}

static PyMethodDef sanitize_methods[] = {
    {"sanitize_exception", sanitize_exception, METH_VARARGS, sanitize_doc},
    {"sanitize_exit", sanitize_exit, METH_VARARGS, sanitize_exit_doc},
    {NULL, NULL, 0, NULL},
};

const og_family og_sanitize_family = {
    .methods = sanitize_methods,
    .exec = sanitize_exec,
    .traverse = sanitize_traverse,
    .clear = sanitize_clear,
};
