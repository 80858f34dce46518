// csrc/torch/shim.h against torch's own headers: both declare each function with C linkage, so a
// signature of ours that differs is an error ("conflicting declaration of C function").
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
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

// The numbers of dtypes and devices that the kernels compare with.
#include "torch/flags.h"
#define OG_SAME(ours, theirs) static_assert(ours == static_cast<int>(theirs))
OG_SAME(OG_DTYPE_UINT8, c10::ScalarType::Byte);
OG_SAME(OG_DTYPE_INT8, c10::ScalarType::Char);
OG_SAME(OG_DTYPE_INT16, c10::ScalarType::Short);
OG_SAME(OG_DTYPE_INT32, c10::ScalarType::Int);
OG_SAME(OG_DTYPE_INT64, c10::ScalarType::Long);
OG_SAME(OG_DTYPE_FLOAT16, c10::ScalarType::Half);
OG_SAME(OG_DTYPE_FLOAT32, c10::ScalarType::Float);
OG_SAME(OG_DTYPE_FLOAT64, c10::ScalarType::Double);
OG_SAME(OG_DTYPE_COMPLEX32, c10::ScalarType::ComplexHalf);
OG_SAME(OG_DTYPE_COMPLEX64, c10::ScalarType::ComplexFloat);
OG_SAME(OG_DTYPE_COMPLEX128, c10::ScalarType::ComplexDouble);
OG_SAME(OG_DTYPE_BOOL, c10::ScalarType::Bool);
OG_SAME(OG_DTYPE_BFLOAT16, c10::ScalarType::BFloat16);
OG_SAME(OG_DTYPE_FLOAT8_E5M2, c10::ScalarType::Float8_e5m2);
OG_SAME(OG_DTYPE_FLOAT8_E4M3FN, c10::ScalarType::Float8_e4m3fn);
OG_SAME(OG_DTYPE_FLOAT8_E5M2FNUZ, c10::ScalarType::Float8_e5m2fnuz);
OG_SAME(OG_DTYPE_FLOAT8_E4M3FNUZ, c10::ScalarType::Float8_e4m3fnuz);
OG_SAME(OG_DTYPE_UINT16, c10::ScalarType::UInt16);
OG_SAME(OG_DTYPE_UINT32, c10::ScalarType::UInt32);
OG_SAME(OG_DTYPE_UINT64, c10::ScalarType::UInt64);
OG_SAME(OG_DTYPE_FLOAT8_E8M0FNU, c10::ScalarType::Float8_e8m0fnu);
OG_SAME(OG_DEVICE_CPU, c10::DeviceType::CPU);
OG_SAME(OG_DEVICE_CUDA, c10::DeviceType::CUDA);

// What shim.c looks up at run time, with the types it casts to.
#ifdef OG_CHECK_NEWER
static_assert(std::is_same_v<const char *(*)(), decltype(&torch_exception_get_what_without_backtrace)>);
#endif
