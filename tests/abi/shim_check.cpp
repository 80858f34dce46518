// csrc/torch/shim.h against torch's own headers: both declare each function with C linkage, so a
// signature of ours that differs is an error ("conflicting declaration of C function").
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <type_traits>

#define OG_SHIM_TYPES_FROM_TORCH
#include "torch/shim.h"

// The opaque types are pointers and words on both sides.
static_assert(std::is_same_v<AOTITorchError, OgShimCode>);
static_assert(sizeof(AtenTensorHandle) == sizeof(void *));
static_assert(sizeof(StableListHandle) == sizeof(void *));
static_assert(std::is_same_v<StableIValue, uint64_t>);

// A name in the list that torch does not declare is ours alone: compared here it would pass, so the
// test also looks each name up in torch's headers.
#define X(ret, name, params) static_assert(std::is_same_v<ret(*) params, decltype(&name)>);
#include "torch/shim_list.h"
#undef X

// What shim.c looks up at run time, with the types it casts to.
#ifdef OG_CHECK_NEWER
static_assert(std::is_same_v<const char *(*)(), decltype(&torch_exception_get_what_without_backtrace)>);
#endif
