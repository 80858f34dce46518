/* Which instruction set this processor and its operating system offer, and
 * the kernels written for it. */
#ifndef OPGUARD_CORE_CPU_H
#define OPGUARD_CORE_CPU_H

#include "core/base.h"

/* "avx512", "avx2", "neon" or "scalar": the best tier that may be used here.
 * A static string; any thread. OPGUARD_ISA=scalar|avx2|... forces a lower
 * tier; a tier the machine lacks is not taken. */
const char *
og_cpu_isa(void);

struct og_kernels;

/* The kernels (kernels.h) of that tier, chosen at the first call and the same
 * ever after. A static table, never NULL; any thread. */
const struct og_kernels *
og_cpu_kernels(void);

#endif
