/* As much of CUDA as csrc/cuda uses, on the host: a launch runs its blocks one
 * after another, and a block's threads as coroutines that stop where CUDA
 * threads wait for each other. Device memory is host memory.
 *
 * What it makes visible: wrong indices, reads beyond a tensor (the tests put
 * forbidden pages there), misaligned vectors (UndefinedBehaviorSanitizer), a
 * collective that not all threads of its mask reach, and, since the order of
 * threads and blocks turns round from launch to launch, threads that rely on
 * an order. */
#ifndef OPGUARD_TESTS_CUDA_RUNTIME_H
#define OPGUARD_TESTS_CUDA_RUNTIME_H

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1)
        : x(x_), y(y_), z(z_)
    {
    }
};

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaDevAttrMultiProcessorCount = 16 };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void *attrs;
    unsigned numAttrs;
};

static dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulated {

enum Operation { NOTHING, SYNC_BLOCK, SYNC_WARP, OR, ADD, MAX };

struct Thread {
    ucontext_t context; /* a stack to begin on, once */
    jmp_buf here;       /* where it goes on: no system call a switch */
    bool begun;
    bool done;
    Operation waits; /* NOTHING: may run */
    unsigned mask, value;
};

constexpr int kMost = 256;
constexpr size_t kStack = 1 << 16;

struct Block {
    jmp_buf scheduler;
    Thread threads[kMost];
    char *stacks;
    int count, current;
    bool backwards;
    std::function<void()> body;
};

static Block block;

[[noreturn]] static inline void
fail(const char *what)
{
    fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what,
            blockIdx.x, threadIdx.x);
    abort();
}

static inline bool
block_has_arrived()
{
    for (int i = 0; i < block.count; i++) {
        const Thread &t = block.threads[i];
        if (t.done) {
            fail("a thread ended before the others' __syncthreads");
        }
        if (t.waits != SYNC_BLOCK) {
            return false;
        }
    }
    return true;
}

/* Lets the threads of a mask go on once all of them are here. */
static inline void
meet(int first, unsigned mask, Operation operation)
{
    unsigned result = 0;
    for (int i = 0; i < 32; i++) {
        if (mask >> i & 1) {
            const Thread &t = block.threads[first + i];
            if (first + i >= block.count || t.done) {
                fail("a thread of the mask has ended");
            }
            if (t.waits == NOTHING) {
                return;
            }
            if (t.waits != operation || t.mask != mask) {
                fail("threads of one mask are at different collectives");
            }
            result = operation == OR    ? result | t.value
                     : operation == ADD ? result + t.value
                     : result < t.value ? t.value
                                        : result;
        }
    }
    for (int i = 0; i < 32; i++) {
        if (mask >> i & 1) {
            block.threads[first + i].waits = NOTHING;
            block.threads[first + i].value = result;
        }
    }
}

static inline void
back_to_scheduler(Thread &self)
{
    if (_setjmp(self.here) == 0) {
        _longjmp(block.scheduler, 1);
    }
}

static inline void
go_on(Thread &thread)
{
    if (_setjmp(block.scheduler) == 0) {
        if (thread.begun) {
            _longjmp(thread.here, 1);
        }
        thread.begun = true;
        setcontext(&thread.context);
    }
}

static inline unsigned
wait_for_others(Operation operation, unsigned mask, unsigned value)
{
    const int me = block.current;
    Thread &self = block.threads[me];
    self.waits = operation;
    self.mask = mask;
    self.value = value;
    if (operation == SYNC_BLOCK) {
        if (block_has_arrived()) {
            for (int i = 0; i < block.count; i++) {
                block.threads[i].waits = NOTHING;
            }
        }
    }
    else {
        if (!(mask >> me % 32 & 1)) {
            fail("a thread is not in its own mask");
        }
        meet(me / 32 * 32, mask, operation);
    }
    if (self.waits != NOTHING) {
        back_to_scheduler(self);
    }
    return self.value;
}

/* A coroutine runs one thread of each block, for as long as the program. */
static inline void
thread_main()
{
    for (;;) {
        Thread &self = block.threads[block.current];
        block.body();
        self.done = true;
        back_to_scheduler(self);
    }
}

