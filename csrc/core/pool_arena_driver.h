/* The part of the CUDA driver that arenas use, found at run time.
 *
 * libcuda.so.1 is opened at the first use, so a machine without a GPU needs
 * nothing of it, and a C compiler alone builds this: types and functions are
 * declared here, as the driver's ABI has them since CUDA 10.2. Work is done
 * in the device's primary context, which torch's runtime uses too; it is
 * pushed and popped around each call, so that a thread's own is left alone.
 *
 * A device is made and closed by one thread; between that, any thread may
 * use it. In a forked child every call fails and closing does nothing. */
#ifndef OPGUARD_CORE_POOL_ARENA_DRIVER_H
#define OPGUARD_CORE_POOL_ARENA_DRIVER_H

#include "core/base.h"

typedef unsigned long long og_cu_address;
typedef unsigned long long og_cu_handle;
typedef void *og_cu_context;
typedef void *og_cu_stream;
typedef void *og_cu_event;

enum {
    OG_CU_OUT_OF_MEMORY = 2,
    OG_CU_DEINITIALIZED = 4,
    OG_CU_NOT_READY = 600,
    OG_CU_NOT_SUPPORTED = 801,
    OG_CU_PINNED = 1,            /* CU_MEM_ALLOCATION_TYPE_PINNED */
    OG_CU_ON_DEVICE = 1,         /* CU_MEM_LOCATION_TYPE_DEVICE */
    OG_CU_READ_WRITE = 3,        /* CU_MEM_ACCESS_FLAGS_PROT_READWRITE */
    OG_CU_HAS_MEMORY_MAPS = 102, /* ..._VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */
    OG_CU_NON_BLOCKING = 1,      /* CU_STREAM_NON_BLOCKING */
    OG_CU_SLEEP_NO_TIMING = 3,   /* CU_EVENT_BLOCKING_SYNC, DISABLE_TIMING */
    OG_CU_PORTABLE = 1,          /* CU_MEMHOSTREGISTER_PORTABLE */
    OG_CU_RELAXED = 2,           /* CU_STREAM_CAPTURE_MODE_RELAXED */
};

typedef struct og_cu_location {
    int type;
    int id;
} og_cu_location;

/* CUmemAllocationProp */
typedef struct og_cu_property {
    int type;
    int handle_types;
    og_cu_location location;
    void *metadata;
    struct {
        unsigned char compression;
        unsigned char rdma;
        unsigned short usage;
        unsigned char reserved[4];
    } flags;
} og_cu_property;

/* CUmemAccessDesc */
typedef struct og_cu_access {
    og_cu_location location;
    int flags;
} og_cu_access;

/* X(our name, the library's name, parameters); each returns a CUresult. */
/* clang-format off */
#define OG_CU_FUNCTIONS(X)                                                    \
    X(init, cuInit, (unsigned flags))                                         \
    X(error_name, cuGetErrorName, (int code, const char **name))              \
    X(error_text, cuGetErrorString, (int code, const char **text))            \
    X(device_get, cuDeviceGet, (int *device, int ordinal))                    \
    X(attribute, cuDeviceGetAttribute, (int *value, int which, int device))   \
    X(retain, cuDevicePrimaryCtxRetain, (og_cu_context *to, int device))      \
    X(release, cuDevicePrimaryCtxRelease_v2, (int device))                    \
    X(push, cuCtxPushCurrent_v2, (og_cu_context context))                     \
    X(pop, cuCtxPopCurrent_v2, (og_cu_context *context))                      \
    X(synchronize, cuCtxSynchronize, (void))                                  \
    X(memory, cuMemGetInfo_v2, (size_t *available, size_t *total))            \
    X(granularity, cuMemGetAllocationGranularity,                             \
      (size_t *bytes, const og_cu_property *property, int option))            \
    X(reserve, cuMemAddressReserve,                                           \
      (og_cu_address *to, size_t size, size_t alignment,                      \
       og_cu_address wanted, unsigned long long flags))                       \
    X(unreserve, cuMemAddressFree, (og_cu_address address, size_t size))      \
    X(create, cuMemCreate,                                                    \
      (og_cu_handle *handle, size_t size, const og_cu_property *property,     \
       unsigned long long flags))                                             \
    X(discard, cuMemRelease, (og_cu_handle handle))                           \
    X(map, cuMemMap,                                                          \
      (og_cu_address address, size_t size, size_t offset,                     \
       og_cu_handle handle, unsigned long long flags))                        \
    X(unmap, cuMemUnmap, (og_cu_address address, size_t size))                \
    X(allow, cuMemSetAccess,                                                  \
      (og_cu_address address, size_t size, const og_cu_access *access,        \
       size_t count))                                                         \
    X(pin, cuMemHostRegister_v2, (void *host, size_t size, unsigned flags))   \
    X(unpin, cuMemHostUnregister, (void *host))                               \
    X(copy_in, cuMemcpyHtoDAsync_v2,                                          \
      (og_cu_address to, const void *host, size_t size, og_cu_stream stream)) \
    X(copy_out, cuMemcpyDtoHAsync_v2,                                         \
      (void *host, og_cu_address from, size_t size, og_cu_stream stream))     \
    X(stream_new, cuStreamCreate, (og_cu_stream *stream, unsigned flags))     \
    X(stream_free, cuStreamDestroy_v2, (og_cu_stream stream))                 \
    X(stream_finish, cuStreamSynchronize, (og_cu_stream stream))              \
    X(stream_captures, cuStreamIsCapturing,                                   \
      (og_cu_stream stream, int *status))                                     \
    X(capture_mode, cuThreadExchangeStreamCaptureMode, (int *mode))           \
    X(stream_wait, cuStreamWaitEvent,                                         \
      (og_cu_stream stream, og_cu_event event, unsigned flags))               \
    X(event_new, cuEventCreate, (og_cu_event *event, unsigned flags))         \
    X(event_free, cuEventDestroy_v2, (og_cu_event event))                     \
    X(event_record, cuEventRecord, (og_cu_event event, og_cu_stream stream))  \
    X(event_query, cuEventQuery, (og_cu_event event))                         \
    X(event_finish, cuEventSynchronize, (og_cu_event event))

