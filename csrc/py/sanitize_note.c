/* The note lists tensors by name, shape, dtype, device and bytes, innermost
 * frame first, and never another value: locals may hold secrets. Names come
 * from the code; keys of dicts are values and are not written. */
#include "py/sanitize_note.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define HEAD "opguard: tensors alive at the failure, innermost frame first"
#define MORE "\n    and more tensors than are listed"
/* Kept free at the end for MORE. */
#define TAIL_BYTES 64
#define SHAPE_DIMS 12
#define NEAR_ITEMS 16

static bool
note_add(og_note *note, const char *text)
{
    size_t length = strlen(text);
    if (note->length + length + TAIL_BYTES >= sizeof note->text) {
        return false;
    }
    memcpy(note->text + note->length, text, length + 1);
    note->length += length;
    return true;
}

/* The text of str(object) after its last dot, cut to size; "?" if none. */
static void
short_text(PyObject *object, char *out, size_t size)
{
    PyObject *text = object == NULL ? NULL : PyObject_Str(object);
    const char *utf8 =
        text == NULL ? NULL : PyUnicode_AsUTF8AndSize(text, NULL);
    if (utf8 == NULL) {
        og_forget();
        utf8 = "?";
    }
    const char *dot = strrchr(utf8, '.');
    (void)snprintf(out, size, "%s", dot == NULL ? utf8 : dot + 1);
    Py_XDECREF(text);
}

static void
shape_text(PyObject *shape, char *out, size_t size)
{
    size_t at = 0;
    if (shape == NULL || !(PyTuple_Check(shape) || PyList_Check(shape))) {
        (void)snprintf(out, size, "[?]");
        return;
    }
    Py_ssize_t dims = PySequence_Size(shape);
    at += (size_t)snprintf(out, size, "[");
    for (Py_ssize_t i = 0; i < dims && at + 32 < size; i++) {
        if (i == SHAPE_DIMS) {
            at += (size_t)snprintf(out + at, size - at, ", ...");
            break;
        }
        PyObject *dim = PySequence_GetItem(shape, i);
        long long value = dim == NULL ? -1 : PyLong_AsLongLong(dim);
        Py_XDECREF(dim);
        bool bad = PyErr_Occurred() != NULL;
        og_forget();
        at += (size_t)(bad ? snprintf(out + at, size - at, "%s?",
                                      i == 0 ? "" : ", ")
                           : snprintf(out + at, size - at, "%s%lld",
                                      i == 0 ? "" : ", ", value));
    }
    og_forget();
    (void)snprintf(out + at, size - at, "]");
}

/* The attribute, or NULL with nothing set: a hostile tensor is described as
 * far as it lets itself be. */
static PyObject *
attribute(og_state *state, PyObject *object, og_name name)
{
    PyObject *value = PyObject_GetAttr(object, state->sanitize.names[name]);
    if (value == NULL) {
        og_forget();
    }
    return value;
}

/* Writes the text of a dtype or device unless *last is equal to it. Takes the
 * reference; part may be NULL. */
static void
text_again(PyObject *part, PyObject **last, char *text, size_t size)
{
    if (part == NULL || *last == NULL ||
        (part != *last &&
         (Py_TYPE(part) != Py_TYPE(*last) ||
          PyObject_RichCompareBool(part, *last, Py_EQ) != 1))) {
        og_forget();
        short_text(part, text, size);
        Py_XDECREF(*last);
        *last = Py_XNewRef(part);
    }
    Py_XDECREF(part);
}

static bool
note_tensor(og_state *state, og_note *note, const char *name, Py_ssize_t item,
            PyObject *tensor)
{
    char shape[256], index[32] = "", bytes[40] = "", line[560];
    PyObject *part = attribute(state, tensor, OG_NAME_SHAPE);
    shape_text(part, shape, sizeof shape);
    Py_XDECREF(part);
    text_again(attribute(state, tensor, OG_NAME_DTYPE), &note->dtype,
               note->dtype_text, sizeof note->dtype_text);
    text_again(attribute(state, tensor, OG_NAME_DEVICE), &note->device,
               note->device_text, sizeof note->device_text);
    part = attribute(state, tensor, OG_NAME_NBYTES);
    if (part != NULL && PyLong_Check(part)) {
        (void)snprintf(bytes, sizeof bytes, ", %lld bytes",
                       PyLong_AsLongLong(part));
        og_forget();
    }
    Py_XDECREF(part);
    if (item >= 0) {
        (void)snprintf(index, sizeof index, "[%lld]", (long long)item);
    }
    (void)snprintf(line, sizeof line, "\n    %.80s%s: %s %s %s%s", name, index,
                   shape, note->dtype_text, note->device_text, bytes);
    return note_add(note, line);
}