static inline void
make_threads()
{
    block.stacks = (char *)malloc(kMost * kStack);
    for (int i = 0; i < kMost; i++) {
        Thread &t = block.threads[i];
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = block.stacks + i * kStack;
        t.context.uc_stack.ss_size = kStack;
        makecontext(&t.context, thread_main, 0);
    }
}

/* Lets each thread of a warp go on until it has to wait. A warp goes as far
 * as it can before the next one moves at all. */
static inline bool
run_warp(int warp)
{
    bool moved = false;
    for (int i = 0; i < 32; i++) {
        const int turn = block.backwards ? block.count - 1 - (32 * warp + i)
                                         : 32 * warp + i;
        Thread &t = block.threads[turn];
        if (!t.done && t.waits == NOTHING) {
            moved = true;
            block.current = turn;
            threadIdx = dim3(turn);
            go_on(t);
        }
    }
    return moved;
}

static inline void
run_block()
{
    for (int i = 0; i < block.count; i++) {
        Thread &t = block.threads[i];
        t.done = false;
        t.waits = NOTHING;
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int warp = 0; warp < block.count / 32; warp++) {
            while (run_warp(warp)) {
                moved = true;
            }
        }
    }
    for (int i = 0; i < block.count; i++) {
        if (!block.threads[i].done) {
            fail("threads wait for each other for ever");
        }
    }
}

static inline void
run_grid(const cudaLaunchConfig_t *config, std::function<void()> body)
{
    if (block.stacks == nullptr) {
        make_threads();
    }
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    block.count = (int)config->blockDim.x;
    block.body = body;
    block.backwards = !block.backwards;
    const int64_t blocks = (int64_t)gridDim.x * gridDim.y;
    for (int64_t i = 0; i < blocks; i++) {
        const int64_t turn = block.backwards ? blocks - 1 - i : i;
        blockIdx =
            dim3((unsigned)(turn % gridDim.x), (unsigned)(turn / gridDim.x));
        run_block();
    }
}

}  // namespace emulated

template <typename... Expected, typename... Given>
cudaError_t
cudaLaunchKernelEx(const cudaLaunchConfig_t *config,
                   void (*kernel)(Expected...), Given... given)
{
    if (config->gridDim.x == 0 || config->gridDim.y == 0 ||
        config->blockDim.x % 32 != 0 || config->blockDim.x > emulated::kMost) {
        return cudaErrorInvalidValue;
    }
    emulated::run_grid(config, [=] { kernel(given...); });
    return cudaSuccess;
}

static inline cudaError_t
cudaDeviceGetAttribute(int *value, int, int)
{
    *value = 2; /* multiprocessors: few, so that small tensors are split */
    return cudaSuccess;
}

static inline cudaError_t
cudaGetDevice(int *device)
{
    *device = 0;
    return cudaSuccess;
}
static inline cudaError_t
cudaSetDevice(int)
{
    return cudaSuccess;
}
static inline cudaError_t
cudaGetLastError()
{
    return cudaSuccess;
}
static inline const char *
cudaGetErrorString(cudaError_t)
{
    return "a launch the emulation refuses";
}
static inline cudaError_t
cudaMemsetAsync(void *data, int value, size_t bytes, cudaStream_t)
{
    memset(data, value, bytes);
    return cudaSuccess;
}

static inline uint4
make_uint4(unsigned x, unsigned y, unsigned z, unsigned w)
{
    return uint4{x, y, z, w};
}
template <typename T>
static inline T
__ldcg(const T *at)
{
    return *at;
}
static inline void
__syncthreads()
{
    emulated::wait_for_others(emulated::SYNC_BLOCK, 0, 0);
}
static inline void
__syncwarp(unsigned mask)
{
    emulated::wait_for_others(emulated::SYNC_WARP, mask, 0);
}
static inline unsigned
__reduce_or_sync(unsigned mask, unsigned value)
{
    return emulated::wait_for_others(emulated::OR, mask, value);
}
static inline unsigned
__reduce_add_sync(unsigned mask, unsigned value)
{
    return emulated::wait_for_others(emulated::ADD, mask, value);
}
static inline unsigned
__reduce_max_sync(unsigned mask, unsigned value)
{
    return emulated::wait_for_others(emulated::MAX, mask, value);
}
static inline unsigned long long
atomicAdd(unsigned long long *word, unsigned long long value)
{
    const unsigned long long before = *word;
    *word = before + value;
    return before;
}

#endif
