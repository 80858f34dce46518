/* The note: which tensors were alive, as text of bounded size. */
#ifndef OPGUARD_PY_SANITIZE_NOTE_H
#define OPGUARD_PY_SANITIZE_NOTE_H

#include "py/sanitize_frames.h"

#define OG_NOTE_BYTES 4096
#define OG_NOTE_TENSORS 32

typedef struct og_note {
    char text[OG_NOTE_BYTES];
    size_t length;
    int listed;
    int left_out;     /* tensors met after the note was full */
    Py_ssize_t place; /* in __notes__; -1 when there is none yet */
    bool changed;
    /* The last tensor's, with their texts: most tensors share them. Owned. */
    PyObject *dtype, *device;
    char dtype_text[48], device_text[32];
} og_note;

/* Goes on from the note a guard further in has left on exc. */
void
og_note_begin(og_state *state, og_note *note, PyObject *exc);

/* Lists the tensors among the locals of frame. No exception is left set. */
void
og_note_frame(og_state *state, og_note *note, PyObject *frame,
              const og_code_entry *entry);

/* Puts the note on exc; no exception is left set. */
void
og_note_end(og_state *state, og_note *note, PyObject *exc);

/* A new reference to a TensorSummary; NULL with an exception set. */
PyObject *
og_tensor_summary(og_state *state, PyObject *tensor);

#endif
