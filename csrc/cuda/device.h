/* What the kernels share: teams of threads that have a row in common, the
 * copy of a row, and the launch. For .cu files only, which include
 * cuda_runtime.h before. */
#ifndef OPGUARD_CUDA_DEVICE_H
#define OPGUARD_CUDA_DEVICE_H

#include "cuda/opguard_cuda.h"

#define OG_HOST static inline
#define OG_DEVICE static __device__ __forceinline__

namespace og {

const int kWarp = 32;
const int kThreads = 256;
const int kWarps = kThreads / kWarp;
/* Blocks of one launch; kernels step over what is left. */
#ifndef OG_CUDA_MAX_BLOCKS
#define OG_CUDA_MAX_BLOCKS (1 << 30)
#endif
const int64_t kMaxBlocks = OG_CUDA_MAX_BLOCKS;

/* The threads that share a row: 1 to 32 of a warp (a power of two), or all of
 * a block. */
struct Team {
    int lane;
    int lanes;
    unsigned mask; /* of the warp, for teams within one */
};

OG_DEVICE Team
team_of(int lanes)
{
    Team team = {(int)threadIdx.x % lanes, lanes, 0xFFFFFFFFu};
    if (lanes < kWarp) {
        const int first = (int)threadIdx.x % kWarp / lanes * lanes;
        team.mask = ((1u << lanes) - 1) << first;
    }
    return team;
}

/* The first row of this thread's team, and how many teams there are. */
OG_DEVICE int64_t
team_row(int lanes)
{
    return ((int64_t)blockIdx.x * kThreads + threadIdx.x) / lanes;
}

OG_DEVICE int64_t
team_step(int lanes)
{
    return (int64_t)gridDim.x * (kThreads / lanes);
}

/* What the team has written is seen by all of it afterwards. */
OG_DEVICE void
team_sync(const Team &team)
{
    if (team.lanes > kWarp) {
        __syncthreads();
    }
    else if (team.lanes > 1) {
        __syncwarp(team.mask);
    }
}

/* The OR of the block's values, in every thread. */
OG_DEVICE unsigned
block_or(unsigned value)
{
    __shared__ unsigned parts[kWarps];
    value = __reduce_or_sync(0xFFFFFFFFu, value);
    __syncthreads(); /* parts of the row before have been read */
    if (threadIdx.x % kWarp == 0) {
        parts[threadIdx.x / kWarp] = value;
    }
    __syncthreads();
    value = 0;
    for (int i = 0; i < kWarps; i++) {
        value |= parts[i];
    }
    return value;
}

OG_DEVICE unsigned
team_or(const Team &team, unsigned value)
{
    if (team.lanes > kWarp) {
        return block_or(value);
    }
    return team.lanes == 1 ? value : __reduce_or_sync(team.mask, value);
}

OG_DEVICE const uint32_t *
row_from(const og_cuda_rows &rows, int64_t row)
{
    const char *from = (const char *)rows.from;
    return from == nullptr ? nullptr
                           : (const uint32_t *)(from + row * rows.from_stride);
}

OG_DEVICE uint32_t *
row_to(const og_cuda_rows &rows, int64_t row)
{
    return (uint32_t *)((char *)rows.to + row * rows.to_stride);
}

/* Brings a row to where it is to be changed. Its slots may be touched by
 * another thread of the team after team_sync only. */
OG_DEVICE void
copy_row(const og_cuda_rows &rows, int64_t row, int lane, int lanes)
{
    const uint32_t *from = row_from(rows, row);
    uint32_t *to = row_to(rows, row);
    if (from != to) {
        for (int word = lane; word < rows.capacity / 2; word += lanes) {
            to[word] = from == nullptr ? 0 : from[word];
        }
    }
}

/* Where a unit lies, in bytes behind the sample's first. */
OG_DEVICE int64_t
place_of(const og_cuda_values &x, int64_t unit)
{
    int64_t place = 0;
    for (int d = x.ndim - 1; d > 0; d--) {
        int64_t rest;
        if (unit >> 32 == 0 && x.sizes[d] >> 32 == 0) {
            rest = (uint32_t)unit / (uint32_t)x.sizes[d];
        }
        else {
            rest = unit / x.sizes[d];
        }
        place += (unit - rest * x.sizes[d]) * x.strides[d];
        unit = rest;
    }
    return place + unit * x.strides[0];
}

/* The least power of two that is at least value, at most most. */
OG_HOST int
lanes_for(int64_t value, int most)
{
    int lanes = 1;
    while (lanes < value && lanes < most) {
        lanes *= 2;
    }
    return lanes;
}

/* Blocks for so many teams. */
OG_HOST unsigned
blocks_for(int64_t teams, int lanes)
{
    const int64_t teams_per_block = kThreads / lanes;
    const int64_t blocks = (teams + teams_per_block - 1) / teams_per_block;
    return (unsigned)(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <typename... Expected, typename... Given>
cudaError_t
launch(dim3 blocks, const og_cuda_place *place, void (*kernel)(Expected...),
       Given... given)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(kThreads);
    config.stream = (cudaStream_t)place->stream;
    const cudaError_t code = cudaLaunchKernelEx(&config, kernel, given...);
    const cudaError_t last = cudaGetLastError();
    return code == cudaSuccess ? last : code;
}

/* Runs body with the place's device current, and the former one after. */
template <typename Body>
int
on_device(const og_cuda_place *place, Body body)
{
    int before = 0;
    cudaError_t code = cudaGetDevice(&before);
    if (code == cudaSuccess && before != place->device) {
        code = cudaSetDevice(place->device);
    }
    if (code == cudaSuccess) {
        code = body();
        if (before != place->device) {
            const cudaError_t restored = cudaSetDevice(before);
            code = code == cudaSuccess ? restored : code;
        }
    }
    return (int)code;
}

}  // namespace og

#endif
