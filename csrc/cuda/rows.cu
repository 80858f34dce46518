/* What changes and reads rows of flags: the device twins of push, push_codes,
 * merge, clear, the index check and the queries. A row has a team of threads,
 * which copies and searches it together; what needs one slot after another is
 * done by the first of them with the functions of core/slots.h. */
#include <cuda_runtime.h>

#include "cuda/device.h"

namespace og {
namespace {

/* --- one edit a row -------------------------------------------------------
 *
 * apply() is called by every lane of the row's team, once the row is where it
 * is to be changed. */

struct Push {
    const uint8_t *where;
    int64_t where_stride;
    uint16_t slot;

    __device__ void apply(const og_cuda_rows &rows, int64_t row,
                          const Team &team) const
    {
        const bool wanted = where == nullptr || where[row * where_stride] != 0;
        if (wanted && team.lane == 0) {
            uint16_t *slots = (uint16_t *)row_to(rows, row);
            og_row_push(slots, rows.capacity, rows.policy, slot);
        }
    }
};

/* An integer of 1, 2, 4 or 8 bytes; unsigned 64-bit ones above the signed
 * range become its end. */
OG_DEVICE int64_t
load_integer(const char *at, int bytes, bool is_signed)
{
    switch (bytes) {
        case 1:
            return is_signed ? *(const int8_t *)at : *(const uint8_t *)at;
        case 2:
            return is_signed ? *(const int16_t *)at : *(const uint16_t *)at;
        case 4:
            return is_signed ? (int64_t)*(const int32_t *)at
                             : (int64_t)*(const uint32_t *)at;
        default: {
            const int64_t value = *(const int64_t *)at;
            return is_signed || value >= 0 ? value : INT64_MAX;
        }
    }
}

OG_DEVICE void
store_integer(char *at, int bytes, int64_t value)
{
    switch (bytes) {
        case 1:
            *(int8_t *)at = (int8_t)value;
            break;
        case 2:
            *(int16_t *)at = (int16_t)value;
            break;
        case 4:
            *(int32_t *)at = (int32_t)value;
            break;
        default:
            *(int64_t *)at = value;
    }
}

struct Codes {
    const char *codes;
    int64_t stride;
    int32_t bytes;
    bool is_signed;
    int32_t location;
    uint32_t severities;

    __device__ void apply(const og_cuda_rows &rows, int64_t row,
                          const Team &team) const
    {
        if (team.lane == 0) {
            const int64_t code =
                load_integer(codes + row * stride, bytes, is_signed);
            if (code > 0 && code < 16) {
                uint16_t *slots = (uint16_t *)row_to(rows, row);
                const int32_t severity = severities >> 2 * code & 3;
                og_row_push(slots, rows.capacity, rows.policy,
                            og_slot_make(location, (int32_t)code, severity));
            }
        }
    }
};

struct Clear {
    int32_t code;

    __device__ void apply(const og_cuda_rows &rows, int64_t row,
                          const Team &team) const
    {
        if (team.lane == 0) {
            og_row_clear((uint16_t *)row_to(rows, row), rows.capacity, code);
        }
    }
};

constexpr int kOthersPerLaunch = 64;

struct Merge {
    int count;
    og_cuda_other others[kOthersPerLaunch];

