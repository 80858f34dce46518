/* Copies many blocks of device memory into one buffer: the device twin of
 * copy_cpu in csrc/torch/ops_pack.c, padding bytes zeroed likewise. */
#include <cuda_runtime.h>

#include "core/layout.h"
#include "cuda/device.h"

namespace {

/* Spans travel as a kernel argument (at most 4 KiB on every toolkit), so no
 * copy of them to the device has to be waited for. */
constexpr int kSpansPerLaunch = 160;
constexpr int kMaxBlocksPerSpan = 64;
constexpr int64_t kVector = 16;

struct Batch {
    og_cuda_span spans[kSpansPerLaunch];
};

__global__ void
copy_spans(char *__restrict__ packed, const Batch batch)
{
    const og_cuda_span span = batch.spans[blockIdx.y];
    const char *__restrict__ source = static_cast<const char *>(span.source);
    char *__restrict__ target = packed + span.offset;
    const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int64_t step = (int64_t)gridDim.x * blockDim.x;
    int64_t vectors = 0;
    if (reinterpret_cast<uintptr_t>(source) % kVector == 0) {
        vectors = span.bytes / kVector;
        for (int64_t i = first; i < vectors; i += step) {
            reinterpret_cast<uint4 *>(target)[i] =
                reinterpret_cast<const uint4 *>(source)[i];
        }
    }
    const int64_t padded =
        (span.bytes + OG_PACK_ALIGN - 1) / OG_PACK_ALIGN * OG_PACK_ALIGN;
    for (int64_t i = vectors * kVector + first; i < padded; i += step) {
        target[i] = i < span.bytes ? source[i] : 0;
    }
}

int
blocks_for(const Batch &batch, int count)
{
    int64_t most = 1;
    for (int i = 0; i < count; i++) {
        const int64_t per_block = og::kThreads * kVector;
        const int64_t blocks =
            (batch.spans[i].bytes + per_block - 1) / per_block;
        most = blocks > most ? blocks : most;
    }
    return static_cast<int>(most < kMaxBlocksPerSpan ? most
                                                     : kMaxBlocksPerSpan);
}

cudaError_t
launch_all(char *packed, const og_cuda_span *spans, size_t count,
           const og_cuda_place *place)
{
    for (size_t done = 0; done < count; done += kSpansPerLaunch) {
        Batch batch = {};
        const size_t left = count - done;
        const int now =
            left < kSpansPerLaunch ? static_cast<int>(left) : kSpansPerLaunch;
        for (int i = 0; i < now; i++) {
            batch.spans[i] = spans[done + i];
        }
        const dim3 grid(blocks_for(batch, now), now);
        const cudaError_t code =
            og::launch(grid, place, copy_spans, packed, batch);
        if (code != cudaSuccess) {
            return code;
        }
    }
    return cudaSuccess;
}

}  // namespace

extern "C" int
og_cuda_launch_pack(void *packed, const og_cuda_span *spans, size_t count,
                    const og_cuda_place *place)
{
    return og::on_device(place, [&] {
        return launch_all(static_cast<char *>(packed), spans, count, place);
    });
}

extern "C" const char *
og_cuda_error_text(int code)
{
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}
