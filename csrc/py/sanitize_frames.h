/* Empty frames: a frame with the code, file, lines and carets of another and
 * none of its values. Also telling finished frames from others. */
#ifndef OPGUARD_PY_SANITIZE_FRAMES_H
#define OPGUARD_PY_SANITIZE_FRAMES_H

#include "py/state.h"

typedef struct og_code_entry {
    PyObject *code; /* owned; NULL: free */
    int lasti;      /* offset of the instruction it failed at */
    /* Owned function; called, it gives a generator whose frame is empty.
     * NULL: code is itself that of an empty frame. */
    PyObject *make;
    bool optimized; /* locals are the frame's own, not a namespace */
    bool hides;     /* has a local by which formatters skip the frame */
} og_code_entry;

/* The entry for the code of frame at lasti (borrowed), made when missing;
 * valid until the next call. NULL with an exception set. */
const og_code_entry *
og_code_entry_of(og_state *state, PyObject *frame, int lasti);

/* A new reference to the code of empty frames that stand at lasti of code;
 * *hides becomes true when code has a local by which formatters skip frames.
 * NULL with an exception set. */
PyObject *
og_empty_code(og_state *state, PyObject *code, int lasti, bool *hides);

/* A new reference to an empty frame standing for frame; NULL with an
 * exception set. Reads hiding locals, so call it before clearing. */
PyObject *
og_empty_frame(og_state *state, PyObject *frame, const og_code_entry *entry);

typedef struct og_frame_look {
    bool finished;
    bool has_tensor;    /* finished frames: worth reading the names */
    PyObject *snapshot; /* borrowed: a stale dict of f_locals, or NULL */
} og_frame_look;

/* Looks by tp_traverse; runs no Python code, cannot fail. */
og_frame_look
og_frame_look_at(og_state *state, PyObject *frame);

/* Is it a tensor, or a plain list, tuple or dict that starts with some? */
bool
og_is_tensor(og_state *state, PyObject *object);
bool
og_has_tensor_near(og_state *state, PyObject *object);

/* Clears a finished frame and its snapshot; no exception is left set. */
void
og_frame_clear(og_state *state, PyObject *frame, const og_frame_look *look);

/* Empties a dict that f_locals gave unless somebody else holds it too;
 * ours: the references to it that the caller itself holds. */
void
og_snapshot_drop(PyObject *snapshot, Py_ssize_t ours);

void
og_codes_free(og_sanitize_state *sanitize);
int
og_codes_traverse(og_sanitize_state *sanitize, visitproc visit, void *arg);

#endif
