/* The boxed kernels, one line each; schemas are in library.c. */
#ifndef OPGUARD_TORCH_OPS_H
#define OPGUARD_TORCH_OPS_H

#include "torch/shim.h"

/* opguard::pack(Tensor[] leaves) -> Tensor */
void
og_op_pack_cpu(StableIValue *stack, uint64_t inputs, uint64_t outputs);
void
og_op_pack_cuda(StableIValue *stack, uint64_t inputs, uint64_t outputs);

/* opguard::unpack(Tensor packed, Tensor[] like) -> Tensor[] */
void
og_op_unpack(StableIValue *stack, uint64_t inputs, uint64_t outputs);

#endif
