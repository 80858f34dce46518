/* libcuda.so.1 on a machine without a GPU: what csrc/core/pool_*.c calls of
 * it, over host memory. Built by the tests as a shared library.
 *
 * "Device" addresses are host addresses that can be read only while memory is
 * mapped behind them: what comes too late or too early dies of SIGSEGV.
 * Streams are threads with a queue each, so that copies and "kernels" really
 * are under way when a call returns. What a driver would refuse is refused,
 * and counted in emu_misuse. The functions emu_* are the tests' controls. */
#define _GNU_SOURCE
#include "core/pool_arena_driver.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum {
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    NOT_PINNED = 713,
    NOT_SUPPORTED = 801,
};

#define MOST 4096
#define NAMES 64

typedef struct memory {
    int fd;
    size_t size;
    int uses; /* its handle and its mappings */
} memory;

typedef struct range {
    uintptr_t start;
    size_t size;
    memory *memory; /* of a mapping */
    bool allowed;
} range;

typedef struct event {
    long recorded, reached;
} event;

typedef enum kind { COPY, RECORD, WAIT, READ, ADD } kind;

typedef struct op {
    kind kind;
    void *to;
    const void *from;
    size_t size;
    event *event;
    long number;
    useconds_t pause;
    struct op *next;
} op;

typedef struct stream {
    op *first, *last;
    bool stop, idle;
    pthread_t thread;
} stream;

typedef struct counter {
    char name[48];
    long calls;
} counter;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static range reserved[MOST], mapped[MOST], pinned[MOST];
static stream *streams[MOST];
static stream *default_stream;
static counter counters[NAMES];
static size_t capacity = (size_t)64 << 20, used, unit = 1 << 16;
static long misuse, events, retained, handles, sum, bytes_in, bytes_out;
static int devices = 1, able = 1, newer = 1;
static useconds_t copy_pause;
static char fail_name[48];
static long fail_after;
static int fail_code;
static bool initialised;
static _Thread_local int depth;
static _Thread_local int capture_mode;

/* --- controls ------------------------------------------------------------ */

#define CONTROL __attribute__((visibility("default")))

CONTROL void
emu_configure(long long bytes, long long granularity, int maps,
              int record_all);
CONTROL void
emu_fail(const char *name, long nth, int code);
CONTROL void
emu_pause(long microseconds);
CONTROL long
emu_calls(const char *name);
CONTROL long
emu_count(const char *what);
CONTROL void
emu_read(void *on, const void *from, size_t size, long pause);
CONTROL void
emu_add(void *on, void *to, size_t size, long pause);
CONTROL void *
emu_stream(void);
CONTROL void
emu_finish(void);

void
emu_configure(long long bytes, long long granularity, int maps, int record_all)
{
    pthread_mutex_lock(&lock);
    capacity = (size_t)bytes;
    unit = (size_t)granularity;
    able = maps;
    newer = record_all;
    misuse = sum = bytes_in = bytes_out = 0;
    copy_pause = 0;
    fail_name[0] = '\0';
    memset(counters, 0, sizeof counters);
    pthread_mutex_unlock(&lock);
}

/* The nth call from now (1 is the next) of a function, "*" for any, returns
 * code and does nothing. */
void
emu_fail(const char *name, long nth, int code)
{
    pthread_mutex_lock(&lock);
    strncpy(fail_name, name, sizeof fail_name - 1);
    fail_after = nth;
    fail_code = code;
    pthread_mutex_unlock(&lock);
}

void
emu_pause(long microseconds)
{
    pthread_mutex_lock(&lock);
    copy_pause = (useconds_t)microseconds;
    pthread_mutex_unlock(&lock);
}

static counter *
find_counter(const char *name)
{
    int i = 0;
    while (i < NAMES - 1 && counters[i].name[0] != '\0' &&
           strcmp(counters[i].name, name) != 0) {
        i++;
    }
    strncpy(counters[i].name, name, sizeof counters[i].name - 1);
    return &counters[i];
}

/* A worker that has the lock at the moment of a fork is not in the child. */
static void
before_fork(void)
{
    pthread_mutex_lock(&lock);
}

