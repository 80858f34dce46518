/* The low-rank kernels, one an instruction set. */
#ifndef OPGUARD_CORE_LOWRANK_KERNELS_H
#define OPGUARD_CORE_LOWRANK_KERNELS_H

#include "core/lowrank.h"

/* stream: out is written past the caches. */
typedef void (*og_low_rank_fn)(const og_low_rank *call, int64_t begin,
                               int64_t end, bool stream);

void
og_low_rank_scalar(const og_low_rank *call, int64_t begin, int64_t end,
                   bool stream);
#if defined(__x86_64__)
void
og_low_rank_avx2(const og_low_rank *call, int64_t begin, int64_t end,
                 bool stream);
void
og_low_rank_avx512(const og_low_rank *call, int64_t begin, int64_t end,
                   bool stream);
#endif

#endif