/* It may be missing: it is of 12.5. */
#define OG_CU_NEWER(X)                                                        \
    X(record_all, cuCtxRecordEvent,                                           \
      (og_cu_context context, og_cu_event event))
/* clang-format on */

typedef struct og_cu_table {
#define OG_CU_FIELD(field, name, parameters) int(*field) parameters;
    OG_CU_FUNCTIONS(OG_CU_FIELD)
    OG_CU_NEWER(OG_CU_FIELD)
#undef OG_CU_FIELD
} og_cu_table;

typedef struct og_ring og_ring;

/* One GPU. Fields are read-only once it is open. */
typedef struct og_device {
    og_cu_table cu;
    void *library;
    og_cu_context context;
    og_cu_stream copies;   /* side stream of every copy of ours */
    og_cu_stream *watched; /* see og_device_watch */
    size_t watched_count;
    int ordinal;
    int handle;          /* CUdevice */
    long owner;          /* process that opened it */
    int64_t granularity; /* bytes of what is mapped; 0 where it cannot map */
    og_ring *ring;       /* see pool_arena_pinned.h */
} og_device;

/* What a thread had before it entered a device. */
typedef struct og_scope {
    const og_device *device;
    int mode;
} og_scope;

/* library: path of the driver, NULL for the system's. ring: bytes of pinned
 * memory that pageable memory is copied through, made at its first use.
 * OG_NOT_FOUND where there is no driver or no such device. */
og_status
og_device_open(const char *library, int ordinal, int64_t ring, og_device **out,
               og_error *err);

/* NULL is nothing. Whatever was made on the device is gone by then. */
void
og_device_close(og_device *device);

/* Streams that graphs may be captured on, copied; told once, before anybody
 * else uses the device. The driver has no way to ask whether any stream is
 * captured, so a capture on one that is not named here is not seen. */
og_status
og_device_watch(og_device *device, const og_cu_stream *streams, size_t count,
                og_error *err);

/* Whether a watched stream is captured now. */
og_status
og_device_capturing(const og_device *device, bool *captures, og_error *err);

/* The same inside of og_device_enter and og_device_leave. */
bool
og_device_captures(const og_device *device);

/* OG_CUDA_FAILED in a child that was forked from the device's process. */
og_status
og_device_check_process(const og_device *device, og_error *err);

/* Makes the device this thread's until og_device_leave, on every road. */
og_status
og_device_enter(const og_device *device, og_scope *scope, og_error *err);

void
og_device_leave(og_scope *scope);

/* OG_OK for 0, else OG_NO_MEMORY or OG_CUDA_FAILED with what and why. */
og_status
og_device_outcome(const og_device *device, int code, const char *what,
                  og_error *err);

/* Bytes that are free now, whoever uses the rest, and all. */
og_status
og_device_memory(const og_device *device, int64_t *available, int64_t *total,
                 og_error *err);

/* --- events: a point in what was queued ---------------------------------- */

typedef enum og_mark {
    OG_MARK_COPIES, /* copies of ours, so far */
    OG_MARK_STREAM, /* one stream, so far */
    OG_MARK_ALL,    /* all streams of this process, so far */
} og_mark;

/* *event is NULL where all is done already: an old driver cannot record
 * OG_MARK_ALL, so it is waited for at once. stream may be NULL, the default
 * stream; it counts for OG_MARK_STREAM alone.
 *
 * Whoever asks a driver for all streams while a graph is captured on one of
 * them is refused by it and spoils the capture, whatever the mode of either
 * thread. So OG_MARK_ALL fails without asking while a watched stream is. */
og_status
og_event_record(const og_device *device, og_mark mark, og_cu_stream stream,
                og_cu_event *event, og_error *err);

/* Blocks this thread, without turning. */
og_status
og_event_finish(const og_device *device, og_cu_event event, og_error *err);

og_status
og_event_done(const og_device *device, og_cu_event event, bool *done,
              og_error *err);

/* Work that is queued on stream from now on waits; this thread does not. */
og_status
og_event_hold(const og_device *device, og_cu_event event, og_cu_stream stream,
              og_error *err);

/* event may be NULL; nothing to report. */
void
og_event_free(const og_device *device, og_cu_event event);

#endif
