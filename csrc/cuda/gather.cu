/* Rows made of other rows by their numbers: the device twin of
 * csrc/core/gather.c. A team looks for rows with errors, a pick a thread; what
 * it finds, which is little, its first thread merges one after another. */
#include <cuda_runtime.h>

#include "cuda/device.h"

namespace og {
namespace {

OG_DEVICE int64_t
pick_at(const og_cuda_gather &g, int64_t row, int64_t k)
{
    const char *at =
        (const char *)g.picks + row * g.picks_row_stride + k * g.picks_stride;
    return g.wide ? *(const int64_t *)at : (int64_t)*(const int32_t *)at;
}

/* The row a pick names, nullptr for none. */
OG_DEVICE const uint32_t *
named(const og_cuda_gather &g, int64_t pick)
{
    return pick < 0 || pick >= g.rows
               ? nullptr
               : (const uint32_t *)((const char *)g.from +
                                    pick * g.from_stride);
}

__global__ void
__launch_bounds__(kThreads)
    copy_picked(const og_cuda_gather g, const int lanes)
{
    const Team team = team_of(lanes);
    for (int64_t row = team_row(lanes); row < g.samples;
         row += team_step(lanes)) {
        const uint32_t *from = named(g, pick_at(g, row, 0));
        uint32_t *to = (uint32_t *)((char *)g.to + row * g.to_stride);
        for (int word = team.lane; word < g.capacity / 2; word += lanes) {
            to[word] = from == nullptr ? 0 : from[word];
        }
    }
}

OG_DEVICE bool
has_errors(const og_cuda_gather &g, const uint32_t *from)
{
    uint32_t any = 0;
    for (int word = 0; from != nullptr && word < g.capacity / 2; word++) {
        any |= from[word];
    }
    return any != 0;
}

/* A row in the making; the same in every thread of its team. */
struct Fold {
    int64_t row;
    int64_t highest; /* of the picks taken so far, -1 */
};

/* Whether the team has met this pick before k. */
OG_DEVICE bool
met_before(const og_cuda_gather &g, const Fold &fold, const Team &team,
           int64_t k, int64_t pick)
{
    unsigned met = 0;
    for (int64_t i = team.lane; i < k; i += team.lanes) {
        met |= pick_at(g, fold.row, i) == pick;
    }
    return team_or(team, met) != 0;
}

/* Called by the whole team for a pick whose row has errors. */
OG_DEVICE void
take(const og_cuda_gather &g, Fold *fold, const Team &team, int64_t k)
{
    const int64_t pick = pick_at(g, fold->row, k);
    const bool first = fold->highest < 0;
    if (pick <= fold->highest && met_before(g, *fold, team, k, pick)) {
        return;
    }
    fold->highest = pick > fold->highest ? pick : fold->highest;
    if (team.lane == 0) {
        uint32_t *to = (uint32_t *)((char *)g.to + fold->row * g.to_stride);
        const uint32_t *from = named(g, pick);
        for (int word = 0; first && word < g.capacity / 2; word++) {
            to[word] = from[word];
        }
        if (!first) {
            og_row_merge((uint16_t *)to, (const uint16_t *)from, g.capacity,
                         g.policy);
        }
    }
}

__global__ void
__launch_bounds__(kThreads)
    fold_picked(const og_cuda_gather g, const int lanes)
{
    __shared__ unsigned found[kWarps];
    const Team team = team_of(lanes);
    const int words = lanes > kWarp ? kWarps : 1;
    for (int64_t row = team_row(lanes); row < g.samples;
         row += team_step(lanes)) {
        uint32_t *to = (uint32_t *)((char *)g.to + row * g.to_stride);
        Fold fold = {row, -1};
        for (int word = team.lane; word < g.capacity / 2; word += lanes) {
            to[word] = 0;
        }
        team_sync(team);
        for (int64_t begin = 0; begin < g.count; begin += lanes) {
            const int64_t k = begin + team.lane;
            const bool mine =
                k < g.count && has_errors(g, named(g, pick_at(g, row, k)));
            unsigned dirty = (unsigned)mine << team.lane % kWarp;
            if (lanes > 1) {
                dirty = __reduce_or_sync(team.mask, dirty);
            }
            if (words > 1) {
                __syncthreads(); /* found has been read */
                if (threadIdx.x % kWarp == 0) {
                    found[threadIdx.x / kWarp] = dirty;
                }
                __syncthreads();
            }
            for (int w = 0; w < words; w++) {
                dirty = words > 1 ? found[w] : dirty;
                for (int i = 0; i < kWarp && dirty >> i != 0; i++) {
                    if (dirty >> i & 1) {
                        take(g, &fold, team, begin + w * kWarp + i);
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace og

extern "C" int
og_cuda_launch_gather(const og_cuda_gather *call, const og_cuda_place *place)
{
    if (call->samples == 0) {
        return 0;
    }
    return og::on_device(place, [&] {
        og_cuda_gather g = *call;
        g.policy.num_slots = g.capacity;
        if (g.count == 1) {
            const int lanes = og::lanes_for(g.capacity / 2, og::kWarp);
            return og::launch(og::blocks_for(g.samples, lanes), place,
                              og::copy_picked, g, lanes);
        }
        int lanes = og::lanes_for(g.count, og::kWarp);
        if (g.count > 4 * og::kWarp) {
            lanes = og::kThreads;
        }
        return og::launch(og::blocks_for(g.samples, lanes), place,
                          og::fold_picked, g, lanes);
    });
}