typedef struct naming {
    og_state *state;
    og_note *note;
    PyObject *frame;
    bool headed; /* the line of this frame is written */
} naming;

static void
head_frame(naming *at)
{
    char line[400];
    PyObject *code = (PyObject *)PyFrame_GetCode((PyFrameObject *)at->frame);
    PyObject *name = attribute(at->state, code, OG_NAME_CO_NAME);
    PyObject *file = attribute(at->state, code, OG_NAME_CO_FILENAME);
    const char *where =
        file == NULL ? NULL : PyUnicode_AsUTF8AndSize(file, NULL);
    const char *what =
        name == NULL ? NULL : PyUnicode_AsUTF8AndSize(name, NULL);
    og_forget();
    const char *slash = where == NULL ? NULL : strrchr(where, '/');
    (void)snprintf(line, sizeof line,
                   "\n  in %.120s (%.120s):", what == NULL ? "?" : what,
                   slash != NULL   ? slash + 1
                   : where != NULL ? where
                                   : "?");
    at->headed = note_add(at->note, line);
    Py_DECREF(code);
    Py_XDECREF(name);
    Py_XDECREF(file);
}

static void
name_tensor(naming *at, PyObject *name, Py_ssize_t item, PyObject *tensor)
{
    og_note *note = at->note;
    const char *text =
        PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
    og_forget();
    if (text == NULL) {
        return;
    }
    if (note->listed < OG_NOTE_TENSORS && note->left_out == 0) {
        if (!at->headed) {
            head_frame(at);
        }
        if (at->headed && note_tensor(at->state, note, text, item, tensor)) {
            note->listed++;
            note->changed = true;
            return;
        }
    }
    note->left_out++;
    note->changed = true;
}

/* One local: a tensor, or a plain container that has some near its start. */
static void
name_value(naming *at, PyObject *name, PyObject *value)
{
    og_state *state = at->state;
    if (og_is_tensor(state, value)) {
        name_tensor(at, name, -1, value);
        return;
    }
    if (!og_has_tensor_near(state, value)) {
        return;
    }
    PyObject *items = PyDict_CheckExact(value) ? PyDict_Values(value)
                                               : PySequence_List(value);
    if (items == NULL) {
        og_forget();
        return;
    }
    for (Py_ssize_t i = 0; i < PyList_Size(items) && i < NEAR_ITEMS; i++) {
        PyObject *item = PyList_GetItem(items, i);
        if (item != NULL && og_is_tensor(state, item)) {
            name_tensor(at, name, i, item);
        }
    }
    Py_DECREF(items);
}

static void
name_dict(naming *at, PyObject *locals)
{
    PyObject *key, *value;
    Py_ssize_t place = 0;
    while (PyDict_Next(locals, &place, &key, &value)) {
        if (og_has_tensor_near(at->state, value)) {
            Py_INCREF(key);
            Py_INCREF(value);
            name_value(at, key, value);
            Py_DECREF(key);
            Py_DECREF(value);
        }
    }
}

/* A namespace may be a whole notebook: only the names this code uses. */
static void
name_namespace(naming *at, PyObject *locals)
{
    PyObject *code = (PyObject *)PyFrame_GetCode((PyFrameObject *)at->frame);
    PyObject *names = attribute(at->state, code, OG_NAME_CO_NAMES);
    Py_DECREF(code);
    for (Py_ssize_t i = 0; names != NULL && i < PyTuple_Size(names); i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        PyObject *value = PyDict_GetItemWithError(locals, name);
        if (value != NULL) {
            Py_INCREF(value);
            name_value(at, name, value);
            Py_DECREF(value);
        }
        og_forget();
    }
    Py_XDECREF(names);
}

static void
name_proxy(naming *at, PyObject *locals)
{
    PyObject *items = PyMapping_Items(locals);
    for (Py_ssize_t i = 0; items != NULL && i < PyList_Size(items); i++) {
        PyObject *pair = PyList_GetItem(items, i);
        if (PyTuple_CheckExact(pair) && PyTuple_Size(pair) == 2) {
            name_value(at, PyTuple_GetItem(pair, 0), PyTuple_GetItem(pair, 1));
        }
    }
    Py_XDECREF(items);
}

void
og_note_frame(og_state *state, og_note *note, PyObject *frame,
              const og_code_entry *entry)
{
    bool optimized = entry->optimized;
    naming at = {state, note, frame, false};
    PyObject *locals = attribute(state, frame, OG_NAME_F_LOCALS);
    if (locals == NULL) {
        return;
    }
    if (!PyDict_CheckExact(locals)) {
        /* From 3.13 on a proxy; but a namespace of the user's own making
         * is not asked. */
        if (optimized) {
            name_proxy(&at, locals);
        }
    }
    else if (optimized) {
        name_dict(&at, locals);
        og_snapshot_drop(locals, 1);
    }
    else {
        name_namespace(&at, locals);
    }
    Py_DECREF(locals);
    og_forget();
}

