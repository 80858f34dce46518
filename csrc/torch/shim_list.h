/* Every function of libtorch's stable C ABI that opguard binds at load time,
 * once: shim.h declares from this list, the build makes the import library
 * from it, and tests hold each name and signature against torch's own.
 *
 * X(return type, name, parameters): all of them are in torch 2.10, the floor.
 * Newer functions are not listed here; shim.c looks them up at run time. */
#ifndef X
#error "define X(ret, name, params) before including torch/shim_list.h"
#endif
/* clang-format off */
X(int32_t, aoti_torch_device_type_cpu, (void))
X(int32_t, aoti_torch_device_type_cuda, (void))
X(int32_t, aoti_torch_dtype_uint8, (void))
X(int32_t, aoti_torch_dtype_int32, (void))
X(int32_t, aoti_torch_dtype_int64, (void))
X(int32_t, aoti_torch_dtype_uint64, (void))
X(int32_t, aoti_torch_dtype_float32, (void))
X(int32_t, aoti_torch_dtype_bfloat16, (void))
X(int32_t, aoti_torch_dtype_float8_e4m3fnuz, (void))
X(int32_t, aoti_torch_dtype_bool, (void))
X(size_t, aoti_torch_dtype_element_size, (int32_t dtype))
X(OgShimCode, aoti_torch_delete_tensor_object, (AtenTensorHandle tensor))
X(OgShimCode, aoti_torch_get_data_ptr, (AtenTensorHandle tensor, void **ret))
X(OgShimCode, aoti_torch_get_storage_size, (AtenTensorHandle tensor, int64_t *ret))
X(OgShimCode, aoti_torch_get_storage_offset, (AtenTensorHandle tensor, int64_t *ret))
X(OgShimCode, aoti_torch_get_dim, (AtenTensorHandle tensor, int64_t *ret))
X(OgShimCode, aoti_torch_get_numel, (AtenTensorHandle tensor, int64_t *ret))
X(OgShimCode, aoti_torch_get_sizes, (AtenTensorHandle tensor, int64_t **ret))
X(OgShimCode, aoti_torch_get_strides, (AtenTensorHandle tensor, int64_t **ret))
X(OgShimCode, aoti_torch_get_dtype, (AtenTensorHandle tensor, int32_t *ret))
X(OgShimCode, aoti_torch_get_device_type, (AtenTensorHandle tensor, int32_t *ret))
X(OgShimCode, aoti_torch_get_device_index, (AtenTensorHandle tensor, int32_t *ret))
X(OgShimCode, aoti_torch_empty_strided, (int64_t ndim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle *ret))
X(OgShimCode, aoti_torch_copy_, (AtenTensorHandle self, AtenTensorHandle src, int32_t non_blocking))
X(OgShimCode, aoti_torch_library_init_def, (const char *ns, const char *file, uint32_t line, TorchLibraryHandle *ret))
X(OgShimCode, aoti_torch_library_init_impl, (const char *ns, const char *key, const char *file, uint32_t line, TorchLibraryHandle *ret))
X(OgShimCode, aoti_torch_library_def, (TorchLibraryHandle self, const char *schema))
X(void, aoti_torch_check, (bool cond, const char *func, const char *file, uint32_t line, const char *msg))
X(OgShimCode, torch_library_impl, (TorchLibraryHandle self, const char *name, void (*fn)(StableIValue *, uint64_t, uint64_t), uint64_t build_version))
X(OgShimCode, torch_get_const_data_ptr, (AtenTensorHandle tensor, const void **ret))
X(OgShimCode, torch_get_mutable_data_ptr, (AtenTensorHandle tensor, void **ret))
X(OgShimCode, torch_parallel_for, (int64_t begin, int64_t end, int64_t grain_size, void (*func)(int64_t, int64_t, void *), void *ctx))
X(OgShimCode, torch_new_list_reserve_size, (size_t size, StableListHandle *ret))
X(OgShimCode, torch_list_size, (StableListHandle list, size_t *ret))
X(OgShimCode, torch_list_get_item, (StableListHandle list, size_t index, StableIValue *ret))
X(OgShimCode, torch_list_push_back, (StableListHandle list, StableIValue element))
X(OgShimCode, torch_delete_list, (StableListHandle list))
/* clang-format on */
