/* opguard._C's way to the ops library: opened once, its table kept. */
#ifndef OPGUARD_PY_OPS_H
#define OPGUARD_PY_OPS_H

#include "py/family.h"
#include "torch/opguard_ops.h"

typedef struct og_ops_state {
    /* NULL until load_ops(path) has succeeded: without torch there is none.
     * The library stays open for the life of the process. */
    const og_ops *table;
    /* torch.Tensor and torch.nn.Parameter, or whatever a test bound in their
     * place; NULL until bind_types. Owned. */
    PyObject *tensor_type;
    PyObject *parameter_type;
} og_ops_state;

extern const og_family og_ops_family;

#endif
