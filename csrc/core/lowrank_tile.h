/* The low-rank kernel over tiles that stay in registers, for one instruction
 * set. Whoever includes it defines before:
 *
 * OG_VEC, OG_LANES, OG_ROWS: floats of a vector, and rows of a tile
 * OG_NAME: the function
 * vec_set(float), vec_load(const float *), vec_fma(a, b, c)
 * vec_from(kind, const char *) and vec_to(kind, char *, vec, stream)
 * vec_fence(): after streaming
 *
 * right is copied into panels first, so that what a tile reads lies together:
 * rows of it a power of two apart would fall into the same few lines of the
 * cache. */
#include <string.h>

#include "core/lowrank_kernels.h"

#define ALWAYS static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

enum {
    VECTORS = 2,
    COLUMNS = VECTORS * OG_LANES, /* of a tile */
    /* Floats of right at a time: about what the nearest cache holds. */
    PANEL = 32 * OG_LOW_RANK_MOST,
};

typedef struct tile {
    const float *left; /* of its first row */
    int64_t left_stride;
    const float *right; /* rank, COLUMNS */
    int64_t rank;
    const char *base;
    int64_t base_step; /* bytes to the next row */
    char *out;
    int64_t out_step;
} tile;

/* kind, rows and stream are constants where this is inlined. */
ALWAYS void
tile_run(const tile *t, og_low_rank_kind kind, int rows, bool stream)
{
    const int64_t bytes = kind == OG_LOW_RANK_F32 ? 4 : 2;
    OG_VEC sum[OG_ROWS][VECTORS];
    UNROLLED
    for (int i = 0; i < rows; i++) {
        UNROLLED
        for (int v = 0; v < VECTORS; v++) {
            sum[i][v] = vec_from(
                kind, t->base + i * t->base_step + v * OG_LANES * bytes);
        }
    }
    const float *left = t->left, *right = t->right;
    for (int64_t k = 0; k < t->rank; k++, left++, right += COLUMNS) {
        OG_VEC factors[VECTORS];
        UNROLLED
        for (int v = 0; v < VECTORS; v++) {
            factors[v] = vec_load(right + v * OG_LANES);
        }
        UNROLLED
        for (int i = 0; i < rows; i++) {
            OG_VEC factor = vec_set(left[i * t->left_stride]);
            UNROLLED
            for (int v = 0; v < VECTORS; v++) {
                sum[i][v] = vec_fma(factor, factors[v], sum[i][v]);
            }
        }
    }
    UNROLLED
    for (int i = 0; i < rows; i++) {
        UNROLLED
        for (int v = 0; v < VECTORS; v++) {
            vec_to(kind, t->out + i * t->out_step + v * OG_LANES * bytes,
                   sum[i][v], stream);
        }
    }
}

/* A tile of fewer columns than COLUMNS, by way of a whole one. */
ALWAYS void
tile_edge(const tile *t, og_low_rank_kind kind, int rows, int64_t columns)
{
    const int64_t bytes = kind == OG_LOW_RANK_F32 ? 4 : 2;
    const int64_t step = COLUMNS * bytes;
    char whole[OG_ROWS * COLUMNS * 4] = {0};
    tile edge = *t;
    for (int i = 0; i < rows; i++) {
        memcpy(whole + i * step, t->base + i * t->base_step,
               (size_t)(columns * bytes));
    }
    edge.base = edge.out = whole;
    edge.base_step = edge.out_step = step;
    tile_run(&edge, kind, rows, false);
    for (int i = 0; i < rows; i++) {
        memcpy(t->out + i * t->out_step, whole + i * step,
               (size_t)(columns * bytes));
    }
}

/* Columns from..from+n of right, as tiles with zeros behind. */
static void
pack(const og_low_rank *call, int64_t from, int64_t n, float *panel)
{
    for (int64_t j = 0; j < n; j += COLUMNS) {
        int64_t some = n - j < COLUMNS ? n - j : COLUMNS;
        for (int64_t k = 0; k < call->rank; k++, panel += COLUMNS) {
            memset(panel + some, 0, (size_t)(COLUMNS - some) * sizeof *panel);
            memcpy(panel, call->right + k * call->right_stride + from + j,
                   (size_t)some * sizeof *panel);
        }
    }
}

/* Some rows of a tile by the columns of a panel. */
ALWAYS void
strip(tile t, og_low_rank_kind kind, int rows, int64_t columns, bool stream)
{
    const int64_t bytes = kind == OG_LOW_RANK_F32 ? 4 : 2;
    int64_t j = 0;
    for (; j + COLUMNS <= columns; j += COLUMNS) {
        tile_run(&t, kind, rows, stream);
        t.base += COLUMNS * bytes;
        t.out += COLUMNS * bytes;
        t.right += t.rank * COLUMNS;
    }
    if (j < columns) {
        tile_edge(&t, kind, rows, columns - j);
    }
}

ALWAYS void
matrix(const og_low_rank *call, int64_t begin, int64_t end,
       og_low_rank_kind kind, bool stream)
{
    _Alignas(64) float panel[PANEL];
    const int64_t bytes = kind == OG_LOW_RANK_F32 ? 4 : 2;
    const int64_t step = PANEL / call->rank / COLUMNS * COLUMNS;
    for (int64_t c = 0; c < call->columns; c += step) {
        int64_t n = call->columns - c < step ? call->columns - c : step;
        pack(call, c, n, panel);
        for (int64_t i = begin; i < end;) {
            tile t = {
                .left = call->left + i * call->left_stride,
                .left_stride = call->left_stride,
                .right = panel,
                .rank = call->rank,
                .base = (const char *)call->base +
                        (i * call->base_stride + c) * bytes,
                .base_step = call->base_stride * bytes,
                .out = (char *)call->out + (i * call->out_stride + c) * bytes,
                .out_step = call->out_stride * bytes,
            };
            if (end - i >= OG_ROWS) {
                strip(t, kind, OG_ROWS, n, stream);
                i += OG_ROWS;
            }
            else {
                strip(t, kind, 1, n, stream);
                i++;
            }
        }
    }
    if (stream) {
        vec_fence();
    }
}

#define OG_MATRIX(SUFFIX, KIND, STREAM)                                 \
    static void matrix_##SUFFIX(const og_low_rank *call, int64_t begin, \
                                int64_t end)                            \
    {                                                                   \
        matrix(call, begin, end, KIND, STREAM);                         \
    }
OG_MATRIX(f32, OG_LOW_RANK_F32, false)
OG_MATRIX(bf16, OG_LOW_RANK_BF16, false)
OG_MATRIX(f16, OG_LOW_RANK_F16, false)
OG_MATRIX(f32_past, OG_LOW_RANK_F32, true)
OG_MATRIX(bf16_past, OG_LOW_RANK_BF16, true)
OG_MATRIX(f16_past, OG_LOW_RANK_F16, true)
#undef OG_MATRIX

void
OG_NAME(const og_low_rank *call, int64_t begin, int64_t end, bool stream)
{
    static void (*const all[OG_LOW_RANK_KINDS][2])(const og_low_rank *,
                                                   int64_t, int64_t) = {
        [OG_LOW_RANK_F32] = {matrix_f32, matrix_f32_past},
        [OG_LOW_RANK_BF16] = {matrix_bf16, matrix_bf16_past},
        [OG_LOW_RANK_F16] = {matrix_f16, matrix_f16_past},
    };
    all[call->kind][stream](call, begin, end);
}
