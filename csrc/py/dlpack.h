/* Tensors of new host memory, through torch's DLPack exchange.
 *
 * The layout below is DLPack's (version 1), which torch hands out as the
 * capsule `torch.Tensor.__dlpack_c_exchange_api__`; only what is used here
 * has a name. */
#ifndef OPGUARD_PY_DLPACK_H
#define OPGUARD_PY_DLPACK_H

#include "py/python.h"

#define OG_DLPACK_MAJOR 1

enum { OG_DLPACK_INT = 0, OG_DLPACK_FLOAT = 2, OG_DLPACK_BOOL = 6 };

typedef struct og_dlpack_managed {
    struct {
        uint32_t major;
        uint32_t minor;
    } version;
    void *context;
    void (*deleter)(struct og_dlpack_managed *self);
    uint64_t flags;
    struct {
        void *data;
        int32_t device_type; /* 1: host memory */
        int32_t device_index;
        int32_t ndim;
        uint8_t code;
        uint8_t bits;
        uint16_t lanes;
        int64_t *shape;
        int64_t *strides;
        uint64_t byte_offset;
    } tensor;
} og_dlpack_managed;

typedef struct og_dlpack_api {
    uint32_t major;
    uint32_t minor;
    void *older;
    void *allocate;
    void *from_object;
    /* Steals the tensor; -1 with an exception set on failure. */
    int (*to_object)(og_dlpack_managed *tensor, void **object);
    void *view_object;
    void *current_stream;
} og_dlpack_api;

/* The table in a capsule, borrowed from it; NULL without an exception where
 * it is no capsule of that name or another major version's. */
const og_dlpack_api *
og_dlpack_find(PyObject *capsule);

/* A tensor (rows,) for columns < 0, else (rows, columns), of `bits` wide
 * elements of a kind (code), with memory that is not initialised unless zero
 * is asked for. New reference, NULL with an exception. */
PyObject *
og_dlpack_new(const og_dlpack_api *api, int64_t rows, int64_t columns,
              int code, int bits, bool zero);

#endif
