/* The code of empty frames.
 *
 * It is the original's with the first instruction replaced by
 * RETURN_GENERATOR, so that offsets, lines, columns and names stay what they
 * were; arguments, cells and free variables become plain locals in their old
 * slots, all unbound. The exception table is dropped: closing such a
 * generator throws into it on 3.11, and no handler of the user may run then.
 *
 * A generator's frame that never ran says it stands at the first RESUME. So
 * all of these become NOP but one, which is added at the end, with the line
 * and columns of the instruction that failed: f_lineno and f_lasti, which
 * some formatters read instead of the traceback's, then tell the same. From
 * 3.13 on it stands one further, hence the NOP behind it. */
#include "py/sanitize_frames.h"

#include <string.h>

/* CO_OPTIMIZED | CO_NEWLOCALS | CO_GENERATOR */
#define EMPTY_FLAGS 0x23

/* Kinds of entries in co_linetable that are told apart here. */
#define LINES_LONG 14
#define LINES_NONE 15

static PyObject *
local_names(og_state *state, PyObject *code, bool *hides)
{
    static const char *const kinds[] = {"co_varnames", "co_cellvars",
                                        "co_freevars"};
    PyObject *names = PyList_New(0), *result = NULL;
    for (size_t k = 0; names != NULL && k < 3; k++) {
        PyObject *part = PyObject_GetAttrString(code, kinds[k]);
        if (part == NULL || !PyTuple_Check(part)) {
            Py_XDECREF(part);
            goto done;
        }
        for (Py_ssize_t i = 0; i < PyTuple_Size(part); i++) {
            PyObject *name = PyTuple_GetItem(part, i);
            int known = PySequence_Contains(names, name);
            int hide = PySequence_Contains(state->sanitize.hide_names, name);
            /* Under its own name an unbound local would erase the value
             * that og_empty_frame gives it. */
            PyObject *kept =
                hide > 0 ? PyUnicode_FromFormat(".%U", name) : Py_NewRef(name);
            bool failed = known < 0 || hide < 0 || kept == NULL ||
                          (known == 0 && PyList_Append(names, kept) < 0);
            Py_XDECREF(kept);
            if (failed) {
                Py_DECREF(part);
                goto done;
            }
            *hides = *hides || hide > 0;
        }
        Py_DECREF(part);
    }
    result = names == NULL ? NULL : PyList_AsTuple(names);
done:
    Py_XDECREF(names);
    return result;
}

static PyObject *
instructions(og_state *state, PyObject *code)
{
    /* RETURN_GENERATOR, RESUME and NOP, as this release numbers them. */
    const char *numbers = PyBytes_AsString(state->sanitize.numbers);
    PyObject *text = PyObject_GetAttrString(code, "co_code");
    PyObject *result = NULL;
    if (text != NULL && PyBytes_Check(text) && PyBytes_Size(text) >= 2) {
        Py_ssize_t size = PyBytes_Size(text);
        result = PyBytes_FromStringAndSize(NULL, size + 4);
        if (result != NULL) {
            char *at = PyBytes_AsString(result);
            memcpy(at, PyBytes_AsString(text), (size_t)size);
            for (Py_ssize_t i = 0; i < size; i += 2) {
                at[i] = at[i] == numbers[1] ? numbers[2] : at[i];
            }
            at[0] = numbers[0];
            at[size] = numbers[1];
            at[size + 2] = numbers[2];
            at[1] = at[size + 1] = at[size + 3] = 0;
        }
    }
    else if (text != NULL) {
        PyErr_SetString(PyExc_ValueError, "expected code, none came");
    }
    Py_XDECREF(text);
    return result;
}

/* A position as co_linetable holds it; columns are one more than theirs. */
typedef struct position {
    int64_t line, end_line; /* wide: a crafted table may say anything */
    unsigned column, end_column;
    bool known;
} position;

/* Reads 6 bits a byte, lowest first; stays inside [*at, end). */
static unsigned
read_number(const unsigned char **at, const unsigned char *end)
{
    unsigned value = 0, shift = 0;
    while (*at < end && shift < 30) {
        unsigned byte = *(*at)++;
        value |= (byte & 63) << shift;
        shift += 6;
        if (!(byte & 64)) {
            break;
        }
    }
    return value;
}

static void
write_number(unsigned char **at, unsigned value)
{
    while (value >= 64) {
        *(*at)++ = (unsigned char)(64 | (value & 63));
        value >>= 6;
    }
    *(*at)++ = (unsigned char)value;
}

