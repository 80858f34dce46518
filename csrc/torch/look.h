/* A tensor as a caller needs it that makes another like it. */
#ifndef OPGUARD_TORCH_LOOK_H
#define OPGUARD_TORCH_LOOK_H

#include "torch/opguard_ops.h"

/* og_ops.tensor_look. */
og_status
og_tensor_look(void *impl, og_look *look);

#endif
