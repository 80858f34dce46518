/* libtorch's stable C ABI, declared for C: torch's own headers are C++.
 *
 * The names and types are torch's; tests/abi/shim_check.cpp includes both and
 * does not compile when a signature here is wrong. */
#ifndef OPGUARD_TORCH_SHIM_H
#define OPGUARD_TORCH_SHIM_H

#include "core/base.h"

#ifndef OG_SHIM_TYPES_FROM_TORCH
/* Opaque: borrowed unless a function says it returns a new reference. */
typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct TorchLibraryOpaque *TorchLibraryHandle;
typedef struct StableListOpaque *StableListHandle;
/* One argument or result of a boxed kernel; a handle by its pointer bits. A
 * kernel owns the handles it is given, its caller those it returns. */
typedef uint64_t StableIValue;
#endif
typedef int32_t OgShimCode; /* 0: success */

#ifdef __cplusplus
extern "C" {
#endif

#define X(ret, name, params) ret name params;
#include "torch/shim_list.h"
#undef X

/* The oldest torch the binary runs with: 2.10.0, as torch encodes it. */
#define OG_TORCH_FLOOR (((uint64_t)2 << 56) | ((uint64_t)10 << 48))

/* Turns a shim's return code into a status; the message is torch's own where
 * this torch can tell it (2.13 and later). */
og_status
og_shim_check(OgShimCode code, const char *what, og_error *err);

/* The current CUDA stream of a device; its function is in libtorch_cuda,
 * which is looked up on first use and is absent from a CPU build. */
og_status
og_shim_cuda_stream(int32_t device, void **stream, og_error *err);

#ifdef __cplusplus
}
#endif
#endif
