/* opguard::pack and opguard::unpack: many tensors as one buffer and back, so
 * that a device's results reach the host in one copy and one wait.
 *
 * A boxed kernel owns the handles on its stack. Nothing here throws: kernels
 * note the first failure, release everything, and raise at the very end. */
#include "torch/ops.h"

#include <stdlib.h>
#include <string.h>

#include "core/layout.h"
#include "cuda/opguard_cuda.h"

/* One leaf: the block of bytes its elements fill. */
typedef struct leaf {
    AtenTensorHandle tensor; /* owned */
    const void *data;        /* const: reading must not end a copy-on-write */
    int64_t bytes;
    int64_t offset; /* in the packed buffer */
    int64_t ndim;
    const int64_t *sizes;   /* borrowed from tensor */
    const int64_t *strides; /* likewise */
    int32_t dtype;
    int32_t device_type;
    int32_t device_index;
} leaf;

typedef struct leaves {
    leaf *items;
    size_t count;
    int64_t total; /* bytes of the packed buffer */
} leaves;

static void
leaves_free(leaves *all)
{
    for (size_t i = 0; i < all->count; i++) {
        if (all->items[i].tensor != NULL) {
            (void)aoti_torch_delete_tensor_object(all->items[i].tensor);
        }
    }
    free(all->items);
}

static og_status
leaf_describe(leaf *one, size_t index, og_error *err)
{
    int64_t numel = 0, *sizes = NULL, *strides = NULL;
    AtenTensorHandle t = one->tensor;
    if (aoti_torch_get_dim(t, &one->ndim) != 0 ||
        aoti_torch_get_numel(t, &numel) != 0 ||
        aoti_torch_get_sizes(t, &sizes) != 0 ||
        aoti_torch_get_strides(t, &strides) != 0 ||
        aoti_torch_get_dtype(t, &one->dtype) != 0 ||
        aoti_torch_get_device_type(t, &one->device_type) != 0 ||
        aoti_torch_get_device_index(t, &one->device_index) != 0 ||
        torch_get_const_data_ptr(t, &one->data) != 0) {
        return og_fail(err, OG_TORCH_FAILED,
                       "expected a strided tensor at leaves[%zu]; bring "
                       "sparse and other layouts to the host one by one",
                       index);
    }
    one->sizes = sizes;
    one->strides = strides;
    if (!og_is_block(one->ndim, sizes, strides, numel)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected the elements of leaves[%zu] to fill one "
                       "block of memory, they have gaps; pass "
                       "leaf.contiguous()",
                       index);
    }
    one->bytes = numel * (int64_t)aoti_torch_dtype_element_size(one->dtype);
    return OG_OK;
}

/* Deletes a list together with the tensors in it. */
static void
list_delete(StableListHandle list)
{
    size_t count = 0;
    (void)torch_list_size(list, &count);
    for (size_t i = 0; i < count; i++) {
        StableIValue element = 0;
        if (torch_list_get_item(list, i, &element) == 0) {
            (void)aoti_torch_delete_tensor_object(
                (AtenTensorHandle)(uintptr_t)element);
        }
    }
    (void)torch_delete_list(list);
}

/* Takes the list and the references in it; all is to be freed either way. */
static og_status
leaves_take(StableIValue value, leaves *all, og_error *err)
{
    StableListHandle list = (StableListHandle)(uintptr_t)value;
    size_t count = 0;
    og_status status =
        og_shim_check(torch_list_size(list, &count), "leaves", err);
    all->items = calloc(count + 1, sizeof *all->items);
    if (status == OG_OK && all->items == NULL) {
        list_delete(list);
        return og_fail(err, OG_NO_MEMORY, "no memory for %zu leaves", count);
    }
    for (size_t i = 0; status == OG_OK && i < count; i++) {
        StableIValue element = 0;
        status = og_shim_check(torch_list_get_item(list, i, &element),
                               "leaves", err);
        if (status == OG_OK) {
            all->items[i].tensor = (AtenTensorHandle)(uintptr_t)element;
            all->count = i + 1;
        }
    }
    (void)torch_delete_list(list);
    for (size_t i = 0; status == OG_OK && i < count; i++) {
        leaf *one = &all->items[i];
        status = leaf_describe(one, i, err);
        one->offset = all->total;
        int64_t stride = status == OG_OK ? og_pack_stride(one->bytes) : 0;
        if (stride < 0 ||
            __builtin_add_overflow(all->total, stride, &all->total)) {
            status = og_fail(err, OG_BAD_ARGUMENT,
                             "expected leaves of less than 2**63 bytes");
        }
    }
    return status;
}

/* All leaves on the first one's device: the buffer will be there. */
static og_status
leaves_agree(const leaves *all, og_error *err)
{
    for (size_t i = 1; i < all->count; i++) {
        if (all->items[i].device_type != all->items[0].device_type ||
            all->items[i].device_index != all->items[0].device_index) {
            return og_fail(err, OG_BAD_ARGUMENT,
                           "expected all leaves on one device, leaves[%zu] "
                           "is on another than leaves[0]; pack each device's "
                           "leaves on their own",
                           i);
        }
    }
    return OG_OK;
}

static og_status
new_bytes(const leaves *all, AtenTensorHandle *packed, void **data,
          og_error *err)
{
    const int64_t size[1] = {all->total}, stride[1] = {1};
    int32_t type = aoti_torch_device_type_cpu(), index = 0;
    if (all->count > 0) {
        type = all->items[0].device_type;
        index = all->items[0].device_index;
    }
    og_status status = og_shim_check(
        aoti_torch_empty_strided(1, size, stride, aoti_torch_dtype_uint8(),
                                 type, index, packed),
        "allocating the packed buffer", err);
    if (status == OG_OK) {
        status = og_shim_check(aoti_torch_get_data_ptr(*packed, data),
                               "packed buffer", err);
    }
    return status;
}

