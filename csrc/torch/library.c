/* Registers opguard's torch ops when the library is loaded, by Python or by
 * any C or C++ program, and keeps the table that opguard._C fetches. */
#include "torch/opguard_ops.h"

#include <string.h>

#include "core/cpu.h"
#include "cuda/opguard_cuda.h"
#include "torch/look.h"
#include "torch/flags_read.h"
#include "torch/flags_table.h"
#include "torch/ops.h"
#include "torch/shim.h"

static const char *const schemas[] = {
    "pack(Tensor[] leaves) -> Tensor",
    "unpack(Tensor packed, Tensor[] like) -> Tensor[]",
    "add_low_rank(Tensor base, Tensor left, Tensor right, Tensor(a!) out) "
    "-> ()",
#define X(name, schema) #name schema,
#include "torch/flag_ops.h"
#undef X
};

static const struct {
    const char *key;
    const char *name;
    void (*kernel)(StableIValue *, uint64_t, uint64_t);
} kernels[] = {
    {"CPU", "pack", og_op_pack_cpu},
    {"CPU", "add_low_rank", og_op_add_low_rank},
#define X(name, schema) {"CPU", #name, og_op_##name},
#include "torch/flag_ops.h"
#undef X
    {"CUDA", "pack", og_op_pack_cuda},
#define X(name, schema) {"CUDA", #name, og_op_##name},
#include "torch/flag_ops.h"
#undef X
    /* packed is in host memory while like may be on a device. */
    {"CompositeExplicitAutograd", "unpack", og_op_unpack},
};

/* Written once by the constructor, before anybody can read it. */
static og_error registration;

/* The library handles live as long as the process, as torch's own do: ops
 * cannot be taken back while somebody may hold them. */
static og_status
register_all(og_error *err)
{
    TorchLibraryHandle library = NULL;
    og_status status = og_dtypes_agree(err);
    if (status == OG_OK) {
        status = og_shim_check(aoti_torch_library_init_def("opguard", __FILE__,
                                                           __LINE__, &library),
                               "registering the namespace opguard", err);
    }
    for (size_t i = 0; status == OG_OK && i < sizeof schemas / sizeof *schemas;
         i++) {
        status = og_shim_check(aoti_torch_library_def(library, schemas[i]),
                               schemas[i], err);
    }
    const char *key = "";
    for (size_t i = 0; status == OG_OK && i < sizeof kernels / sizeof *kernels;
         i++) {
        if (strcmp(key, kernels[i].key) != 0) {
            key = kernels[i].key;
            status = og_shim_check(
                aoti_torch_library_init_impl("opguard", key, __FILE__,
                                             __LINE__, &library),
                key, err);
        }
        if (status == OG_OK) {
            status = og_shim_check(
                torch_library_impl(library, kernels[i].name, kernels[i].kernel,
                                   OG_TORCH_FLOOR),
                kernels[i].name, err);
        }
    }
    return status;
}

__attribute__((constructor)) static void
on_load(void)
{
    registration.status = OG_OK;
    (void)register_all(&registration);
}

og_status
og_ops_registered(og_error *err)
{
    if (registration.status != OG_OK && err != NULL) {
        *err = registration;
    }
    return registration.status;
}

static og_status
tensor_extent(void *impl, int64_t *storage_bytes, int64_t *element_bytes,
              int32_t *device_type)
{
    /* An at::Tensor is one pointer, and a handle the address of one. */
    AtenTensorHandle handle = (AtenTensorHandle)(void *)&impl;
    int64_t storage = 0, numel = 0;
    int32_t dtype = 0, device = 0;
    if (aoti_torch_get_storage_size(handle, &storage) != 0 ||
        aoti_torch_get_numel(handle, &numel) != 0 ||
        aoti_torch_get_dtype(handle, &dtype) != 0 ||
        aoti_torch_get_device_type(handle, &device) != 0) {
        return OG_TORCH_FAILED;
    }
    *storage_bytes = storage;
    *element_bytes = numel * (int64_t)aoti_torch_dtype_element_size(dtype);
    *device_type = device;
    return OG_OK;
}

static og_status
tensor_storage(void *impl, void **data)
{
    AtenTensorHandle handle = (AtenTensorHandle)(void *)&impl;
    int64_t offset = 0;
    int32_t dtype = 0;
    void *first = NULL;
    if (aoti_torch_get_data_ptr(handle, &first) != 0 ||
        aoti_torch_get_storage_offset(handle, &offset) != 0 ||
        aoti_torch_get_dtype(handle, &dtype) != 0) {
        return OG_TORCH_FAILED;
    }
    size_t before = (size_t)offset * aoti_torch_dtype_element_size(dtype);
    *data = first == NULL ? NULL : (char *)first - before;
    return OG_OK;
}

const og_ops *
og_ops_table(void)
{
    static const og_ops table = {
        .size = sizeof(og_ops),
        .tensor_extent = tensor_extent,
        .device_type_cpu = 0,
        .cpu_isa = og_cpu_isa,
        .cuda_ready = og_cuda_ready,
        .tensor_storage = tensor_storage,
        .flags_check = og_table_flags_check,
        .flags_index = og_table_flags_index,
        .flags_push = og_table_flags_push,
        .flags_push_codes = og_table_flags_push_codes,
        .flags_merge = og_table_flags_merge,
        .flags_query = og_table_flags_query,
        .flags_clear = og_table_flags_clear,
        .flags_read = og_table_flags_read,
        .tensor_look = og_tensor_look,
        .flags_chain = og_table_flags_chain,
        .flags_gather = og_table_flags_gather,
    };
    return &table;
}
