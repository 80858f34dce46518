/* What every layer shares: the status codes, the error buffer, and a few
 * compiler words. Plain C11: no Python, no torch, no CUDA. */
#ifndef OPGUARD_CORE_BASE_H
#define OPGUARD_CORE_BASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define OG_EXPORT __attribute__((visibility("default")))
#define OG_PRINTF(at, from) __attribute__((format(printf, at, from)))
#define OG_LIKELY(x) __builtin_expect(!!(x), 1)
/* Laid out with the others of its kind: what a short road needs lies close,
 * and ways that end in cold functions lie elsewhere. */
#define OG_HOT __attribute__((hot))
#define OG_COLD __attribute__((cold))
#else
#define OG_EXPORT
#define OG_PRINTF(at, from)
#define OG_LIKELY(x) (x)
#define OG_HOT
#define OG_COLD
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* 0 is success, everything else is negative and comes with an og_error. */
typedef enum og_status {
    OG_OK = 0,
    OG_NO_MEMORY = -1,
    OG_BAD_ARGUMENT = -2,
    OG_TORCH_FAILED = -3,
    OG_CUDA_FAILED = -4,
    OG_NOT_FOUND = -5,
    /* Of flags, apart from other bad arguments: Python has a class of its own
     * for each. */
    OG_BAD_LOCATION = -6,
    OG_BAD_CODE = -7,
    OG_BAD_SEVERITY = -8,
    OG_BAD_LAYOUT = -9,
    OG_BAD_BATCH = -10,
} og_status;

/* Owned by the caller; filled only when a function returns an error. */
typedef struct og_error {
    og_status status;
    char message[252];
} og_error;

/* Fills err (may be NULL) and returns status, so that a failing function can
 * end with `return og_fail(err, OG_..., "...")`. Long texts are cut. */
OG_COLD og_status
og_fail(og_error *err, og_status status, const char *format, ...)
    OG_PRINTF(3, 4);

#ifdef __cplusplus
}
#endif
#endif