static og_status
copy_cpu(const leaves *all, char *data, og_error *err)
{
    (void)err;
    for (size_t i = 0; i < all->count; i++) {
        const leaf *one = &all->items[i];
        if (one->bytes > 0) {
            int64_t padding = og_pack_stride(one->bytes) - one->bytes;
            memcpy(data + one->offset, one->data, (size_t)one->bytes);
            memset(data + one->offset + one->bytes, 0, (size_t)padding);
        }
    }
    return OG_OK;
}

static og_status
copy_cuda(const leaves *all, char *data, og_error *err)
{
    const og_cuda_table *cuda;
    og_status status = og_cuda_functions(&cuda, err);
    if (status != OG_OK || all->count == 0) {
        return status;
    }
    og_cuda_place place = {NULL, all->items[0].device_index};
    status = og_shim_cuda_stream(place.device, &place.stream, err);
    if (status != OG_OK) {
        return status;
    }
    og_cuda_span *spans = calloc(all->count, sizeof *spans);
    if (spans == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for %zu spans",
                       all->count);
    }
    for (size_t i = 0; i < all->count; i++) {
        spans[i].source = all->items[i].data;
        spans[i].offset = all->items[i].offset;
        spans[i].bytes = all->items[i].bytes;
    }
    status = og_cuda_outcome(
        cuda, cuda->launch_pack(data, spans, all->count, &place),
        "packing the leaves", err);
    free(spans);
    return status;
}

/* Ends a kernel: raises torch's error when status is one. Everything must be
 * released before, because this leaves by a C++ exception. */
static void
finish(og_status status, const og_error *err, const char *op)
{
    if (status != OG_OK) {
        aoti_torch_check(false, op, __FILE__, __LINE__, err->message);
    }
}

static void
pack(StableIValue *stack,
     og_status (*copy)(const leaves *, char *, og_error *))
{
    og_error err = {OG_OK, ""};
    leaves all = {NULL, 0, 0};
    AtenTensorHandle packed = NULL;
    void *data = NULL;
    og_status status = leaves_take(stack[0], &all, &err);
    if (status == OG_OK) {
        status = leaves_agree(&all, &err);
    }
    if (status == OG_OK) {
        status = new_bytes(&all, &packed, &data, &err);
    }
    if (status == OG_OK) {
        status = copy(&all, data, &err);
    }
    leaves_free(&all);
    if (status != OG_OK && packed != NULL) {
        (void)aoti_torch_delete_tensor_object(packed);
    }
    finish(status, &err, "opguard::pack");
    stack[0] = (StableIValue)(uintptr_t)packed;
}

void
og_op_pack_cpu(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    pack(stack, copy_cpu);
}

void
og_op_pack_cuda(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    pack(stack, copy_cuda);
}

/* The packed buffer must be what pack made of leaves like these. */
static og_status
check_packed(AtenTensorHandle packed, const leaves *all, const char **data,
             og_error *err)
{
    leaf bytes = {.tensor = packed};
    og_status status = leaf_describe(&bytes, 0, err);
    if (status != OG_OK) {
        return status;
    }
    if (bytes.dtype != aoti_torch_dtype_uint8() || bytes.ndim != 1 ||
        bytes.device_type != aoti_torch_device_type_cpu() ||
        bytes.bytes != all->total) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected packed to be a uint8 tensor of %lld bytes "
                       "in host memory, as opguard::pack makes of these "
                       "leaves",
                       (long long)all->total);
    }
    *data = bytes.data;
    return OG_OK;
}

static og_status
unpack_one(const leaf *one, const char *data, StableListHandle list,
           og_error *err)
{
    AtenTensorHandle fresh = NULL;
    void *target = NULL;
    og_status status =
        og_shim_check(aoti_torch_empty_strided(
                          one->ndim, one->sizes, one->strides, one->dtype,
                          aoti_torch_device_type_cpu(), 0, &fresh),
                      "allocating a leaf", err);
    if (status != OG_OK) {
        return status;
    }
    status =
        og_shim_check(aoti_torch_get_data_ptr(fresh, &target), "leaf", err);
    if (status == OG_OK && one->bytes > 0) {
        memcpy(target, data + one->offset, (size_t)one->bytes);
    }
    if (status == OG_OK) {
        status = og_shim_check(
            torch_list_push_back(list, (StableIValue)(uintptr_t)fresh),
            "leaves", err);
    }
    if (status != OG_OK) {
        (void)aoti_torch_delete_tensor_object(fresh);
    }
    return status;
}

void
og_op_unpack(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err = {OG_OK, ""};
    leaves all = {NULL, 0, 0};
    const char *data = NULL;
    StableListHandle list = NULL;
    AtenTensorHandle packed = (AtenTensorHandle)(uintptr_t)stack[0];
    og_status status = leaves_take(stack[1], &all, &err);
    if (status == OG_OK) {
        status = check_packed(packed, &all, &data, &err);
    }
    if (status == OG_OK) {
        status = og_shim_check(torch_new_list_reserve_size(all.count, &list),
                               "leaves", &err);
    }
    for (size_t i = 0; status == OG_OK && i < all.count; i++) {
        status = unpack_one(&all.items[i], data, list, &err);
    }
    leaves_free(&all);
    (void)aoti_torch_delete_tensor_object(packed);
    if (status != OG_OK && list != NULL) {
        list_delete(list);
    }
    finish(status, &err, "opguard::unpack");
    stack[0] = (StableIValue)(uintptr_t)list;
}
