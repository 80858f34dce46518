/* Which instruction set this processor and its operating system offer. */
#ifndef OPGUARD_CORE_CPU_H
#define OPGUARD_CORE_CPU_H

#include "core/base.h"

/* "avx512", "avx2", "neon" or "scalar": the best tier that may be used here.
 * A static string; any thread. OPGUARD_ISA=scalar|avx2|... forces a lower
 * tier; a tier the machine lacks is not taken. */
const char *
og_cpu_isa(void);

#endif