static PyObject *
notes_of(og_state *state, PyObject *exc)
{
    PyObject *dict = PyObject_GenericGetDict(exc, NULL);
    PyObject *notes = dict == NULL
                          ? NULL
                          : PyDict_GetItemWithError(
                                dict, state->sanitize.names[OG_NAME_NOTES]);
    Py_XINCREF(notes);
    Py_XDECREF(dict);
    return notes;
}

static void
note_resume(og_note *note, const char *text)
{
    size_t length = strlen(text);
    size_t more = strlen(MORE);
    if (length >= more && strcmp(text + length - more, MORE) == 0) {
        note->left_out = 1;
        length -= more;
    }
    if (length + TAIL_BYTES >= sizeof note->text) {
        note->left_out = 1;
        note->place = -1;
        return;
    }
    memcpy(note->text, text, length);
    note->text[length] = '\0';
    note->length = length;
    for (const char *at = text; (at = strstr(at, "\n    ")) != NULL; at++) {
        note->listed++;
    }
    note->listed -= note->left_out;
}

void
og_note_begin(og_state *state, og_note *note, PyObject *exc)
{
    note->length = 0;
    note->listed = note->left_out = 0;
    note->changed = false;
    note->place = -1;
    note->dtype = note->device = NULL;
    PyObject *notes = notes_of(state, exc);
    if (notes != NULL && PyList_CheckExact(notes)) {
        for (Py_ssize_t i = 0; i < PyList_Size(notes); i++) {
            PyObject *text = PyList_GetItem(notes, i);
            const char *utf8 = PyUnicode_CheckExact(text)
                                   ? PyUnicode_AsUTF8AndSize(text, NULL)
                                   : NULL;
            if (utf8 != NULL && strncmp(utf8, HEAD, strlen(HEAD)) == 0) {
                note->place = i;
                note_resume(note, utf8);
                break;
            }
        }
    }
    Py_XDECREF(notes);
    og_forget();
    if (note->place < 0) {
        (void)note_add(note, HEAD);
    }
}

void
og_note_end(og_state *state, og_note *note, PyObject *exc)
{
    Py_CLEAR(note->dtype);
    Py_CLEAR(note->device);
    if (!note->changed) {
        return;
    }
    if (note->left_out > 0) {
        memcpy(note->text + note->length, MORE, sizeof MORE);
        note->length += strlen(MORE);
    }
    PyObject *text =
        PyUnicode_DecodeUTF8(note->text, (Py_ssize_t)note->length, "replace");
    PyObject *notes = notes_of(state, exc);
    if (text != NULL && notes == NULL && !PyErr_Occurred()) {
        PyObject *dict = PyObject_GenericGetDict(exc, NULL);
        notes = PyList_New(0);
        if (dict != NULL && notes != NULL) {
            (void)PyDict_SetItem(dict, state->sanitize.names[OG_NAME_NOTES],
                                 notes);
        }
        Py_XDECREF(dict);
    }
    /* Notes that are no list are somebody's own affair. */
    if (text != NULL && notes != NULL && PyList_CheckExact(notes)) {
        if (note->place >= 0 && note->place < PyList_Size(notes)) {
            (void)PyList_SetItem(notes, note->place, Py_NewRef(text));
        }
        else {
            (void)PyList_Append(notes, text);
        }
    }
    Py_XDECREF(text);
    Py_XDECREF(notes);
    og_forget();
}

PyObject *
og_tensor_summary(og_state *state, PyObject *tensor)
{
    PyObject *result =
        PyStructSequence_New((PyTypeObject *)state->sanitize.tensor_summary);
    if (result == NULL) {
        return NULL;
    }
    PyObject *shape = attribute(state, tensor, OG_NAME_SHAPE);
    PyObject *plain = NULL;
    if (shape != NULL && (PyTuple_Check(shape) || PyList_Check(shape))) {
        plain = PySequence_Tuple(shape);
        og_forget();
    }
    Py_XDECREF(shape);
    PyObject *dtype = attribute(state, tensor, OG_NAME_DTYPE);
    PyObject *device = attribute(state, tensor, OG_NAME_DEVICE);
    PyStructSequence_SetItem(result, 0,
                             plain == NULL ? Py_NewRef(Py_None) : plain);
    PyStructSequence_SetItem(result, 1,
                             dtype == NULL ? Py_NewRef(Py_None) : dtype);
    PyStructSequence_SetItem(result, 2,
                             device == NULL ? Py_NewRef(Py_None) : device);
    return result;
}
