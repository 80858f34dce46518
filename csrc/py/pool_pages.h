/* The family of pool_pages.c: SpillMap, weights mapped from a file. */
#ifndef OPGUARD_PY_POOL_PAGES_H
#define OPGUARD_PY_POOL_PAGES_H

#include "py/family.h"

extern const og_family og_pool_pages_family;

#endif
