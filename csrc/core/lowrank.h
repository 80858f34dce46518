/* A low-rank product added to a matrix: what a LoRA does to one weight.
 *
 * out[i][j] = round(base[i][j] + sum over k of left[i][k] * right[k][j]): in
 * float32 from the base on, k upwards, and rounded once at the end, to the
 * nearest even. So two products one after the other, in float32, are the same
 * bits as both at once, and an element's bits depend on nothing but its own
 * row of left and column of right: not on threads or ranges. */
#ifndef OPGUARD_CORE_LOWRANK_H
#define OPGUARD_CORE_LOWRANK_H

#include "core/base.h"

#define OG_LOW_RANK_MOST 256

typedef enum og_low_rank_kind {
    OG_LOW_RANK_F32,
    OG_LOW_RANK_BF16,
    OG_LOW_RANK_F16,
    OG_LOW_RANK_KINDS
} og_low_rank_kind;

/* Rows lie together, at any distance; strides in elements. out may be base,
 * with the same stride, and overlaps nothing else. */
typedef struct og_low_rank {
    const void *base;
    void *out;
    const float *left;  /* rows, rank */
    const float *right; /* rank, columns */
    int64_t base_stride;
    int64_t out_stride;
    int64_t left_stride;
    int64_t right_stride;
    int64_t rows;
    int64_t columns;
    int64_t rank; /* 1..OG_LOW_RANK_MOST */
    og_low_rank_kind kind;
} og_low_rank;

/* Rows begin..end; any thread, others may be at other rows. */
void
og_low_rank_rows(const og_low_rank *call, int64_t begin, int64_t end);

/* Rows that are worth a thread of their own, at least 1. */
int64_t
og_low_rank_grain(const og_low_rank *call);

/* "avx512", "avx2" or "scalar": whose kernel runs here. */
const char *
og_low_rank_isa(void);

#endif