    __device__ void apply(const og_cuda_rows &rows, int64_t row,
                          const Team &team) const
    {
        uint16_t *slots = (uint16_t *)row_to(rows, row);
        for (int i = 0; i < count; i++) {
            const char *data = (const char *)others[i].data;
            data += row * others[i].stride;
            unsigned any = 0;
            for (int w = team.lane; w < rows.capacity / 2; w += team.lanes) {
                any |= ((const uint32_t *)data)[w];
            }
            if (team_or(team, any) != 0 && team.lane == 0) {
                og_row_merge(slots, (const uint16_t *)data, rows.capacity,
                             rows.policy);
            }
        }
    }
};

template <typename Edit>
__global__ void
__launch_bounds__(kThreads)
    edit_rows(const og_cuda_rows rows, const Edit edit, const int lanes)
{
    const Team team = team_of(lanes);
    for (int64_t row = team_row(lanes); row < rows.samples;
         row += team_step(lanes)) {
        copy_row(rows, row, team.lane, lanes);
        team_sync(team);
        edit.apply(rows, row, team);
    }
}

template <typename Edit>
int
launch_edit(const og_cuda_rows &rows, const Edit &edit,
            const og_cuda_place *place)
{
    if (rows.samples == 0) {
        return 0;
    }
    return on_device(place, [&] {
        const int lanes = lanes_for(rows.capacity / 8, kWarp);
        return launch(blocks_for(rows.samples, lanes), place, edit_rows<Edit>,
                      rows, edit, lanes);
    });
}

/* --- ids ------------------------------------------------------------------
 */

struct Ids {
    og_cuda_values at;
    int64_t size;
    char *clamped;
    uint16_t slot;
    bool is_signed;
};

__global__ void
__launch_bounds__(kThreads)
    check_ids(const og_cuda_rows rows, const Ids ids, const int lanes)
{
    const Team team = team_of(lanes);
    const int bytes = ids.at.unit;
    const int64_t last = ids.size > 0 ? ids.size - 1 : 0;
    for (int64_t row = team_row(lanes); row < rows.samples;
         row += team_step(lanes)) {
        const char *data = (const char *)ids.at.data + row * ids.at.row_stride;
        unsigned bad = 0;
        for (int64_t i = team.lane; i < ids.at.count; i += lanes) {
            const int64_t offset =
                ids.at.ndim == 0 ? i * bytes : place_of(ids.at, i);
            const int64_t id =
                load_integer(data + offset, bytes, ids.is_signed);
            bad |= id < 0 || id >= ids.size;
            if (ids.clamped != nullptr) {
                const int64_t to = (row * ids.at.count + i) * bytes;
                const int64_t low = id < 0 ? 0 : id;
                store_integer(ids.clamped + to, bytes,
                              low > last ? last : low);
            }
        }
        copy_row(rows, row, team.lane, lanes);
        bad = team_or(team, bad);
        team_sync(team);
        if (bad != 0 && team.lane == 0) {
            og_row_push((uint16_t *)row_to(rows, row), rows.capacity,
                        rows.policy, ids.slot);
        }
    }
}

/* --- queries --------------------------------------------------------------
 */

OG_DEVICE unsigned
ask_slot(const og_cuda_query &q, uint16_t slot)
{
    switch (q.what) {
        case OG_CUDA_FIND:
            return slot != 0 && (slot & q.mask) == q.value;
        case OG_CUDA_MAX_SEVERITY:
            return (unsigned)og_slot_severity(slot);
        default: /* OK, ERR, COUNT */
            return slot != 0;
    }
}

OG_DEVICE unsigned
ask_team(const og_cuda_query &q, const Team &team, unsigned answer)
{
    if (team.lanes == 1) {
        return answer;
    }
    switch (q.what) {
        case OG_CUDA_MAX_SEVERITY:
            return __reduce_max_sync(team.mask, answer);
        case OG_CUDA_COUNT:
            return __reduce_add_sync(team.mask, answer);
        default:
            return __reduce_or_sync(team.mask, answer);
    }
}

__global__ void
__launch_bounds__(kThreads) query_rows(const og_cuda_query q, const int lanes)
{
    const Team team = team_of(lanes);
    const bool highest = q.what == OG_CUDA_MAX_SEVERITY;
    for (int64_t row = team_row(lanes); row < q.samples;
         row += team_step(lanes)) {
        const uint32_t *words =
            (const uint32_t *)((const char *)q.data + row * q.stride);
        unsigned answer = 0;
        for (int w = team.lane; w < q.capacity / 2; w += lanes) {
            const unsigned low = ask_slot(q, (uint16_t)words[w]);
            const unsigned high = ask_slot(q, (uint16_t)(words[w] >> 16));
            const unsigned more = high > low ? high : low;
            answer = !highest        ? answer + low + high
                     : more > answer ? more
                                     : answer;
        }
        answer = ask_team(q, team, answer);
        if (team.lane == 0) {
            const bool counts = highest || q.what == OG_CUDA_COUNT;
            const bool yes = (answer != 0) != (q.what == OG_CUDA_OK);
            store_integer((char *)q.out + row * q.out_bytes, q.out_bytes,
                          counts ? (int64_t)answer : (int64_t)yes);
        }
    }
}

}  // namespace
}  // namespace og

extern "C" int
og_cuda_launch_push(const og_cuda_push *call, const og_cuda_place *place)
{
    const og::Push edit = {call->where, call->where_stride, call->slot};
    return og::launch_edit(call->rows, edit, place);
}

extern "C" int
og_cuda_launch_codes(const og_cuda_codes *call, const og_cuda_place *place)
{
    const og::Codes edit = {
        (const char *)call->codes, call->codes_stride, call->codes_bytes,
        call->is_signed,           call->location,     call->severities};
    return og::launch_edit(call->rows, edit, place);
}

extern "C" int
og_cuda_launch_clear(const og_cuda_clear *call, const og_cuda_place *place)
{
    const og::Clear edit = {call->code};
    return og::launch_edit(call->rows, edit, place);
}

extern "C" int
og_cuda_launch_merge(const og_cuda_merge *call, const og_cuda_place *place)
{
    og_cuda_rows rows = call->rows;
    size_t done = 0;
    do {
        og::Merge edit = {};
        while (edit.count < og::kOthersPerLaunch && done < call->count) {
            edit.others[edit.count++] = call->others[done++];
        }
        const int code = og::launch_edit(rows, edit, place);
        if (code != 0) {
            return code;
        }
        rows.from = rows.to;
        rows.from_stride = rows.to_stride;
    } while (done < call->count);
    return 0;
}

extern "C" int
og_cuda_launch_index(const og_cuda_index *call, const og_cuda_place *place)
{
    if (call->rows.samples == 0) {
        return 0;
    }
    return og::on_device(place, [&] {
        const og::Ids ids = {call->ids, call->size, (char *)call->clamped,
                             call->slot, call->is_signed};
        int lanes = og::lanes_for(call->ids.count, og::kWarp);
        if (call->ids.count > 8 * og::kWarp) {
            lanes = og::kThreads;
        }
        return og::launch(og::blocks_for(call->rows.samples, lanes), place,
                          og::check_ids, call->rows, ids, lanes);
    });
}

extern "C" int
og_cuda_launch_query(const og_cuda_query *call, const og_cuda_place *place)
{
    if (call->samples == 0) {
        return 0;
    }
    return og::on_device(place, [&] {
        const int lanes = og::lanes_for(call->capacity / 8, og::kWarp);
        return og::launch(og::blocks_for(call->samples, lanes), place,
                          og::query_rows, *call, lanes);
    });
}
