/* NaN and Inf of every sample, found and recorded in one pass: the device
 * twin of the check in csrc/torch/flags.c.
 *
 * Three shapes of work. Many samples: a few threads of a warp, or the whole
 * warp, take a sample each. Few large ones: blocks share a sample, each
 * adding what it found to the sample's word of scratch memory, and the last
 * one to do so records. Samples that lie side by side (x.t()): a block takes
 * 32 neighbours, so that a warp reads them together. */
#include <cuda_runtime.h>

#include "cuda/device.h"
#include "cuda/numbers.h"

namespace og {
namespace {

/* Values that lie side by side, without the room for dimensions. */
struct Run {
    const char *data;
    int64_t row_stride;
    int64_t count;
    int32_t unit;
};

/* How the work is shared out. */
struct Plan {
    int lanes;     /* threads of a team; kThreads: blocks take parts */
    bool tiled;    /* 32 samples a block */
    int64_t parts; /* of a sample */
    int64_t chunk; /* units of a part */
};

/* What is done with the findings. */
struct Finding {
    og_cuda_rows rows;
    Numbers numbers;
    unsigned checks;
    uint16_t nan;
    uint16_t inf;
    uint8_t *findings;
    unsigned long long *words; /* one a sample where parts > 1 */
};

/* Looks through units begin..end, the team's lanes taking turns. */
template <bool kWhole>
OG_DEVICE unsigned
scan(const Numbers &n, const og_cuda_values &x, const char *row, int64_t begin,
     int64_t end, int lane, int lanes)
{
    unsigned found = 0;
    for (int64_t i = begin + lane; i < end; i += 4 * lanes) {
        uint4 four[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int64_t at = i + k * lanes;
            four[k] = at < end ? load_unit(row + place_of(x, at), x.unit)
                               : make_uint4(0, 0, 0, 0);
        }
        found |= judge_four<kWhole>(n, four[0], four[1], four[2], four[3]);
    }
    return found;
}

/* The same for units side by side: whole vectors, and the numbers before the
 * first and behind the last one by one. */
template <bool kWhole>
OG_DEVICE unsigned
scan(const Numbers &n, const Run &x, const char *row, int64_t begin,
     int64_t end, int lane, int lanes)
{
    const char *data = row + begin * x.unit;
    const int64_t bytes = (end - begin) * x.unit;
    int64_t head = (16 - (int64_t)((uintptr_t)data % 16)) % 16;
    head = head < bytes ? head : bytes;
    const int64_t vectors = (bytes - head) / 16;
    const int64_t tail = head + 16 * vectors;
    const int width = n.format.bytes;
    unsigned found = 0;
    for (int64_t i = lane; i < vectors; i += 4 * lanes) {
        const char *at = data + head + 16 * i;
        const int64_t step = 16 * lanes, left = vectors - i;
        const uint4 none = make_uint4(0, 0, 0, 0);
        const uint4 a = load_unit(at, 16);
        const uint4 b = lanes < left ? load_unit(at + step, 16) : none;
        const uint4 c = 2 * lanes < left ? load_unit(at + 2 * step, 16) : none;
        const uint4 d = 3 * lanes < left ? load_unit(at + 3 * step, 16) : none;
        found |= judge_four<kWhole>(n, a, b, c, d);
    }
    const int64_t edges = head + bytes - tail;
    for (int64_t i = (int64_t)lane * width; i < edges;
         i += (int64_t)lanes * width) {
        const int64_t at = i < head ? i : tail + i - head;
        found |= judge(n.format, load_number(data + at, width));
    }
    return found;
}

/* Writes a sample's outcome; every lane of the team calls it, with the same
 * found. */
OG_DEVICE void
record(const Finding &f, int64_t row, unsigned found, const Team &team)
{
    found &= f.checks;
    if (f.findings != nullptr) {
        if (team.lane == 0) {
            f.findings[row] = (uint8_t)found;
        }
        return;
    }
    copy_row(f.rows, row, team.lane, team.lanes);
    team_sync(team);
    if (found != 0 && team.lane == 0) {
        uint16_t *slots = (uint16_t *)row_to(f.rows, row);
        if (found & kNan) {
            og_row_push(slots, f.rows.capacity, f.rows.policy, f.nan);
        }
        if (found & (kPositive | kNegative)) {
            og_row_push(slots, f.rows.capacity, f.rows.policy, f.inf);
        }
    }
}

template <bool kWhole, typename Values>
__global__ void
__launch_bounds__(kThreads)
    check_rows(const Finding f, const Values x, const int lanes)
{
    const Team team = team_of(lanes);
    for (int64_t row = team_row(lanes); row < f.rows.samples;
         row += team_step(lanes)) {
        const char *data = (const char *)x.data + row * x.row_stride;
        const unsigned found =
            scan<kWhole>(f.numbers, x, data, 0, x.count, team.lane, lanes);
        record(f, row, team_or(team, found), team);
    }
}

/* Adds one part's findings to its sample's word; the sum tells how many parts
 * are in, and how many of them found each thing. */
OG_DEVICE unsigned long long
arrive(unsigned long long *word, unsigned found)
{
    const unsigned long long one = 1;
    const unsigned long long add = one << 48 | (found & kNan ? one : 0) |
                                   (found & kPositive ? one << 16 : 0) |
                                   (found & kNegative ? one << 32 : 0);
    return atomicAdd(word, add) + add;
}

OG_DEVICE unsigned
found_by(unsigned long long sum)
{
    return (sum & 0xFFFF ? kNan : 0) | (sum >> 16 & 0xFFFF ? kPositive : 0) |
           (sum >> 32 & 0xFFFF ? kNegative : 0);
}

template <bool kWhole, typename Values>
__global__ void
__launch_bounds__(kThreads)
    check_parts(const Finding f, const Values x, const Plan plan)
{
    __shared__ unsigned long long sum;
    const Team team = team_of(kThreads);
    for (int64_t item = blockIdx.x; item < f.rows.samples * plan.parts;
         item += gridDim.x) {
        const int64_t row = item / plan.parts;
        const int64_t begin = item % plan.parts * plan.chunk;
        const int64_t end =
            plan.chunk < x.count - begin ? begin + plan.chunk : x.count;
        const char *data = (const char *)x.data + row * x.row_stride;
        unsigned found = block_or(
            scan<kWhole>(f.numbers, x, data, begin, end, team.lane, kThreads));
        if (plan.parts > 1) {
            if (team.lane == 0) {
                sum = arrive(f.words + row, found);
            }
            __syncthreads();
            const unsigned long long all = sum;
            __syncthreads();
            if (all >> 48 != (unsigned long long)plan.parts) {
                continue; /* not the last one */
            }
            found = found_by(all);
        }
        record(f, row, found, team);
    }
}

__global__ void
__launch_bounds__(kThreads)
    check_tiles(const Finding f, const og_cuda_values x, const Plan plan)
{
    __shared__ unsigned shared[kThreads];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Team alone = {0, 1, 0};
    const int64_t tiles = (f.rows.samples + kWarp - 1) / kWarp;
    for (int64_t item = blockIdx.x; item < tiles * plan.parts;
         item += gridDim.x) {
        const int64_t row = item / plan.parts * kWarp + lane;
        const int64_t begin = item % plan.parts * plan.chunk;
        const int64_t end =
            plan.chunk < x.count - begin ? begin + plan.chunk : x.count;
        const char *data = (const char *)x.data + row * x.row_stride;
        const bool mine = row < f.rows.samples;
        shared[threadIdx.x] =
            mine ? scan<false>(f.numbers, x, data, begin, end, warp, kWarps)
                 : 0;
        __syncthreads();
        unsigned found = 0;
        for (int i = 0; i < kWarps; i++) {
            found |= shared[i * kWarp + lane];
        }
        __syncthreads();
        bool last = warp == 0 && mine;
        if (last && plan.parts > 1) {
            const unsigned long long sum = arrive(f.words + row, found);
            last = sum >> 48 == (unsigned long long)plan.parts;
            found = found_by(sum);
        }
        if (last) {
            record(f, row, found, alone);
        }
    }
}

/* Splits samples so that there is work for every multiprocessor. */
void
split(Plan *plan, int64_t teams, int64_t count, int64_t least, int processors)
{
    int64_t parts = (8 * (int64_t)processors + teams - 1) / teams;
    const int64_t most = (count + least - 1) / least;
    parts = parts < most ? parts : most;
    parts = parts < 0xFFFF ? parts : 0xFFFF;
    parts = parts > 1 ? parts : 1;
    plan->chunk = (count + parts - 1) / parts;
    plan->chunk = (plan->chunk + least - 1) / least * least;
    plan->chunk = plan->chunk > 0 ? plan->chunk : 1;
    plan->parts = (count + plan->chunk - 1) / plan->chunk;
    plan->parts = plan->parts > 1 ? plan->parts : 1;
}

cudaError_t
plan_of(const og_cuda_check *call, Plan *plan)
{
    int device = 0, processors = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code == cudaSuccess) {
        code = cudaDeviceGetAttribute(&processors,
                                      cudaDevAttrMultiProcessorCount, device);
    }
    const og_cuda_values &x = call->x;
    const int64_t samples = call->rows.samples;
    const int per_unit = x.ndim == 0 ? 16 / x.unit : 1;
    const int64_t loads = (x.count + per_unit - 1) / per_unit;
    plan->parts = 1;
    plan->chunk = x.count;
    plan->lanes = lanes_for((loads + 3) / 4, kWarp);
    plan->tiled = x.ndim > 0 && samples > 1 && x.unit != 16 &&
                  x.row_stride < x.strides[x.ndim - 1];
    if (plan->tiled) {
        split(plan, (samples + kWarp - 1) / kWarp, x.count, 4 * kWarps,
              processors);
    }
    else if (plan->lanes == kWarp &&
             (samples / kWarps < 4 * (int64_t)processors ||
              loads > 32 * kThreads)) {
        plan->lanes = kThreads;
        split(plan, samples, x.count, (int64_t)4 * kThreads * per_unit,
              processors);
    }
    return code;
}

template <bool kWhole, typename Values>
cudaError_t
start(const Finding &f, const Values &x, const Plan &plan,
      const og_cuda_place *place)
{
    if (plan.lanes == kThreads) {
        return launch(blocks_for(f.rows.samples * plan.parts, kThreads), place,
                      check_parts<kWhole, Values>, f, x, plan);
    }
    return launch(blocks_for(f.rows.samples, plan.lanes), place,
                  check_rows<kWhole, Values>, f, x, plan.lanes);
}

cudaError_t
start(Finding *f, const og_cuda_values &x, const Plan &plan,
      const og_cuda_place *place)
{
    const bool whole = f->numbers.format.whole;
    if (x.ndim == 0) {
        const Run run = {(const char *)x.data, x.row_stride, x.count, x.unit};
        return whole ? start<true>(*f, run, plan, place)
                     : start<false>(*f, run, plan, place);
    }
    if (whole) {
        /* A rare format in a rare layout has no kernels of its own: all of
         * its numbers are judged. */
        suspect_all(&f->numbers);
    }
    if (plan.tiled) {
        const int64_t tiles = (f->rows.samples + kWarp - 1) / kWarp;
        return launch(blocks_for(tiles * plan.parts, kThreads), place,
                      check_tiles, *f, x, plan);
    }
    return start<false>(*f, x, plan, place);
}

cudaError_t
check(const og_cuda_check *call, const og_cuda_place *place)
{
    Plan plan;
    cudaError_t code = plan_of(call, &plan);
    if (code == cudaSuccess && plan.parts > 1) {
        const size_t bytes = (size_t)call->rows.samples * 8;
        code = cudaMemsetAsync(call->scratch, 0, bytes,
                               (cudaStream_t)place->stream);
    }
    if (code != cudaSuccess) {
        return code;
    }
    Finding f = {call->rows,
                 numbers_of(call->format),
                 (unsigned)call->checks,
                 call->nan,
                 call->inf,
                 call->findings,
                 (unsigned long long *)call->scratch};
    return start(&f, call->x, plan, place);
}

}  // namespace
}  // namespace og

extern "C" int
og_cuda_check_scratch(const og_cuda_check *call, const og_cuda_place *place,
                      int64_t *bytes)
{
    return og::on_device(place, [&] {
        og::Plan plan;
        const cudaError_t code = og::plan_of(call, &plan);
        *bytes = plan.parts > 1 ? call->rows.samples * 8 : 0;
        return code;
    });
}

extern "C" int
og_cuda_launch_check(const og_cuda_check *call, const og_cuda_place *place)
{
    if (call->rows.samples == 0) {
        return 0;
    }
    return og::on_device(place, [&] { return og::check(call, place); });
}
