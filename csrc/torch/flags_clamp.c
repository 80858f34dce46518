/* Ids clamped into a contiguous tensor, in host memory. */
#include "torch/flags_read.h"

/* One line of ids; out lies contiguous. */
#define CLAMP_LINE(name, type)                                        \
    static void name(const void *from, int64_t stride, int64_t count, \
                     int64_t most, void *to)                          \
    {                                                                 \
        const type *ids = from;                                       \
        type *out = to;                                               \
        for (int64_t i = 0; i < count; i++) {                         \
            int64_t id = (int64_t)ids[i * stride];                    \
            id = id > most ? most : id;                               \
            out[i] = (type)(id < 0 ? 0 : id);                         \
        }                                                             \
    }

CLAMP_LINE(clamp_u8, uint8_t)
CLAMP_LINE(clamp_i8, int8_t)
CLAMP_LINE(clamp_i16, int16_t)
CLAMP_LINE(clamp_i32, int32_t)
CLAMP_LINE(clamp_i64, int64_t)

typedef void (*line_function)(const void *, int64_t, int64_t, int64_t, void *);

static line_function
line_of(og_id_kind kind)
{
    static const line_function lines[] = {
        [OG_ID_U8] = clamp_u8,   [OG_ID_I8] = clamp_i8,
        [OG_ID_I16] = clamp_i16, [OG_ID_I32] = clamp_i32,
        [OG_ID_I64] = clamp_i64,
    };
    return lines[kind];
}

static int64_t
bytes_of(og_id_kind kind)
{
    static const int64_t bytes[] = {
        [OG_ID_U8] = 1,  [OG_ID_I8] = 1,  [OG_ID_I16] = 2,
        [OG_ID_I32] = 4, [OG_ID_I64] = 8,
    };
    return bytes[kind];
}

/* Dimensions that come before the line: those from the last one backwards
 * which lie as one, `count` ids `step` apart. */
static int64_t
outer_dims(const og_tensor *ids, int64_t *count, int64_t *step)
{
    int64_t d = ids->ndim;
    *count = 1;
    *step = 0;
    for (; d > 0; d--) {
        /* The stride of a dimension of one says nothing. */
        if (ids->sizes[d - 1] == 1) {
            continue;
        }
        if (*count != 1 && ids->strides[d - 1] != *count * *step) {
            break;
        }
        *step = *count == 1 ? ids->strides[d - 1] : *step;
        *count *= ids->sizes[d - 1];
    }
    return d;
}

void
og_flags_clamp(const og_flags_index *call)
{
    const og_tensor *ids = &call->ids;
    if (!og_tensor_has_elements(ids)) {
        return; /* and strides that nobody has checked */
    }
    int64_t at[OG_SCAN_DIMS] = {0}, count, step, lines = 1, offset = 0;
    int64_t bytes = bytes_of(call->kind);
    int64_t outer = outer_dims(ids, &count, &step);
    int64_t most = call->size > 0 ? call->size - 1 : 0;
    char *to = call->clamped;
    for (int64_t d = 0; d < outer; d++) {
        lines *= ids->sizes[d];
    }
    for (int64_t i = 0; i < lines; i++) {
        const char *from = (const char *)ids->data + offset * bytes;
        line_of(call->kind)(from, step, count, most, to);
        to += count * bytes;
        for (int64_t d = outer - 1; d >= 0; d--) {
            offset += ids->strides[d];
            if (++at[d] < ids->sizes[d]) {
                break;
            }
            offset -= at[d] * ids->strides[d];
            at[d] = 0;
        }
    }
}