static void
after_fork(void)
{
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void
keep_forks_apart(void)
{
    pthread_atfork(before_fork, after_fork, after_fork);
}

long
emu_calls(const char *name)
{
    pthread_mutex_lock(&lock);
    long calls = find_counter(name)->calls;
    pthread_mutex_unlock(&lock);
    return calls;
}

static long
count_ranges(const range *ranges)
{
    long count = 0;
    for (int i = 0; i < MOST; i++) {
        count += ranges[i].start != 0;
    }
    return count;
}

long
emu_count(const char *what)
{
    pthread_mutex_lock(&lock);
    long found = -1;
    if (strcmp(what, "used") == 0) {
        found = (long)used;
    }
    else if (strcmp(what, "reserved") == 0) {
        found = count_ranges(reserved);
    }
    else if (strcmp(what, "mapped") == 0) {
        found = count_ranges(mapped);
    }
    else if (strcmp(what, "pinned") == 0) {
        found = count_ranges(pinned);
    }
    else if (strcmp(what, "events") == 0) {
        found = events;
    }
    else if (strcmp(what, "handles") == 0) {
        found = handles;
    }
    else if (strcmp(what, "contexts") == 0) {
        found = retained;
    }
    else if (strcmp(what, "misuse") == 0) {
        found = misuse;
    }
    else if (strcmp(what, "bytes_in") == 0) {
        found = bytes_in;
    }
    else if (strcmp(what, "bytes_out") == 0) {
        found = bytes_out;
    }
    else if (strcmp(what, "sum") == 0) {
        found = sum;
    }
    else if (strcmp(what, "depth") == 0) {
        found = depth;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* --- streams ------------------------------------------------------------- */

static void
run(op *one)
{
    if (one->pause > 0) {
        usleep(one->pause);
    }
    long found = 0;
    switch (one->kind) {
        case COPY:
            memcpy(one->to, one->from, one->size);
            break;
        case READ:
            for (size_t i = 0; i < one->size; i++) {
                found += ((const volatile unsigned char *)one->from)[i];
            }
            break;
        case ADD:
            for (size_t i = 0; i < one->size; i++) {
                ((volatile unsigned char *)one->to)[i]++;
            }
            break;
        default:
            break;
    }
    pthread_mutex_lock(&lock);
    sum += found;
    if (one->kind == WAIT) {
        while (one->event->reached < one->number) {
            pthread_cond_wait(&changed, &lock);
        }
    }
    if (one->kind == RECORD && one->event->reached < one->number) {
        one->event->reached = one->number;
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void *
work(void *argument)
{
    stream *self = argument;
    for (;;) {
        pthread_mutex_lock(&lock);
        self->idle = self->first == NULL;
        pthread_cond_broadcast(&changed);
        while (self->first == NULL && !self->stop) {
            pthread_cond_wait(&changed, &lock);
        }
        op *one = self->first;
        if (one == NULL) {
            pthread_mutex_unlock(&lock);
            return NULL;
        }
        self->idle = false;
        self->first = one->next;
        pthread_mutex_unlock(&lock);
        run(one);
        free(one);
    }
}

/* Under the lock, as everything below that is called by a driver function. */
static stream *
new_stream(void)
{
    stream *made = calloc(1, sizeof *made);
    made->idle = true;
    int i = 0;
    while (streams[i] != NULL) {
        i++;
    }
    streams[i] = made;
    pthread_create(&made->thread, NULL, work, made);
    return made;
}

static stream *
stream_of(void *given)
{
    if (given != NULL) {
        return given;
    }
    if (default_stream == NULL) {
        default_stream = new_stream();
    }
    return default_stream;
}

static void
queue(void *on, op wanted)
{
    stream *target = stream_of(on);
    op *one = malloc(sizeof *one);
    *one = wanted;
    one->next = NULL;
    if (target->first == NULL) {
        target->first = one;
    }
    else {
        target->last->next = one;
    }
    target->last = one;
    target->idle = false;
    pthread_cond_broadcast(&changed);
}

static void
finish(stream *one)
{
    while (one->first != NULL || !one->idle) {
        pthread_cond_wait(&changed, &lock);
    }
}

static void
finish_all(void)
{
    for (int i = 0; i < MOST; i++) {
        if (streams[i] != NULL) {
            finish(streams[i]);
        }
    }
}

/* A kernel that reads a range and adds its bytes to "sum", after a pause. */
void
emu_read(void *on, const void *from, size_t size, long pause)
{
    pthread_mutex_lock(&lock);
    queue(on, (op){.kind = READ,
                   .from = from,
                   .size = size,
                   .pause = (useconds_t)pause});
    pthread_mutex_unlock(&lock);
}

/* A kernel that adds one to each byte. */
void
emu_add(void *on, void *to, size_t size, long pause)
{
    pthread_mutex_lock(&lock);
    queue(
        on,
        (op){.kind = ADD, .to = to, .size = size, .pause = (useconds_t)pause});
    pthread_mutex_unlock(&lock);
}

/* The compute stream of a test; it lives as long as the process. */
void *
emu_stream(void)
{
    pthread_mutex_lock(&lock);
    stream *made = new_stream();
    pthread_mutex_unlock(&lock);
    return made;
}

void
emu_finish(void)
{
    pthread_mutex_lock(&lock);
    finish_all();
    pthread_mutex_unlock(&lock);
}

/* --- what each driver function begins and ends with ---------------------- */

static int
begin(const char *name, bool needs_context)
{
    pthread_mutex_lock(&lock);
    find_counter(name)->calls++;
    if (fail_name[0] != '\0' &&
        (strcmp(fail_name, "*") == 0 || strcmp(fail_name, name) == 0) &&
        --fail_after == 0) {
        fail_name[0] = '\0';
        return fail_code;
    }
    if (!initialised && strcmp(name, "cuInit") != 0) {
        misuse++;
        return NOT_INITIALIZED;
    }
    if (needs_context && depth == 0) {
        misuse++;
        return INVALID_CONTEXT;
    }
    return 0;
}

static int
end(int code)
{
    pthread_mutex_unlock(&lock);
    return code;
}

static int
wrong(int code)
{
    misuse++;
    return code;
}

static range *
find(range *ranges, uintptr_t at, size_t size)
{
    for (int i = 0; i < MOST; i++) {
        if (ranges[i].start != 0 && at >= ranges[i].start &&
            at + size <= ranges[i].start + ranges[i].size) {
            return &ranges[i];
        }
    }
    return NULL;
}

static bool
overlaps(const range *ranges, uintptr_t at, size_t size)
{
    for (int i = 0; i < MOST; i++) {
        if (ranges[i].start != 0 && at < ranges[i].start + ranges[i].size &&
            ranges[i].start < at + size) {
            return true;
        }
    }
    return false;
}

static void
add(range *ranges, range one)
{
    int i = 0;
    while (ranges[i].start != 0) {
        i++;
    }
    ranges[i] = one;
}

#define DRIVER __attribute__((visibility("default"))) int
#define BEGIN(needs_context)                   \
    int code = begin(__func__, needs_context); \
    if (code != 0) {                           \
        return end(code);                      \
    }

/* The prototypes, from the very list that the core looks up. */
#define PROTOTYPE(field, name, parameters) DRIVER name parameters;
OG_CU_FUNCTIONS(PROTOTYPE)
OG_CU_NEWER(PROTOTYPE)

/* --- devices and contexts ------------------------------------------------ */

int
cuInit(unsigned flags)
{
    (void)flags;
    BEGIN(false)
    initialised = true;
    return end(0);
}

int
cuGetErrorName(int number, const char **name)
{
    *name = number == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_EMULATED";
    return 0;
}

int
cuGetErrorString(int number, const char **text)
{
    *text = number == 2 ? "out of memory" : "an error of the emulation";
    return 0;
}

int
cuDeviceGet(int *device, int ordinal)
{
    BEGIN(false)
    *device = ordinal;
    return end(ordinal < devices ? 0 : INVALID_DEVICE);
}

int
cuDeviceGetAttribute(int *value, int which, int device)
{
    (void)device;
    BEGIN(false)
    *value = which == OG_CU_HAS_MEMORY_MAPS ? able : 0;
    return end(0);
}

int
cuDevicePrimaryCtxRetain(og_cu_context *to, int device)
{
    BEGIN(false)
    (void)device;
    *to = &devices;
    retained++;
    return end(0);
}

int
cuDevicePrimaryCtxRelease_v2(int device)
{
    BEGIN(false)
    (void)device;
    return end(retained-- > 0 ? 0 : wrong(INVALID_CONTEXT));
}

int
cuCtxPushCurrent_v2(og_cu_context context)
{
    BEGIN(false)
    if (context != &devices) {
        return end(wrong(INVALID_CONTEXT));
    }
    depth++;
    return end(0);
}

int
cuCtxPopCurrent_v2(og_cu_context *context)
{
    BEGIN(true)
    *context = &devices;
    depth--;
    return end(0);
}

int
cuCtxSynchronize(void)
{
    BEGIN(true)
    finish_all();
    return end(0);
}

int
cuThreadExchangeStreamCaptureMode(int *mode)
{
    BEGIN(false)
    int before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return end(0);
}

int
cuMemGetInfo_v2(size_t *available, size_t *total)
{
    BEGIN(true)
    *available = capacity > used ? capacity - used : 0;
    *total = capacity;
    return end(0);
}

/* --- memory -------------------------------------------------------------- */

int
cuMemGetAllocationGranularity(size_t *bytes, const og_cu_property *property,
                              int option)
{
    BEGIN(false)
    (void)option;
    *bytes = unit;
    return end(property->type == 1 && property->location.type == 1
                   ? 0
                   : wrong(INVALID_VALUE));
}

int
cuMemAddressReserve(og_cu_address *to, size_t size, size_t alignment,
                    og_cu_address wanted, unsigned long long flags)
{
    BEGIN(true)
    if (size == 0 || size % unit != 0 || wanted != 0 || flags != 0) {
        return end(wrong(INVALID_VALUE));
    }
    char *address = mmap(NULL, size + alignment, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    uintptr_t at = ((uintptr_t)address + alignment - 1) / alignment;
    *to = at * alignment;
    add(reserved, (range){.start = at * alignment, .size = size});
    return end(0);
}

int
cuMemAddressFree(og_cu_address address, size_t size)
{
    BEGIN(true)
    range *found = find(reserved, address, size);
    if (found == NULL || found->size != size ||
        overlaps(mapped, address, size)) {
        return end(wrong(INVALID_VALUE));
    }
    munmap((void *)(uintptr_t)address, size);
    found->start = 0;
    return end(0);
}

static void
drop(memory *one)
{
    if (--one->uses == 0) {
        used -= one->size;
        close(one->fd);
        free(one);
    }
}

int
cuMemCreate(og_cu_handle *handle, size_t size, const og_cu_property *property,
            unsigned long long flags)
{
    BEGIN(true)
    if (size == 0 || size % unit != 0 || flags != 0 || property->type != 1) {
        return end(wrong(INVALID_VALUE));
    }
    if (used + size > capacity) {
        return end(OG_CU_OUT_OF_MEMORY);
    }
    memory *made = calloc(1, sizeof *made);
    made->fd = memfd_create("emulated", 0);
    made->size = size;
    made->uses = 1;
    if (ftruncate(made->fd, (off_t)size) != 0) {
        return end(OG_CU_OUT_OF_MEMORY);
    }
    used += size;
    handles++;
    *handle = (og_cu_handle)(uintptr_t)made;
    return end(0);
}

int
cuMemRelease(og_cu_handle handle)
{
    BEGIN(true)
    handles--;
    drop((memory *)(uintptr_t)handle);
    return end(0);
}

int
cuMemMap(og_cu_address address, size_t size, size_t offset,
         og_cu_handle handle, unsigned long long flags)
{
    BEGIN(true)
    memory *one = (memory *)(uintptr_t)handle;
    if (address % unit != 0 || size != one->size || offset != 0 ||
        flags != 0 || find(reserved, address, size) == NULL ||
        overlaps(mapped, address, size)) {
        return end(wrong(INVALID_VALUE));
    }
    mmap((void *)(uintptr_t)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED,
         one->fd, 0);
    one->uses++;
    add(mapped, (range){.start = address, .size = size, .memory = one});
    return end(0);
}

/* New memory holds rubbish, so that what is read too early shows. */
int
cuMemSetAccess(og_cu_address address, size_t size, const og_cu_access *access,
               size_t count)
{
    BEGIN(true)
    range *found = find(mapped, address, size);
    if (found == NULL || found->size != size || count != 1 ||
        access->flags != OG_CU_READ_WRITE) {
        return end(wrong(INVALID_VALUE));
    }
    mprotect((void *)(uintptr_t)address, size, PROT_READ | PROT_WRITE);
    memset((void *)(uintptr_t)address, 0xA5, size);
    found->allowed = true;
    return end(0);
}

int
cuMemUnmap(og_cu_address address, size_t size)
{
    BEGIN(true)
    range *found = find(mapped, address, size);
    if (found == NULL || found->start != address || found->size != size) {
        return end(wrong(INVALID_VALUE));
    }
    mmap((void *)(uintptr_t)address, size, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    found->start = 0;
    drop(found->memory);
    return end(0);
}

int
cuMemHostRegister_v2(void *host, size_t size, unsigned flags)
{
    BEGIN(true)
    if (size == 0 || flags != OG_CU_PORTABLE ||
        overlaps(pinned, (uintptr_t)host, size)) {
        return end(wrong(INVALID_VALUE));
    }
    add(pinned, (range){.start = (uintptr_t)host, .size = size});
    return end(0);
}

int
cuMemHostUnregister(void *host)
{
    BEGIN(true)
    range *found = find(pinned, (uintptr_t)host, 1);
    if (found == NULL || found->start != (uintptr_t)host) {
        return end(wrong(NOT_PINNED));
    }
    found->start = 0;
    return end(0);
}

static int
copy(og_cu_address device, const void *host, size_t size, void *on, bool in)
{
    range *there = find(mapped, device, size);
    if (there == NULL || !there->allowed ||
        find(pinned, (uintptr_t)host, size) == NULL) {
        return wrong(INVALID_VALUE);
    }
    void *memory = (void *)(uintptr_t)device;
    queue(on, (op){.kind = COPY,
                   .to = in ? memory : (void *)(uintptr_t)host,
                   .from = in ? host : memory,
                   .size = size,
                   .pause = copy_pause});
    *(in ? &bytes_in : &bytes_out) += (long)size;
    return 0;
}

int
cuMemcpyHtoDAsync_v2(og_cu_address to, const void *host, size_t size,
                     og_cu_stream on)
{
    BEGIN(true)
    return end(copy(to, host, size, on, true));
}

int
cuMemcpyDtoHAsync_v2(void *host, og_cu_address from, size_t size,
                     og_cu_stream on)
{
    BEGIN(true)
    return end(copy(from, host, size, on, false));
}

/* --- streams and events -------------------------------------------------- */

int
cuStreamCreate(og_cu_stream *to, unsigned flags)
{
    BEGIN(true)
    *to = new_stream();
    return end(flags == OG_CU_NON_BLOCKING ? 0 : wrong(INVALID_VALUE));
}

int
cuStreamDestroy_v2(og_cu_stream on)
{
    BEGIN(true)
    stream *one = on;
    one->stop = true;
    for (int i = 0; i < MOST; i++) {
        if (streams[i] == one) {
            streams[i] = NULL;
        }
    }
    pthread_cond_broadcast(&changed);
    pthread_t thread = one->thread;
    (void)end(0);
    pthread_join(thread, NULL);
    free(one);
    return 0;
}

int
cuStreamSynchronize(og_cu_stream on)
{
    BEGIN(true)
    finish(stream_of(on));
    return end(0);
}

int
cuStreamWaitEvent(og_cu_stream on, og_cu_event given, unsigned flags)
{
    BEGIN(true)
    event *one = given;
    (void)flags;
    queue(on, (op){.kind = WAIT, .event = one, .number = one->recorded});
    return end(0);
}

int
cuEventCreate(og_cu_event *to, unsigned flags)
{
    BEGIN(true)
    *to = calloc(1, sizeof(event));
    events++;
    return end(flags == OG_CU_SLEEP_NO_TIMING ? 0 : wrong(INVALID_VALUE));
}

/* Its memory stays: a stream may still have it in its queue. */
int
cuEventDestroy_v2(og_cu_event given)
{
    (void)given;
    BEGIN(true)
    events--;
    return end(0);
}

int
cuEventRecord(og_cu_event given, og_cu_stream on)
{
    BEGIN(true)
    event *one = given;
    queue(on, (op){.kind = RECORD, .event = one, .number = ++one->recorded});
    return end(0);
}

/* Reached once a stream of its own has waited for all the others. */
int
cuCtxRecordEvent(og_cu_context context, og_cu_event given)
{
    BEGIN(true)
    event *one = given;
    (void)context;
    if (!newer) {
        return end(NOT_SUPPORTED);
    }
    stream *own = new_stream();
    for (int i = 0; i < MOST; i++) {
        if (streams[i] != NULL && streams[i] != own) {
            event *mark = calloc(1, sizeof *mark);
            queue(streams[i],
                  (op){.kind = RECORD, .event = mark, .number = 1});
            mark->recorded = 1;
            queue(own, (op){.kind = WAIT, .event = mark, .number = 1});
        }
    }
    queue(own, (op){.kind = RECORD, .event = one, .number = ++one->recorded});
    own->stop = true;
    for (int i = 0; i < MOST; i++) {
        if (streams[i] == own) {
            streams[i] = NULL;
        }
    }
    pthread_detach(own->thread);
    return end(0);
}

int
cuEventQuery(og_cu_event given)
{
    BEGIN(true)
    event *one = given;
    return end(one->reached >= one->recorded ? 0 : OG_CU_NOT_READY);
}

int
cuEventSynchronize(og_cu_event given)
{
    BEGIN(true)
    event *one = given;
    while (one->reached < one->recorded) {
        pthread_cond_wait(&changed, &lock);
    }
    return end(0);
}
