/* The flag functions of opguard.flags: from a Python call to the ops library
 * in one C function.
 *
 * Each goes the short road only where nothing of torch could be passed over:
 * tensors of exactly the bound classes, no dispatch mode, no functorch, no
 * function mode, no tracing, memory that is there, arguments that are right.
 * In every other case it calls the Python function that was bound for it with
 * the arguments as they came: that one goes through torch.ops and says what
 * is wrong with an argument. So nothing here has a message of its own. */
#ifndef OPGUARD_PY_FLAGS_H
#define OPGUARD_PY_FLAGS_H

#include "py/dlpack.h"
#include "py/family.h"
#include "torch/opguard_ops.h"

/* The functions that have a short road here, by the names that their long
 * ones have in opguard.flags._traced. */
/* clang-format off */
#define OG_FLAGS_LONG(X) \
    X(check) X(check_) X(index) X(push) X(push_) X(merge) X(merge_) \
    X(gather) \
    X(find) X(is_ok) X(is_err) X(count) X(max_severity) X(new) \
    X(read) X(read_all)

/* What else is bound: resolve(location) -> int, for what is neither an id nor
 * a module that knows its id; empty(rows, columns, dtype number, like) ->
 * tensor, for memory that is not the host's; torch's four questions, () -> 0,
 * False or None when there is nothing in the way; the DLPack capsule;
 * noted(flags) -> flags, bound only while somebody asks which tensors are
 * flags: told of each that a short road records in or makes. */
#define OG_FLAGS_BOUND(X) \
    OG_FLAGS_LONG(X) \
    X(resolve) X(empty) X(dispatch_modes) X(functorch) X(function_modes) \
    X(tracing) X(exchange) X(noted)
/* clang-format on */

typedef struct og_flags_state {
#define OG_FLAGS_FIELD(name) PyObject *name;
    OG_FLAGS_BOUND(OG_FLAGS_FIELD) /* owned, NULL until flags_bind */
#undef OG_FLAGS_FIELD
    const og_dlpack_api *api; /* in exchange; NULL: empty makes all tensors */
    PyObject *name_location;  /* interned */
    int64_t epoch;            /* of the ids that modules hold; 0: none */
} og_flags_state;

extern const og_family og_flags_family;

#endif
