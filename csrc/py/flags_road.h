/* What the flags_*.c files share: the short road's conditions and its means.
 *
 * A step of it returns OG_ROAD_SHORT to go on, OG_ROAD_LONG without an
 * exception when the Python function has to take over (nothing was written),
 * OG_ROAD_FAILED with one. */
#ifndef OPGUARD_PY_FLAGS_ROAD_H
#define OPGUARD_PY_FLAGS_ROAD_H

#include "core/slots.h"
#include "py/state.h"

enum { OG_ROAD_FAILED = -1, OG_ROAD_LONG = 0, OG_ROAD_SHORT = 1 };

/* torch's numbers of the dtypes that flags and answers about them have. */
enum {
    OG_TORCH_INT32 = 3,
    OG_TORCH_INT64 = 4,
    OG_TORCH_FLOAT32 = 6,
    OG_TORCH_FLOAT64 = 7,
    OG_TORCH_BOOL = 11
};

/* From this many elements (or slots) on, other threads may run meanwhile. */
#define OG_FLAGS_LET_GO 65536

/* Goes on only if the step may: for functions that own nothing yet. */
#define OG_FLAGS_STEP(call)           \
    do {                              \
        int road_ = (call);           \
        if (road_ != OG_ROAD_SHORT) { \
            return road_;             \
        }                             \
    } while (0)

/* A tensor that was made here: object is owned. */
typedef struct og_flags_out {
    PyObject *object;
    void *impl; /* borrowed from object */
} og_flags_out;

/* Calls the Python function of the long road; a new reference. */
PyObject *
og_flags_long(PyObject *function, PyObject *const *args, Py_ssize_t count);

/* The result of a call that writes out (owned by it): out's object. */
int
og_flags_done(og_status status, og_flags_out out, PyObject **result);

/* The end of each function: result (owned) after OG_ROAD_SHORT, which may be
 * NULL otherwise. */
PyObject *
og_flags_end(int road, PyObject *result, PyObject *function,
             PyObject *const *args, Py_ssize_t count);

/* Tells of flags (owned) that a short road made, where somebody asked; the
 * same flags, or NULL with an exception. */
PyObject *
og_flags_told(og_state *state, int road, PyObject *flags);

/* Whether torch has nothing in the way. */
int
og_flags_clear_road(og_state *state);

/* The impl of a tensor of exactly one of the bound classes. Borrowed. */
int
og_flags_impl(og_state *state, PyObject *object, void **impl);

/* The same, and what it is like. */
int
og_flags_look(og_state *state, PyObject *object, void **impl, og_look *look);

/* An int that is exactly one. */
int
og_flags_int(PyObject *object, int64_t *value);

/* A location's id, 0..1023. Runs user code. */
int
og_flags_location(og_state *state, PyObject *object, int64_t *place);

/* The slot of an error; severity may be None. Runs user code. */
int
og_flags_slot(og_state *state, PyObject *location, PyObject *code,
              PyObject *severity, int64_t default_severity, int64_t *slot);

/* Slots of a word by torch's dtype number, 0 for what is no flags' dtype. */
int64_t
og_flags_slots(int32_t dtype);

/* A tensor (rows,) for columns < 0, else (rows, columns), where like is. */
int
og_flags_make(og_state *state, int64_t rows, int64_t columns, int32_t dtype,
              const og_look *like, PyObject *like_object, og_flags_out *out);

/* Flags like those of look, or new ones for rows samples. */
int
og_flags_make_like(og_state *state, const og_look *look, PyObject *object,
                   og_flags_out *out);
int
og_flags_make_new(og_state *state, int64_t key, const og_look *like,
                  PyObject *like_object, og_flags_out *out);

/* Methods of the other files; each ends with a zero entry. */
extern PyMethodDef og_flags_record_methods[];
extern PyMethodDef og_flags_query_methods[];
extern PyMethodDef og_flags_read_methods[];
extern PyMethodDef og_flags_out_methods[];

#endif
