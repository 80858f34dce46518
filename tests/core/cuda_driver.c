/* libcuda.so.1 on a machine without a GPU: what csrc/core/pool_*.c calls of
 * it, over host memory. Built by the tests as a shared library.
 *
 * "Device" addresses are host addresses that can be read only while memory is
 * mapped behind them: what comes too late or too early dies of SIGSEGV.
 * Streams are threads with a queue each, and lazy: what is queued runs only
 * while somebody waits for the device, so who forgets to wait finds nothing
 * done. What a driver would refuse is refused and counted in "misuse", and so
 * is what it would let pass and answer with rubbish later: memory unmapped or
 * unpinned under work that is queued, a capture that is spoilt. An error may
 * be made to stick, as those of kernels do (emu_break).
 *
 * The functions emu_* are the tests' controls. */
#define _GNU_SOURCE
#include "core/pool_arena_driver.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum {
    INVALID_VALUE = 1,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ALREADY_PINNED = 712,
    NOT_PINNED = 713,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
};

enum { CAPTURE_GLOBAL, CAPTURE_THREAD, CAPTURE_RELAXED };

#define MOST 4096
#define NAMES 64
#define DEVICES 2
#define DEEP 4096

typedef struct memory {
    int fd, device;
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
    int device;
    long recorded, reached;
    bool captured;
} event;

typedef enum kind { COPY, RECORD, WAIT, READ, ADD } kind;

typedef struct op {
    kind kind;
    void *to;
    const void *from;
    size_t size;
    event *event;
    long number, hurries;
    useconds_t pause;
    struct op *next;
} op;

typedef struct stream {
    int device;
    op *first, *last, *now;
    bool stop, idle;
    bool capturing, spoilt;
    int mode; /* of the capture */
    pthread_t thread, by;
} stream;

typedef struct counter {
    char name[48];
    long calls;
} counter;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static range reserved[MOST], mapped[MOST], pinned[MOST];
static stream *streams[MOST];
static stream *default_streams[DEVICES];
static int contexts[DEVICES];
static counter counters[NAMES];
static size_t capacity = (size_t)64 << 20, used, unit = 1 << 16;
static long misuse, events, retained, handles, sum, bytes_in, bytes_out;
static long waiting, hurries;
static int able = 1, newer = 1, broken;
static useconds_t copy_pause;
static char fail_name[48];
static long fail_after;
static int fail_code;
static bool initialised;
static _Thread_local int stack[DEEP], depth;
static _Thread_local int capture_mode;

/* --- controls ------------------------------------------------------------ */

#define CONTROL __attribute__((visibility("default")))

CONTROL void
emu_configure(long long bytes, long long granularity, int maps,
              int record_all);
CONTROL void
emu_fail(const char *name, long nth, int code);
CONTROL void
emu_break(int code);
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
CONTROL void
emu_hurry(void);
CONTROL void
emu_capture(void *on, int mode);
CONTROL int
emu_end(void *on);

