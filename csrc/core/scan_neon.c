/* The scan's kernels for NEON (64-bit Arm): 16 bytes a vector. No maxima of 64
 * bits. What reads slots is the plain C, which is never far from fast. */
#include "core/kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <string.h>

#define OG_OPERATIONS(W, LANES)                                 \
    typedef uint##W##x##LANES##_t vec##W;                       \
    static inline vec##W load##W(const char *p)                 \
    {                                                           \
        vec##W x;                                               \
        memcpy(&x, p, sizeof x);                                \
        return x;                                               \
    }                                                           \
    static inline vec##W load_some##W(const char *p, int64_t n) \
    {                                                           \
        char some[16] = {0};                                    \
        memcpy(some, p, (size_t)n * (W / 8));                   \
        return load##W(some);                                   \
    }                                                           \
    static inline vec##W fill##W(uint64_t value)                \
    {                                                           \
        return vdupq_n_u##W((uint##W##_t)value);                \
    }                                                           \
    static inline vec##W gt_u##W(vec##W a, vec##W b)            \
    {                                                           \
        return vcgtq_u##W(a, b);                                \
    }                                                           \
    static inline vec##W ge_u##W(vec##W a, vec##W b)            \
    {                                                           \
        return vcgeq_u##W(a, b);                                \
    }                                                           \
    static inline vec##W eq##W(vec##W a, vec##W b)              \
    {                                                           \
        return vceqq_u##W(a, b);                                \
    }                                                           \
    static inline bool any##W(vec##W mask)                      \
    {                                                           \
        uint64x2_t halves;                                      \
        memcpy(&halves, &mask, sizeof halves);                  \
        return (halves[0] | halves[1]) != 0;                    \
    }

#define OG_SIGNED(W)                                                      \
    static inline vec##W smax##W(vec##W a, vec##W b)                      \
    {                                                                     \
        return vreinterpretq_u##W##_s##W(vmaxq_s##W(                      \
            vreinterpretq_s##W##_u##W(a), vreinterpretq_s##W##_u##W(b))); \
    }                                                                     \
    static inline vec##W umax##W(vec##W a, vec##W b)                      \
    {                                                                     \
        return vmaxq_u##W(a, b);                                          \
    }                                                                     \
    static inline vec##W gt_s##W(vec##W a, vec##W b)                      \
    {                                                                     \
        return vcgtq_s##W(vreinterpretq_s##W##_u##W(a),                   \
                          vreinterpretq_s##W##_u##W(b));                  \
    }                                                                     \
    static inline vec##W ge_s##W(vec##W a, vec##W b)                      \
    {                                                                     \
        return vcgeq_s##W(vreinterpretq_s##W##_u##W(a),                   \
                          vreinterpretq_s##W##_u##W(b));                  \
    }

/* A lane's findings go through memory: only what is not clean comes here. */
#define OG_SPREAD(W, LANES)                                                  \
    static inline void spread##W(uint8_t *bits, vec##W nan, vec##W positive, \
                                 vec##W negative, uint8_t keep)              \
    {                                                                        \
        vec##W all = (nan & fill##W(OG_FOUND_NAN)) |                         \
                     (positive & fill##W(OG_FOUND_POS_INF)) |                \
                     (negative & fill##W(OG_FOUND_NEG_INF));                 \
        uint##W##_t lanes[LANES];                                            \
        all &= fill##W(keep);                                                \
        memcpy(lanes, &all, sizeof lanes);                                   \
        for (int i = 0; i < LANES; i++) {                                    \
            bits[i] |= (uint8_t)lanes[i];                                    \
        }                                                                    \
    }

OG_OPERATIONS(8, 16)
OG_SIGNED(8)
OG_SPREAD(8, 16)
#define OG_W 8
#define OG_LANES 16
#define OG_VEC vec8
#define OG_MASK vec8
#include "core/scan_width.h"

OG_OPERATIONS(16, 8)
OG_SIGNED(16)
OG_SPREAD(16, 8)
#define OG_W 16
#define OG_LANES 8
#define OG_VEC vec16
#define OG_MASK vec16
#include "core/scan_width.h"

OG_OPERATIONS(32, 4)
OG_SIGNED(32)
OG_SPREAD(32, 4)
#define OG_W 32
#define OG_LANES 4
#define OG_VEC vec32
#define OG_MASK vec32
#include "core/scan_width.h"

OG_OPERATIONS(64, 2)
OG_SPREAD(64, 2)

/* Maxima of the halves: an upper half that is as great as Inf's says that
 * something is there, not what. */
static inline vec64
smax64(vec64 a, vec64 b)
{
    return vreinterpretq_u64_u32(
        smax32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
}

static inline vec64
umax64(vec64 a, vec64 b)
{
    return vreinterpretq_u64_u32(
        umax32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)));
}

static inline uint8_t
judge64(vec64 high, vec64 low, const og_format *f)
{
    const uint64_t sign = (uint64_t)1 << 31, upper = f->inf >> 32;
    vec32 positive = ge_s32(vreinterpretq_u32_u64(high), fill32(upper));
    vec32 negative = ge_u32(vreinterpretq_u32_u64(low), fill32(upper | sign));
    vec64 found = vreinterpretq_u64_u32(positive | negative);
    return any64(found & fill64(~(uint64_t)0 << 32)) ? OG_FOUND_UNSURE : 0;
}

#define OG_W 64
#define OG_LANES 2
#define OG_VEC vec64
#define OG_MASK vec64
#define OG_HALVES
#include "core/scan_width.h"

const og_kernels og_kernels_neon = {
    .isa = "neon",
    .fast = {fast8, fast16, fast32, fast64},
    .exact = {exact8, exact16, exact32, exact64},
    .each = {each8, each16, each32, each64},
    .outside = {outside8, outside16, outside32, outside64},
    .find = og_scalar_find_rows,
    .count = og_scalar_count_rows,
    .severity = og_scalar_severity_rows,
    .has = og_scalar_has,
};

#endif
