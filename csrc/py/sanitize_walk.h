/* What the parts of one walk over an exception share. */
#ifndef OPGUARD_PY_SANITIZE_WALK_H
#define OPGUARD_PY_SANITIZE_WALK_H

#include "py/sanitize_map.h"
#include "py/sanitize_note.h"

typedef struct og_walk {
    og_state *state;
    PyObject *keep; /* borrowed tuple of types, or NULL */
    bool deep;      /* go on to what exceptions chain to */
    og_refs queue;  /* the exceptions met, in order; all stay alive */
    og_map seen;    /* those, and what the caller was handling */
    og_map frames;  /* frames done, and those to be left alone */
    og_map entries; /* traceback entry -> the empty one in its place */
    og_refs holds;  /* keeps every address in the maps valid */
    og_note note;
} og_walk;

/* Each returns -1 without memory, with nothing set; else what fails is left
 * as it was. */

/* Puts exc on the queue unless it was met before. */
int
og_walk_push(og_walk *walk, PyObject *exc);

/* A new reference to what stands for traceback: an equal one of empty frames;
 * finished frames are cleared, tensors noted. NULL without memory. */
PyObject *
og_walk_traceback(og_walk *walk, PyObject *traceback);

/* Replaces tensors in args, attributes and members of exc; exceptions found
 * there join the queue. */
int
og_walk_payload(og_walk *walk, PyObject *exc);

#endif
