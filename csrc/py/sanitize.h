/* Sanitizing: an exception goes on, what it held alive does not.
 *
 * One walk over __cause__, __context__ and group members empties tracebacks,
 * clears finished frames, replaces tensors in the payload by summaries and
 * writes one bounded note. Nothing here raises or masks the user's error:
 * what cannot be done is left as it was. */
#ifndef OPGUARD_PY_SANITIZE_H
#define OPGUARD_PY_SANITIZE_H

#include "py/family.h"

struct og_code_entry;

/* Interned names; the texts are in sanitize.c, in this order. */
typedef enum og_name {
    OG_NAME_TB_NEXT,
    OG_NAME_TB_FRAME,
    OG_NAME_TB_LASTI,
    OG_NAME_TB_LINENO,
    OG_NAME_GI_FRAME,
    OG_NAME_F_LOCALS,
    OG_NAME_F_GLOBALS,
    OG_NAME_CLEAR,
    OG_NAME_SHAPE,
    OG_NAME_DTYPE,
    OG_NAME_DEVICE,
    OG_NAME_NBYTES,
    OG_NAME_NOTES,
    OG_NAME_MARK,
    OG_NAME_EMPTY,
    OG_NAME_CO_NAMES,
    OG_NAME_CO_NAME,
    OG_NAME_CO_FILENAME,
    OG_NAME_PARAMETERS,
    OG_NAME_MODULES,
    OG_NAME_COUNT
} og_name;

typedef struct og_sanitize_state {
    PyObject *names[OG_NAME_COUNT];
    PyObject *hide_names;    /* tuple: locals by which formatters skip */
    PyObject *global_names;  /* tuple: module attributes formatters read */
    PyObject *numbers;       /* bytes: RETURN_GENERATOR, RESUME, NOP */
    PyObject *frame_type;    /* types.FrameType */
    PyObject *code_type;     /* types.CodeType */
    PyObject *cell_type;     /* types.CellType */
    PyObject *function_type; /* types.FunctionType */
    PyObject *traceback_type;
    PyObject *module_type;
    PyObject *deque_type;
    PyObject *ordered_type;   /* collections.OrderedDict */
    PyObject *namespace_type; /* types.SimpleNamespace */
    PyObject *args;           /* getset BaseException.args */
    PyObject *members;        /* member BaseExceptionGroup.exceptions */
    PyObject *type_dict;      /* getset type.__dict__ */
    PyObject *type_mro;       /* member type.__mro__ */
    PyObject *tensor_summary; /* struct sequence types */
    PyObject *object_summary;
    traverseproc frame_traverse;
    inquiry frame_clear;
    traverseproc cell_traverse;
    struct og_code_entry *codes; /* the cache of emptied code, owned */
    bool ipython_asked;          /* the handler is registered, or cannot be */
} og_sanitize_state;

extern const og_family og_sanitize_family;

struct og_state;

/* Every step of sanitizing may fail by itself, through a hostile object or for
 * want of memory. The user's exception matters, the step's own does not: it
 * ends here, and what the step was for stays as it was. */
static inline void
og_forget(void)
{
    PyErr_Clear();
}

/* Sanitizes exc in place, with all it chains to. All pointers are borrowed.
 * handled: what the caller was already handling, left alone with its whole
 * chain; NULL or None when nothing. keep: a tuple of exception types whose
 * payload stays, or NULL. Never raises; an exception that is set stays set.
 * Does nothing under OPGUARD_KEEP_FRAMES=1. */
void
og_sanitize(struct og_state *state, PyObject *exc, PyObject *handled,
            PyObject *keep);

/* What a guard's __exit__ calls: og_sanitize, and the mark by which the
 * IPython handler finds the frames above the guard after the cell. */
void
og_sanitize_exit(struct og_state *state, PyObject *exc, PyObject *handled,
                 PyObject *keep);

#endif
