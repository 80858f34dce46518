/* The traceback part of the walk: one entry after the other, from the
 * innermost out, is replaced by an empty one. */
#include "py/sanitize_walk.h"

int
og_walk_push(og_walk *walk, PyObject *exc)
{
    if (og_map_find(&walk->seen, exc) != NULL) {
        return 0;
    }
    if (og_refs_push(&walk->queue, exc) < 0 ||
        og_map_put(&walk->seen, exc, NULL) < 0) {
        return -1;
    }
    return 0;
}

/* Notes the tensors of frame and clears it, once. */
static int
scrub_frame(og_walk *walk, PyObject *frame, const og_code_entry *entry)
{
    og_state *state = walk->state;
    int fresh = og_map_put(&walk->frames, frame, NULL);
    if (fresh <= 0) {
        return fresh;
    }
    og_frame_look look = og_frame_look_at(state, frame);
    PyObject *snapshot =
        look.finished && entry->optimized ? look.snapshot : NULL;
    Py_XINCREF(snapshot);
    /* A running frame shows nothing to a look, so it is always read. */
    if (walk->note.length > 0 && (look.has_tensor || !look.finished)) {
        og_note_frame(state, &walk->note, frame, entry);
    }
    og_frame_clear(state, frame, &look);
    if (snapshot != NULL) {
        og_snapshot_drop(snapshot, 1);
        Py_DECREF(snapshot);
    }
    return 0;
}

/* tb_lasti, or -1 when it cannot be read. */
static int
lasti_of(og_state *state, PyObject *entry)
{
    PyObject *lasti =
        PyObject_GetAttr(entry, state->sanitize.names[OG_NAME_TB_LASTI]);
    int result = lasti == NULL ? -1 : (int)PyLong_AsLong(lasti);
    Py_XDECREF(lasti);
    og_forget();
    return result;
}

/* A new entry equal to old over frame, before next (NULL: the last). */
static PyObject *
entry_like(og_state *state, PyObject *old, PyObject *frame, PyObject *next)
{
    og_sanitize_state *s = &state->sanitize;
    PyObject *lasti = PyObject_GetAttr(old, s->names[OG_NAME_TB_LASTI]);
    PyObject *line = PyObject_GetAttr(old, s->names[OG_NAME_TB_LINENO]);
    PyObject *result = NULL;
    if (line == NULL || line == Py_None) {
        /* No line is known there: -1 says so to TracebackType too. */
        og_forget();
        Py_XDECREF(line);
        line = PyLong_FromLong(-1);
    }
    if (lasti != NULL && line != NULL) {
        result = PyObject_CallFunctionObjArgs(s->traceback_type,
                                              next == NULL ? Py_None : next,
                                              frame, lasti, line, NULL);
    }
    Py_XDECREF(lasti);
    Py_XDECREF(line);
    return result;
}

/* The empty entry for old. Where no empty frame can be made the old frame,
 * cleared as far as possible, stays. NULL with an exception set. */
static PyObject *
empty_entry(og_walk *walk, PyObject *old, PyObject *next)
{
    og_state *state = walk->state;
    PyObject *frame =
        PyObject_GetAttr(old, state->sanitize.names[OG_NAME_TB_FRAME]);
    if (frame == NULL) {
        return NULL;
    }
    const og_code_entry *found =
        og_code_entry_of(state, frame, lasti_of(state, old));
    og_code_entry entry = {0};
    PyObject *empty = NULL, *result = NULL;
    if (found != NULL) {
        entry = *found;
        Py_XINCREF(entry.make);
    }
    og_forget();
    if (entry.make != NULL) {
        empty = og_empty_frame(state, frame, &entry);
        og_forget();
    }
    if (scrub_frame(walk, frame, &entry) < 0) {
        PyErr_NoMemory();
    }
    else {
        result = entry_like(state, old, empty != NULL ? empty : frame, next);
    }
    Py_XDECREF(entry.make);
    Py_XDECREF(empty);
    Py_DECREF(frame);
    return result;
}

static bool
entry_is_empty(og_walk *walk, PyObject *entry)
{
    og_state *state = walk->state;
    PyObject *frame =
        PyObject_GetAttr(entry, state->sanitize.names[OG_NAME_TB_FRAME]);
    const og_code_entry *found =
        frame == NULL ? NULL
                      : og_code_entry_of(state, frame, lasti_of(state, entry));
    bool result = found != NULL && found->make == NULL;
    Py_XDECREF(frame);
    og_forget();
    return result;
}

/* Collects the entries to replace into olds; *next (new reference or NULL)
 * is what comes after them and is as it should be. */
static int
collect(og_walk *walk, PyObject *traceback, og_refs *olds, PyObject **next)
{
    og_sanitize_state *s = &walk->state->sanitize;
    PyObject *at = Py_NewRef(traceback);
    while (at != NULL && at != Py_None) {
        og_map_entry *known = og_map_find(&walk->entries, at);
        if (known != NULL) {
            *next = Py_NewRef((PyObject *)known->value);
            break;
        }
        if (entry_is_empty(walk, at)) {
            *next = Py_NewRef(at);
            break;
        }
        PyObject *after = NULL;
        if (og_refs_push(olds, at) == 0) {
            after = PyObject_GetAttr(at, s->names[OG_NAME_TB_NEXT]);
        }
        Py_DECREF(at);
        if (after == NULL) {
            og_forget();
            return -1;
        }
        at = after;
    }
    Py_XDECREF(at);
    return 0;
}

PyObject *
og_walk_traceback(og_walk *walk, PyObject *traceback)
{
    og_sanitize_state *s = &walk->state->sanitize;
    og_refs olds = {0};
    PyObject *next = NULL;
    if (collect(walk, traceback, &olds, &next) < 0) {
        goto fail;
    }
    for (size_t i = olds.count; i-- > 0;) {
        PyObject *made = empty_entry(walk, olds.items[i], next);
        if (made == NULL) {
            goto fail;
        }
        if (i == 0 && next != NULL) {
            /* contextlib puts the old entry back: it then goes on to empty
             * frames as well. */
            (void)PyObject_SetAttr(olds.items[0], s->names[OG_NAME_TB_NEXT],
                                   next);
            og_forget();
        }
        Py_XDECREF(next);
        next = made;
        if (og_refs_push(&walk->holds, olds.items[i]) < 0 ||
            og_refs_push(&walk->holds, made) < 0 ||
            og_map_put(&walk->entries, olds.items[i], made) < 0) {
            goto fail;
        }
    }
    og_refs_free(&olds);
    return next;
fail:
    og_forget();
    Py_XDECREF(next);
    og_refs_free(&olds);
    return NULL;
}
