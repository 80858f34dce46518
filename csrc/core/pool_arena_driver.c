/* Opening the driver, entering a device, events. Nothing here allocates
 * device memory. */
#include "core/pool_arena_driver.h"

#include "core/pool_arena_pinned.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* dlsym gives object pointers; ISO C has no cast from them to functions. */
static const char *
fill(og_cu_table *cu, void *library)
{
#define OG_CU_FIND(field, name, parameters)       \
    *(void **)&cu->field = dlsym(library, #name); \
    if (cu->field == NULL) {                      \
        return #name;                             \
    }
    OG_CU_FUNCTIONS(OG_CU_FIND)
#undef OG_CU_FIND
#define OG_CU_LOOK(field, name, parameters) \
    *(void **)&cu->field = dlsym(library, #name);
    OG_CU_NEWER(OG_CU_LOOK)
#undef OG_CU_LOOK
    return NULL;
}

/* The library is never closed: torch uses the same one. */
static og_status
load(og_device *device, const char *path, og_error *err)
{
    const char *name = path == NULL ? "libcuda.so.1" : path;
    device->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (device->library == NULL) {
        const char *why = dlerror();
        return og_fail(err, OG_NOT_FOUND, "expected the CUDA driver: %.180s",
                       why == NULL ? name : why);
    }
    const char *missing = fill(&device->cu, device->library);
    if (missing != NULL) {
        return og_fail(err, OG_NOT_FOUND,
                       "expected a CUDA driver of 10.2 or later, %.100s has "
                       "no %s",
                       name, missing);
    }
    return OG_OK;
}

og_status
og_device_outcome(const og_device *device, int code, const char *what,
                  og_error *err)
{
    if (OG_LIKELY(code == 0)) {
        return OG_OK;
    }
    const char *name = NULL, *text = NULL;
    (void)device->cu.error_name(code, &name);
    (void)device->cu.error_text(code, &text);
    return og_fail(err,
                   code == OG_CU_OUT_OF_MEMORY ? OG_NO_MEMORY : OG_CUDA_FAILED,
                   "%s on GPU %d: %s (%d), %.100s", what, device->ordinal,
                   name == NULL ? "unknown error" : name, code,
                   text == NULL ? "which this driver has no words for" : text);
}

/* Bytes that physical memory is made in, 0 where the GPU cannot map. */
static og_status
find_granularity(og_device *device, og_error *err)
{
    int able = 0;
    og_status status = og_device_outcome(
        device,
        device->cu.attribute(&able, OG_CU_HAS_MEMORY_MAPS, device->handle),
        "asking for memory maps", err);
    if (status != OG_OK || !able) {
        return status;
    }
    og_cu_property property = {
        .type = OG_CU_PINNED,
        .location = {OG_CU_ON_DEVICE, device->ordinal},
    };
    size_t bytes = 0;
    status =
        og_device_outcome(device, device->cu.granularity(&bytes, &property, 0),
                          "asking for the granularity of memory", err);
    device->granularity = (int64_t)bytes;
    return status;
}

static og_status
start(og_device *device, og_error *err)
{
    const og_cu_table *cu = &device->cu;
    int code = cu->init(0);
    if (code == 0) {
        code = cu->device_get(&device->handle, device->ordinal);
    }
    if (code != 0) {
        (void)og_device_outcome(device, code, "looking for a device", err);
        return err == NULL ? OG_NOT_FOUND : (err->status = OG_NOT_FOUND);
    }
    og_cu_context context = NULL;
    og_status status =
        og_device_outcome(device, cu->retain(&context, device->handle),
                          "taking the primary context", err);
    if (status != OG_OK) {
        return status;
    }
    device->context = context;
    og_scope scope;
    status = og_device_enter(device, &scope, err);
    if (status != OG_OK) {
        return status;
    }
    status = find_granularity(device, err);
    if (status == OG_OK) {
        status = og_device_outcome(
            device, cu->stream_new(&device->copies, OG_CU_NON_BLOCKING),
            "making a stream", err);
    }
    og_device_leave(&scope);
    return status;
}

og_status
og_device_open(const char *library, int ordinal, int64_t ring, og_device **out,
               og_error *err)
{
    og_device *device = calloc(1, sizeof *device);
    if (device == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for a device");
    }
    device->ordinal = ordinal;
    device->owner = (long)getpid();
    og_status status = load(device, library, err);
    if (status == OG_OK) {
        status = og_ring_new(ring, &device->ring, err);
    }
    if (status == OG_OK) {
        status = start(device, err);
    }
    if (status == OG_OK) {
        *out = device;
    }
    else {
        og_device_close(device);
    }
    return status;
}

void
og_device_close(og_device *device)
{
    if (device == NULL) {
        return;
    }
    og_scope scope;
    bool inside = device->context != NULL &&
                  og_device_enter(device, &scope, NULL) == OG_OK;
    og_ring_free(device, inside);
    if (inside) {
        if (device->copies != NULL) {
            (void)device->cu.stream_free(device->copies);
        }
        og_device_leave(&scope);
        (void)device->cu.release(device->handle);
    }
    free(device->watched);
    free(device);
}

og_status
og_device_check_process(const og_device *device, og_error *err)
{
    return (long)getpid() == device->owner
               ? OG_OK
               : og_fail(err, OG_CUDA_FAILED,
                         "expected the process that opened GPU %d, this is a "
                         "child forked from it: CUDA does not survive a "
                         "fork; start workers by spawn",
                         device->ordinal);
}

og_status
og_device_enter(const og_device *device, og_scope *scope, og_error *err)
{
    og_status status = og_device_check_process(device, err);
    if (status == OG_OK) {
        status = og_device_outcome(device, device->cu.push(device->context),
                                   "entering the primary context", err);
    }
    if (status != OG_OK) {
        return status;
    }
    scope->device = device;
    scope->mode = OG_CU_RELAXED;
    /* What is unsafe to call beside a capture is told apart by this mode: a
     * graph that another thread captures is not spoilt by what we do. */
    if (device->cu.capture_mode(&scope->mode) != 0) {
        scope->mode = -1;
    }
    return OG_OK;
}

void
og_device_leave(og_scope *scope)
{
    const og_cu_table *cu = &scope->device->cu;
    og_cu_context context;
    if (scope->mode >= 0) {
        (void)cu->capture_mode(&scope->mode);
    }
    (void)cu->pop(&context);
}

og_status
og_device_memory(const og_device *device, int64_t *available, int64_t *total,
                 og_error *err)
{
    size_t left = 0, all = 0;
    og_scope scope;
    og_status status = og_device_enter(device, &scope, err);
    if (status != OG_OK) {
        return status;
    }
    status = og_device_outcome(device, device->cu.memory(&left, &all),
                               "asking for free memory", err);
    og_device_leave(&scope);
    if (status == OG_OK) {
        *available = (int64_t)left;
        *total = (int64_t)all;
    }
    return status;
}

/* --- captures ------------------------------------------------------------ */

og_status
og_device_watch(og_device *device, const og_cu_stream *streams, size_t count,
                og_error *err)
{
    og_cu_stream *copy = malloc((count + 1) * sizeof *copy);
    if (copy == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for names of streams");
    }
    memcpy(copy, streams, count * sizeof *copy);
    device->watched = copy;
    device->watched_count = count;
    return OG_OK;
}

bool
og_device_captures(const og_device *device)
{
    bool found = false;
    for (size_t i = 0; i < device->watched_count && !found; i++) {
        int status = 0;
        found = device->cu.stream_captures(device->watched[i], &status) == 0 &&
                status != 0;
    }
    return found;
}

og_status
og_device_capturing(const og_device *device, bool *captures, og_error *err)
{
    og_scope scope;
    og_status status = og_device_enter(device, &scope, err);
    if (status == OG_OK) {
        *captures = og_device_captures(device);
        og_device_leave(&scope);
    }
    return status;
}

/* --- events -------------------------------------------------------------- */

static og_status
record(const og_device *device, og_mark mark, og_cu_stream stream,
       og_cu_event *event, og_error *err)
{
    const og_cu_table *cu = &device->cu;
    if (mark == OG_MARK_ALL && og_device_captures(device)) {
        return og_fail(err, OG_CUDA_FAILED,
                       "expected no stream of GPU %d to be captured, a graph "
                       "is: waiting for all streams would spoil it",
                       device->ordinal);
    }
    if (mark == OG_MARK_ALL && cu->record_all == NULL) {
        return og_device_outcome(device, cu->synchronize(),
                                 "waiting for the device", err);
    }
    og_cu_event made = NULL;
    og_status status =
        og_device_outcome(device, cu->event_new(&made, OG_CU_SLEEP_NO_TIMING),
                          "making an event", err);
    if (status != OG_OK) {
        return status;
    }
    int code =
        mark == OG_MARK_ALL
            ? cu->record_all(device->context, made)
            : cu->event_record(
                  made, mark == OG_MARK_COPIES ? device->copies : stream);
    if (code == 0) {
        *event = made;
        return OG_OK;
    }
    (void)cu->event_free(made);
    if (mark == OG_MARK_ALL && code == OG_CU_NOT_SUPPORTED) {
        code = cu->synchronize();
    }
    return og_device_outcome(device, code, "recording an event", err);
}

og_status
og_event_record(const og_device *device, og_mark mark, og_cu_stream stream,
                og_cu_event *event, og_error *err)
{
    og_scope scope;
    og_cu_event made = NULL;
    og_status status = og_device_enter(device, &scope, err);
    if (status != OG_OK) {
        return status;
    }
    status = record(device, mark, stream, &made, err);
    og_device_leave(&scope);
    if (status == OG_OK) {
        *event = made;
    }
    return status;
}

og_status
og_event_finish(const og_device *device, og_cu_event event, og_error *err)
{
    og_scope scope;
    og_status status =
        event == NULL ? OG_OK : og_device_enter(device, &scope, err);
    if (event == NULL || status != OG_OK) {
        return status;
    }
    status = og_device_outcome(device, device->cu.event_finish(event),
                               "waiting for what was queued", err);
    og_device_leave(&scope);
    return status;
}

og_status
og_event_done(const og_device *device, og_cu_event event, bool *done,
              og_error *err)
{
    og_scope scope;
    if (event == NULL) {
        *done = true;
        return OG_OK;
    }
    og_status status = og_device_enter(device, &scope, err);
    if (status != OG_OK) {
        return status;
    }
    int code = device->cu.event_query(event);
    if (code != OG_CU_NOT_READY) {
        status = og_device_outcome(device, code, "asking an event", err);
    }
    og_device_leave(&scope);
    if (status == OG_OK) {
        *done = code == 0;
    }
    return status;
}

og_status
og_event_hold(const og_device *device, og_cu_event event, og_cu_stream stream,
              og_error *err)
{
    og_scope scope;
    og_status status =
        event == NULL ? OG_OK : og_device_enter(device, &scope, err);
    if (event == NULL || status != OG_OK) {
        return status;
    }
    status =
        og_device_outcome(device, device->cu.stream_wait(stream, event, 0),
                          "making a stream wait", err);
    og_device_leave(&scope);
    return status;
}

void
og_event_free(const og_device *device, og_cu_event event)
{
    og_scope scope;
    if (event != NULL && og_device_enter(device, &scope, NULL) == OG_OK) {
        (void)device->cu.event_free(event);
        og_device_leave(&scope);
    }
}
