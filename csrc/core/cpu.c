/* Detects the processor's instruction set. __builtin_cpu_supports also asks
 * the operating system whether it saves the wide registers. */
#include "core/cpu.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/kernels.h"

/* Written once, by whoever asks first; those who race write the same. */
static _Atomic(const og_kernels *) chosen;

/* Best last. */
static const char *const tiers[] = {"scalar", "neon", "avx2", "avx512"};

static bool
have_tier(size_t tier)
{
    switch (tier) {
#if defined(__x86_64__)
        case 2:
            return __builtin_cpu_supports("avx2") &&
                   __builtin_cpu_supports("popcnt");
        case 3:
            return __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl") && have_tier(2);
#elif defined(__aarch64__)
        case 1:
            return true;
#endif
        default:
            return tier == 0;
    }
}

const char *
og_cpu_isa(void)
{
    const char *forced = getenv("OPGUARD_ISA");
    size_t limit = sizeof tiers / sizeof *tiers;
    for (size_t tier = 0; forced != NULL && tier < limit; tier++) {
        if (strcmp(forced, tiers[tier]) == 0) {
            limit = tier + 1;
        }
    }
    size_t best = limit - 1;
    while (best > 0 && !have_tier(best)) {
        best--;
    }
    return tiers[best];
}

static const og_kernels *
kernels_named(const char *isa)
{
    const og_kernels *const all[] = {
#if defined(__x86_64__)
        &og_kernels_avx512,
        &og_kernels_avx2,
#elif defined(__aarch64__)
        &og_kernels_neon,
#endif
        &og_kernels_scalar,
    };
    size_t count = sizeof all / sizeof *all, i = 0;
    while (i + 1 < count && strcmp(all[i]->isa, isa) != 0) {
        i++;
    }
    return all[i];
}

const og_kernels *
og_cpu_kernels(void)
{
    const og_kernels *kernels =
        atomic_load_explicit(&chosen, memory_order_acquire);
    if (!OG_LIKELY(kernels != NULL)) {
        kernels = kernels_named(og_cpu_isa());
        atomic_store_explicit(&chosen, kernels, memory_order_release);
    }
    return kernels;
}