static int
read_delta(const unsigned char **at, const unsigned char *end)
{
    unsigned value = read_number(at, end);
    return value & 1 ? -(int)(value >> 1) : (int)(value >> 1);
}

/* Reads the entry at *at and goes on to the next; line is the running one. */
static position
read_entry(const unsigned char **at, const unsigned char *end, int64_t *line)
{
    position result = {0, 0, 0, 0, false};
    int kind = (*(*at)++ >> 3) & 15;
    if (kind >= 13 && kind != LINES_NONE) {
        *line += read_delta(at, end);
        result.known = true;
    }
    result.line = result.end_line = *line;
    if (kind == LINES_LONG) {
        result.end_line += read_number(at, end);
        result.column = read_number(at, end);
        result.end_column = read_number(at, end);
    }
    else if (kind >= 10 && kind <= 12 && end - *at >= 2) {
        *line += kind - 10;
        result.line = result.end_line = *line;
        result.column = (unsigned)(*at)[0] + 1;
        result.end_column = (unsigned)(*at)[1] + 1;
        result.known = true;
    }
    else if (kind < 10 && end - *at >= 1) {
        result.column = (unsigned)kind * 8 + ((*at)[0] >> 4) + 1;
        result.end_column = result.column + ((*at)[0] & 15);
        result.known = true;
    }
    while (*at < end && !(**at & 128)) {
        (*at)++;
    }
    return result;
}

/* co_linetable and one entry more, equal to that of the unit at lasti. */
static PyObject *
line_table(PyObject *code, int lasti)
{
    PyObject *table = PyObject_GetAttrString(code, "co_linetable");
    PyObject *first = PyObject_GetAttrString(code, "co_firstlineno");
    PyObject *result = NULL;
    if (table != NULL && first != NULL && PyBytes_Check(table)) {
        const unsigned char *begin =
            (const unsigned char *)PyBytes_AsString(table);
        const unsigned char *at = begin, *end = begin + PyBytes_Size(table);
        unsigned char more[32], *out = more;
        position found = {0, 0, 0, 0, false};
        int64_t line = PyLong_AsLong(first);
        Py_ssize_t unit = 0;
        while (at < end) {
            int units = (*at & 7) + 1;
            position here = read_entry(&at, end, &line);
            if (lasti / 2 >= unit && lasti / 2 < unit + units) {
                found = here;
            }
            unit += units;
        }
        int kind = found.known ? LINES_LONG : LINES_NONE;
        *out++ = (unsigned char)(128 | kind << 3 | 1); /* two units */
        if (found.known) {
            int64_t delta = found.line - line;
            write_number(&out, delta < 0 ? ((unsigned)-delta << 1) | 1
                                         : (unsigned)delta << 1);
            write_number(&out, (unsigned)(found.end_line - found.line));
            write_number(&out, found.column);
            write_number(&out, found.end_column);
        }
        result = PyBytes_FromStringAndSize(NULL, end - begin + (out - more));
        if (result != NULL) {
            char *bytes = PyBytes_AsString(result);
            memcpy(bytes, begin, (size_t)(end - begin));
            memcpy(bytes + (end - begin), more, (size_t)(out - more));
        }
    }
    Py_XDECREF(table);
    Py_XDECREF(first);
    return result;
}

PyObject *
og_empty_code(og_state *state, PyObject *code, int lasti, bool *hides)
{
    PyObject *names = NULL, *text = NULL, *values = NULL, *replace = NULL;
    PyObject *none = NULL, *table = NULL, *result = NULL;
    names = local_names(state, code, hides);
    text = instructions(state, code);
    table = line_table(code, lasti);
    replace = PyObject_GetAttrString(code, "replace");
    none = PyTuple_New(0);
    if (names == NULL || text == NULL || replace == NULL || none == NULL ||
        table == NULL) {
        goto done;
    }
    values = Py_BuildValue(
        "{s:O,s:i,s:i,s:i,s:O,s:n,s:O,s:O,s:i,s:y,s:O}", "co_code", text,
        "co_argcount", 0, "co_posonlyargcount", 0, "co_kwonlyargcount", 0,
        "co_varnames", names, "co_nlocals", PyTuple_Size(names), "co_cellvars",
        none, "co_freevars", none, "co_flags", EMPTY_FLAGS,
        "co_exceptiontable", "", "co_linetable", table);
    if (values != NULL) {
        result = PyObject_Call(replace, none, values);
    }
done:
    Py_XDECREF(names);
    Py_XDECREF(text);
    Py_XDECREF(replace);
    Py_XDECREF(none);
    Py_XDECREF(values);
    Py_XDECREF(table);
    return result;
}
