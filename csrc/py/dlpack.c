/* og_dlpack_new: half of what torch.empty costs. The memory is ours, freed by
 * whoever drops the last tensor of it, with the GIL or without. */
#include "py/dlpack.h"

#include <stdlib.h>
#include <string.h>

#define ALIGNMENT 64

/* One block: this header, then the elements. */
typedef struct block {
    og_dlpack_managed managed;
    int64_t shape[2];
    int64_t strides[2];
    bool *freed; /* told when it is freed before to_object has returned */
} block;

#define HEADER ((sizeof(block) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)

const og_dlpack_api *
og_dlpack_find(PyObject *capsule)
{
    const char *name = "dlpack_exchange_api";
    const og_dlpack_api *api = NULL;
    if (PyCapsule_IsValid(capsule, name)) {
        api = PyCapsule_GetPointer(capsule, name);
    }
    return api != NULL && api->major == OG_DLPACK_MAJOR ? api : NULL;
}

static void
block_free(og_dlpack_managed *self)
{
    block *one = self->context;
    if (one->freed != NULL) {
        *one->freed = true;
    }
    free(one);
}

/* Bytes of the block, a multiple of ALIGNMENT; 0 when no size_t holds it. */
static size_t
block_size(int64_t rows, int64_t columns, int bits)
{
    int64_t bytes = 0;
    if (rows < 0 || __builtin_mul_overflow(rows, columns, &bytes) ||
        __builtin_mul_overflow(bytes, (int64_t)bits / 8, &bytes) ||
        bytes > PTRDIFF_MAX - (int64_t)HEADER - ALIGNMENT) {
        return 0;
    }
    size_t size = (size_t)bytes + HEADER + ALIGNMENT - 1;
    return size / ALIGNMENT * ALIGNMENT;
}

PyObject *
og_dlpack_new(const og_dlpack_api *api, int64_t rows, int64_t columns,
              int code, int bits, bool zero)
{
    int64_t wide = columns < 0 ? 1 : columns;
    size_t size = block_size(rows, wide, bits);
    block *one = size == 0 ? NULL : aligned_alloc(ALIGNMENT, size);
    void *object = NULL;
    bool freed = false;
    if (one == NULL) {
        return PyErr_NoMemory();
    }
    memset(one, 0, zero ? size : HEADER);
    one->managed.version.major = OG_DLPACK_MAJOR;
    one->managed.context = one;
    one->managed.deleter = block_free;
    one->managed.tensor.data = (char *)one + HEADER;
    one->managed.tensor.device_type = 1;
    one->managed.tensor.ndim = columns < 0 ? 1 : 2;
    one->managed.tensor.code = (uint8_t)code;
    one->managed.tensor.bits = (uint8_t)bits;
    one->managed.tensor.lanes = 1;
    one->managed.tensor.shape = one->shape;
    one->managed.tensor.strides = one->strides;
    one->shape[0] = rows;
    one->shape[1] = wide;
    one->strides[0] = wide;
    one->strides[1] = 1;
    one->freed = &freed;
    if (api->to_object(&one->managed, &object) != 0) {
        if (!freed) {
            free(one);
        }
        return NULL;
    }
    one->freed = NULL;
    return object;
}
