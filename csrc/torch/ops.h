/* The boxed kernels; schemas are in library.c and flag_ops.h. */
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

/* opguard::add_low_rank(Tensor base, Tensor left, Tensor right,
 *                       Tensor(a!) out) -> () */
void
og_op_add_low_rank(StableIValue *stack, uint64_t inputs, uint64_t outputs);

#define X(name, schema) \
    void og_op_##name(StableIValue *stack, uint64_t inputs, uint64_t outputs);
#include "torch/flag_ops.h"
#undef X

#endif
