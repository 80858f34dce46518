/* The flag ops, once: X(name, the rest of the schema). A kernel runs on the
 * CPU and on CUDA, and asks the tensors which of them it is.
 *
 * flags: (N, W), words of int64, int32, float64 or float32. key: a
 * configuration (core/slots.h); checks: 1 NaN, 2 +Inf, 4 -Inf. x of any
 * layout, dimension 0 being the samples, 0-d being one.
 *
 * flags_gather: index (M,) or (M, K) of int64 or int32; row m of the result
 * is rows index[m] merged in their order, -1 being none.
 *
 * An op that writes leaves the version of flags as it is: torch's C ABI has
 * no call that raises it, and autograd saves nothing of flags. */
#ifndef X
#error "define X(name, schema) before including torch/flag_ops.h"
#endif
/* clang-format off */
X(flags_check, "(Tensor flags, Tensor x, int location, int checks, int key) -> Tensor")
X(flags_check_, "(Tensor(a!) flags, Tensor x, int location, int checks, int key) -> ()")
X(flags_check_new, "(Tensor x, int location, int checks, int key) -> Tensor")
X(flags_index, "(Tensor flags, Tensor ids, int size, int location, int key) -> Tensor")
X(flags_index_new, "(Tensor ids, int size, int location, int key) -> Tensor")
X(flags_index_clamp, "(Tensor flags, Tensor ids, int size, int location, int key) -> (Tensor flags, Tensor ids)")
X(flags_push, "(Tensor flags, Tensor where, int slot, int key) -> Tensor")
X(flags_push_, "(Tensor(a!) flags, Tensor where, int slot, int key) -> ()")
X(flags_push_all, "(Tensor flags, int slot, int key) -> Tensor")
X(flags_push_all_, "(Tensor(a!) flags, int slot, int key) -> ()")
X(flags_push_codes, "(Tensor flags, Tensor codes, int location, int severity, int default_severity, int key) -> Tensor")
X(flags_merge, "(Tensor[] flags, int key) -> Tensor")
X(flags_merge_, "(Tensor(a!) flags, Tensor other, int key) -> ()")
X(flags_gather, "(Tensor flags, Tensor index, int key) -> Tensor")
X(flags_find, "(Tensor flags, int mask, int value) -> Tensor")
X(flags_ok, "(Tensor flags) -> Tensor")
X(flags_err, "(Tensor flags) -> Tensor")
X(flags_count, "(Tensor flags) -> Tensor")
X(flags_max_severity, "(Tensor flags) -> Tensor")
X(flags_clear, "(Tensor flags, int code) -> Tensor")
X(row_findings, "(Tensor x) -> Tensor")
/* clang-format on */
