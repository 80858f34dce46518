/* Which low-rank kernel runs, and the one for any processor. */
#include "core/lowrank.h"

#include <math.h>
#include <string.h>

#include "core/cpu.h"
#include "core/kernels.h"
#include "core/lowrank_kernels.h"

enum {
    PIECE = 256,                /* columns summed at a time, on the stack */
    GRAIN_OPERATIONS = 1 << 20, /* some 50 us */
    STREAM_ELEMENTS = 1 << 18,  /* less may still be in a cache when read */
};

/* --- Conversions --------------------------------------------------------- */

static float
float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint32_t
bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static uint16_t
to_bf16(float value)
{
    uint32_t bits = bits_of(value);
    if (value != value) {
        return (uint16_t)(bits >> 16 | 0x40);
    }
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float
from_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) {
        return float_of(sign | 0x7F800000 | fraction << 13);
    }
    if (exponent == 0) { /* a multiple of 2**-24 */
        float small = (float)fraction * 0x1p-24F;
        return sign != 0 ? -small : small;
    }
    return float_of(sign | (exponent + 112) << 23 | fraction << 13);
}

static uint16_t
to_f16(float value)
{
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000;
    uint32_t rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) {
        return (uint16_t)(sign | 0x7E00 | (rest >> 13 & 1023));
    }
    if (rest >= 0x477FF000) { /* 65520 and above */
        return (uint16_t)(sign | 0x7C00);
    }
    if (rest < 0x38800000) { /* below 2**-14: the sum rounds to 2**-24 */
        return (uint16_t)(sign |
                          (bits_of(float_of(rest) + 0.5F) - 0x3F000000));
    }
    rest += 0xFFF + (rest >> 13 & 1);
    return (uint16_t)(sign | (rest - 0x38000000) >> 13);
}

/* --- The kernel for any processor ---------------------------------------- */

static inline float
multiply_add(float a, float b, float c)
{
#if defined(__FP_FAST_FMAF)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static void
read_some(const og_low_rank *call, int64_t at, int64_t n, float *to)
{
    if (call->kind == OG_LOW_RANK_F32) {
        memcpy(to, (const float *)call->base + at, (size_t)n * sizeof *to);
        return;
    }
    const uint16_t *from = (const uint16_t *)call->base + at;
    bool brain = call->kind == OG_LOW_RANK_BF16;
    for (int64_t j = 0; j < n; j++) {
        to[j] = brain ? float_of((uint32_t)from[j] << 16) : from_f16(from[j]);
    }
}

static void
write_some(const og_low_rank *call, int64_t at, int64_t n, const float *from)
{
    if (call->kind == OG_LOW_RANK_F32) {
        memcpy((float *)call->out + at, from, (size_t)n * sizeof *from);
        return;
    }
    uint16_t *to = (uint16_t *)call->out + at;
    bool brain = call->kind == OG_LOW_RANK_BF16;
    for (int64_t j = 0; j < n; j++) {
        to[j] = brain ? to_bf16(from[j]) : to_f16(from[j]);
    }
}

void
og_low_rank_scalar(const og_low_rank *call, int64_t begin, int64_t end,
                   bool stream)
{
    (void)stream;
    float sum[PIECE];
    for (int64_t i = begin; i < end; i++) {
        const float *left = call->left + i * call->left_stride;
        for (int64_t c = 0; c < call->columns; c += PIECE) {
            int64_t n = call->columns - c < PIECE ? call->columns - c : PIECE;
            read_some(call, i * call->base_stride + c, n, sum);
            for (int64_t k = 0; k < call->rank; k++) {
                const float *right = call->right + k * call->right_stride + c;
                const float factor = left[k];
                for (int64_t j = 0; j < n; j++) {
                    sum[j] = multiply_add(factor, right[j], sum[j]);
                }
            }
            write_some(call, i * call->out_stride + c, n, sum);
        }
    }
}

/* --- Choosing ------------------------------------------------------------ */

static og_low_rank_fn
kernel(void)
{
#if defined(__x86_64__)
    const char *isa = og_cpu_kernels()->isa;
    if (__builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        if (strcmp(isa, "avx512") == 0) {
            return og_low_rank_avx512;
        }
        if (strcmp(isa, "avx2") == 0) {
            return og_low_rank_avx2;
        }
    }
#endif
    return og_low_rank_scalar;
}

const char *
og_low_rank_isa(void)
{
    og_low_rank_fn run = kernel();
#if defined(__x86_64__)
    if (run == og_low_rank_avx512) {
        return "avx512";
    }
    if (run == og_low_rank_avx2) {
        return "avx2";
    }
#endif
    return run == og_low_rank_scalar ? "scalar" : "";
}

/* Whole lines of memory written past the caches: where they are not read
 * soon, and are not what was just read. */
static bool
worth_streaming(const og_low_rank *call)
{
    const uintptr_t bytes = call->kind == OG_LOW_RANK_F32 ? 4 : 2;
    return call->out != call->base &&
           call->rows * call->columns >= STREAM_ELEMENTS &&
           (uintptr_t)call->out % 64 == 0 &&
           (uintptr_t)call->out_stride * bytes % 64 == 0;
}

void
og_low_rank_rows(const og_low_rank *call, int64_t begin, int64_t end)
{
    if (begin < end && call->columns > 0) {
        kernel()(call, begin, end, worth_streaming(call));
    }
}

int64_t
og_low_rank_grain(const og_low_rank *call)
{
    int64_t each = (call->columns > 0 ? call->columns : 1) * (call->rank + 16);
    int64_t rows = GRAIN_OPERATIONS / each;
    return rows < 1 ? 1 : rows;
}