void
emu_configure(long long bytes, long long granularity, int maps, int record_all)
{
    pthread_mutex_lock(&lock);
    capacity = (size_t)bytes;
    unit = (size_t)granularity;
    able = maps;
    newer = record_all;
    misuse = sum = bytes_in = bytes_out = 0;
    broken = 0;
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

/* From now on every call that does something fails, until the next
 * emu_configure: a kernel went wrong. */
void
emu_break(int code)
{
    pthread_mutex_lock(&lock);
    broken = code;
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

/* Its pause, unless emu_hurry ends it. */
static void
take_time(const op *one)
{
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    long nanoseconds = end.tv_nsec + (long)(one->pause % 1000000) * 1000;
    end.tv_sec += one->pause / 1000000 + nanoseconds / 1000000000;
    end.tv_nsec = nanoseconds % 1000000000;
    pthread_mutex_lock(&lock);
    int code = one->pause == 0;
    while (code == 0 && hurries == one->hurries) {
        code = pthread_cond_timedwait(&changed, &lock, &end);
    }
    pthread_mutex_unlock(&lock);
}

static void
run(op *one)
{
    take_time(one);
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
    while (one->kind == WAIT && one->event->reached < one->number) {
        pthread_cond_wait(&changed, &lock);
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
        while ((self->first == NULL || waiting == 0) && !self->stop) {
            pthread_cond_wait(&changed, &lock);
        }
        op *one = self->first;
        if (one == NULL) {
            pthread_mutex_unlock(&lock);
            return NULL;
        }
        self->idle = false;
        self->first = one->next;
        self->now = one;
        pthread_mutex_unlock(&lock);
        run(one);
        pthread_mutex_lock(&lock);
        self->now = NULL;
        pthread_mutex_unlock(&lock);
        free(one);
    }
}

/* Under the lock, as everything below that is called by a driver function. */
static stream *
new_stream(int device)
{
    stream *made = calloc(1, sizeof *made);
    made->idle = true;
    made->device = device;
    int i = 0;
    while (streams[i] != NULL) {
        i++;
    }
    streams[i] = made;
    pthread_create(&made->thread, NULL, work, made);
    return made;
}

static int
here(void)
{
    return depth == 0 ? 0 : stack[depth - 1];
}

static stream *
stream_of(void *given)
{
    if (given != NULL) {
        return given;
    }
    int device = here();
    if (default_streams[device] == NULL) {
        default_streams[device] = new_stream(device);
    }
    return default_streams[device];
}

static void
queue(void *on, op wanted)
{
    stream *target = stream_of(on);
    op *one = malloc(sizeof *one);
    *one = wanted;
    one->next = NULL;
    one->hurries = hurries;
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

/* Somebody waits, so that what is queued gets on. */
static void
await(int by)
{
    waiting += by;
    pthread_cond_broadcast(&changed);
}

static void
finish(stream *one)
{
    await(1);
    while (one->first != NULL || !one->idle) {
        pthread_cond_wait(&changed, &lock);
    }
    await(-1);
}

static void
finish_all(int device)
{
    for (int i = 0; i < MOST; i++) {
        if (streams[i] != NULL &&
            (device < 0 || streams[i]->device == device)) {
            finish(streams[i]);
        }
    }
}

static bool
touches(const op *one, uintptr_t start, size_t size)
{
    uintptr_t to = (uintptr_t)one->to, from = (uintptr_t)one->from;
    return (to < start + size && start < to + one->size) ||
           (from < start + size && start < from + one->size);
}

/* Whether something that is queued will read or write there. */
static bool
in_use(uintptr_t start, size_t size)
{
    for (int i = 0; i < MOST; i++) {
        const stream *one = streams[i];
        if (one != NULL && one->now != NULL &&
            touches(one->now, start, size)) {
            return true;
        }
        for (const op *each = one == NULL ? NULL : one->first; each != NULL;
             each = each->next) {
            if (touches(each, start, size)) {
                return true;
            }
        }
    }
    return false;
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
    stream *made = new_stream(0);
    pthread_mutex_unlock(&lock);
    return made;
}

void
emu_finish(void)
{
    pthread_mutex_lock(&lock);
    finish_all(-1);
    pthread_mutex_unlock(&lock);
}

/* What is queued now takes no time any more. */
void
emu_hurry(void)
{
    pthread_mutex_lock(&lock);
    hurries++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* --- captures ------------------------------------------------------------ */

/* This thread begins to capture a graph on a stream, as torch.cuda.graph does
 * with mode 0. */
void
emu_capture(void *on, int mode)
{
    stream *one = on;
    pthread_mutex_lock(&lock);
    one->capturing = true;
    one->spoilt = false;
    one->mode = mode;
    one->by = pthread_self();
    pthread_mutex_unlock(&lock);
}

/* 0, or what the driver says of a capture that was spoilt meanwhile. */
int
emu_end(void *on)
{
    stream *one = on;
    pthread_mutex_lock(&lock);
    one->capturing = false;
    int code = one->spoilt ? CAPTURE_INVALIDATED : 0;
    pthread_mutex_unlock(&lock);
    return code;
}

static bool
spoil(stream *one)
{
    if (one == NULL || !one->capturing) {
        return false;
    }
    misuse++;
    return one->spoilt = true;
}

/* Whether a capture that runs forbids this thread what is not queued on a
 * stream; it is spoilt if so. */
static bool
forbidden(void)
{
    bool found = false;
    for (int i = 0; i < MOST && capture_mode != CAPTURE_RELAXED; i++) {
        stream *one = streams[i];
        bool mine = one != NULL && pthread_equal(one->by, pthread_self());
        if (one != NULL && one->capturing &&
            ((mine && one->mode != CAPTURE_RELAXED) ||
             (one->mode == CAPTURE_GLOBAL &&
              capture_mode == CAPTURE_GLOBAL))) {
            found |= spoil(one);
        }
    }
    return found;
}

/* The same for what speaks of all streams of a context: no mode allows it. */
static bool
forbidden_everywhere(int device)
{
    bool found = false;
    for (int i = 0; i < MOST; i++) {
        if (streams[i] != NULL && streams[i]->device == device) {
            found |= spoil(streams[i]);
        }
    }
    return found;
}

/* --- what each driver function begins and ends with ---------------------- */

/* What is legal whatever is captured, in any mode. */
static bool
is_harmless(const char *name)
{
    static const char *const names[] = {
        "cuInit",
        "cuDeviceGet",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
        "cuCtxPushCurrent_v2",
        "cuCtxPopCurrent_v2",
        "cuThreadExchangeStreamCaptureMode",
        "cuStreamIsCapturing",
        "cuStreamWaitEvent",
        "cuEventCreate",
        "cuEventDestroy_v2",
        "cuEventRecord",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemGetAllocationGranularity",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], name) == 0) {
            return true;
        }
    }
    return false;
}

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
    if (!is_harmless(name) && forbidden()) {
        return CAPTURE_UNSUPPORTED;
    }
    return needs_context && strncmp(name, "cuCtxPop", 8) != 0 ? broken : 0;
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
    return end(ordinal >= 0 && ordinal < DEVICES ? 0 : INVALID_DEVICE);
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
    *to = &contexts[device];
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
    long device = (int *)context - contexts;
    if (device < 0 || device >= DEVICES || depth == DEEP) {
        return end(wrong(INVALID_CONTEXT));
    }
    stack[depth++] = (int)device;
    return end(0);
}

int
cuCtxPopCurrent_v2(og_cu_context *context)
{
    BEGIN(true)
    *context = &contexts[stack[--depth]];
    return end(0);
}

int
cuCtxSynchronize(void)
{
    BEGIN(true)
    if (forbidden_everywhere(here())) {
        return end(CAPTURE_UNSUPPORTED);
    }
    finish_all(here());
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
    if (size == 0 || size % unit != 0 || wanted != 0 || flags != 0 ||
        alignment < unit || (alignment & (alignment - 1)) != 0) {
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
    if (size == 0 || size % unit != 0 || flags != 0 || property->type != 1 ||
        property->location.id != here()) {
        return end(wrong(INVALID_VALUE));
    }
    if (used + size > capacity) {
        return end(OG_CU_OUT_OF_MEMORY);
    }
    memory *made = calloc(1, sizeof *made);
    made->fd = memfd_create("emulated", 0);
    made->device = here();
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
    if (found == NULL || found->start != address || found->size != size ||
        count != 1 || access->flags != OG_CU_READ_WRITE ||
        access->location.type != OG_CU_ON_DEVICE ||
        access->location.id != found->memory->device) {
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
    misuse += in_use(address, size);
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
    long page = sysconf(_SC_PAGESIZE);
    if (size == 0 || flags != OG_CU_PORTABLE ||
        (uintptr_t)host % (size_t)page != 0 || size % (size_t)page != 0) {
        return end(wrong(INVALID_VALUE));
    }
    if (overlaps(pinned, (uintptr_t)host, size)) {
        return end(wrong(ALREADY_PINNED));
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
    misuse += in_use(found->start, found->size);
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
    if (stream_of(on)->device != here() || there->memory->device != here()) {
        return wrong(INVALID_CONTEXT);
    }
    if (spoil(stream_of(on))) {
        return CAPTURE_UNSUPPORTED;
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
    *to = new_stream(here());
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
    if (spoil(stream_of(on))) {
        return end(CAPTURE_UNSUPPORTED);
    }
    finish(stream_of(on));
    return end(0);
}

int
cuStreamIsCapturing(og_cu_stream on, int *status)
{
    BEGIN(true)
    const stream *one = stream_of(on);
    *status = one->capturing ? 1 + one->spoilt : 0;
    return end(0);
}

int
cuStreamWaitEvent(og_cu_stream on, og_cu_event given, unsigned flags)
{
    BEGIN(true)
    event *one = given;
    if (flags != 0) {
        return end(wrong(INVALID_VALUE));
    }
    if (!one->captured && spoil(stream_of(on))) {
        return end(CAPTURE_ISOLATION);
    }
    queue(on, (op){.kind = WAIT, .event = one, .number = one->recorded});
    return end(0);
}

int
cuEventCreate(og_cu_event *to, unsigned flags)
{
    BEGIN(true)
    event *made = calloc(1, sizeof *made);
    made->device = here();
    *to = made;
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
    if (stream_of(on)->device != one->device) {
        return end(wrong(INVALID_HANDLE));
    }
    one->captured = stream_of(on)->capturing;
    if (one->captured) {
        return end(0);
    }
    queue(on, (op){.kind = RECORD, .event = one, .number = ++one->recorded});
    return end(0);
}

/* Reached once a stream of its own has waited for all the others. */
int
cuCtxRecordEvent(og_cu_context context, og_cu_event given)
{
    BEGIN(true)
    event *one = given;
    int device = here();
    if (!newer) {
        return end(NOT_SUPPORTED);
    }
    if (context != &contexts[device] || one->device != device) {
        return end(wrong(INVALID_HANDLE));
    }
    if (forbidden_everywhere(device)) {
        return end(CAPTURE_UNSUPPORTED);
    }
    stream *own = new_stream(device);
    for (int i = 0; i < MOST; i++) {
        if (streams[i] != NULL && streams[i] != own &&
            streams[i]->device == device) {
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
    if (one->captured) {
        return end(wrong(CAPTURED_EVENT));
    }
    return end(one->reached >= one->recorded ? 0 : OG_CU_NOT_READY);
}

int
cuEventSynchronize(og_cu_event given)
{
    BEGIN(true)
    event *one = given;
    if (one->captured) {
        return end(wrong(CAPTURED_EVENT));
    }
    await(1);
    while (one->reached < one->recorded) {
        pthread_cond_wait(&changed, &lock);
    }
    await(-1);
    return end(0);
}
