/* The instruction set: known words only, forcing goes down and never up. */
#define _POSIX_C_SOURCE 200112L /* setenv */
#include "core/cpu.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

static int
rank(const char *isa)
{
    const char *const tiers[] = {"scalar", "neon", "avx2", "avx512"};
    for (int i = 0; i < 4; i++) {
        if (strcmp(isa, tiers[i]) == 0) {
            return i;
        }
    }
    return -1;
}

int
main(void)
{
    unsetenv("OPGUARD_ISA");
    int best = rank(og_cpu_isa());
    CHECK(best >= 0);
    const char *const forced[] = {"scalar", "neon", "avx2", "avx512"};
    for (int i = 0; i < 4; i++) {
        setenv("OPGUARD_ISA", forced[i], 1);
        int got = rank(og_cpu_isa());
        CHECK(got >= 0 && got <= i && got <= best);
    }
    setenv("OPGUARD_ISA", "scalar", 1);
    CHECK(strcmp(og_cpu_isa(), "scalar") == 0);
    setenv("OPGUARD_ISA", "no such tier", 1);
    CHECK(rank(og_cpu_isa()) == best);
    return failures != 0;
}
