/* Runs a test once for each instruction set of this machine, each in a
 * process of its own, because the kernels are chosen once a process. The file
 * that includes it defines _DEFAULT_SOURCE before anything else. */
#ifndef OPGUARD_TESTS_TIERS_H
#define OPGUARD_TESTS_TIERS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/cpu.h"
#include "core/kernels.h"

#include "check.h"

static int
for_each_tier(void (*test)(void))
{
    const char *const tiers[] = {"scalar", "neon", "avx2", "avx512"};
    int bad = 0, seen = 0;
    for (int i = 0; i < 4; i++) {
        setenv("OPGUARD_ISA", tiers[i], 1);
        if (strcmp(og_cpu_isa(), tiers[i]) != 0) {
            continue; /* this machine has not got it */
        }
        pid_t child = fork();
        if (child == 0) {
            CHECK(strcmp(og_cpu_kernels()->isa, tiers[i]) == 0);
            test();
            exit(failures != 0);
        }
        int status = 0;
        seen++;
        if (child < 0 || waitpid(child, &status, 0) != child ||
            !WIFEXITED(status) || WEXITSTATUS(status) != 0) {
            fprintf(stderr, "failed with OPGUARD_ISA=%s\n", tiers[i]);
            bad++;
        }
    }
    return bad != 0 || seen == 0;
}

static uint64_t random_state = 0x9E3779B97F4A7C15u;

static uint64_t
next_random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state * 0x2545F4914F6CDD1Du >> 8;
}

/* 0..n-1 */
static int64_t
below(int64_t n)
{
    return (int64_t)(next_random() % (uint64_t)n);
}

#endif
