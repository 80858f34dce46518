/* Detects the processor's instruction set. __builtin_cpu_supports also asks
 * the operating system whether it saves the wide registers. */
#include "core/cpu.h"

#include <stdlib.h>
#include <string.h>

/* Best last. */
static const char *const tiers[] = {"scalar", "neon", "avx2", "avx512"};

static bool
have_tier(size_t tier)
{
    switch (tier) {
#if defined(__x86_64__)
        case 2:
            return __builtin_cpu_supports("avx2");
        case 3:
            return __builtin_cpu_supports("avx512f") &&
                   __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512vl");
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
