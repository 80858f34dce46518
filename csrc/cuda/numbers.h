/* Which of 16 bytes of numbers are NaN or Inf, by integer compares alone.
 *
 * A cheap test says whether anything may be there; only then are the numbers
 * judged one by one, out of the registers they are in. For .cu files. */
#ifndef OPGUARD_CUDA_NUMBERS_H
#define OPGUARD_CUDA_NUMBERS_H

#include "cuda/device.h"

namespace og {

const unsigned kNan = 1, kPositive = 2, kNegative = 4;

/* The format with its patterns repeated over words: index 0 for even words,
 * 1 for odd ones, which differ where a number takes two. */
struct Numbers {
    og_cuda_format format;
    uint32_t exponent[2]; /* all ones in a number that is to be judged */
    uint32_t lowest[2];   /* the exponent's lowest bit: it then carries ... */
    uint32_t carry[2];    /* ... into this one */
    uint32_t flip;
};

OG_HOST uint64_t
repeated(uint64_t pattern, int bytes)
{
    for (int width = 8 * bytes; width < 64; width *= 2) {
        pattern |= pattern << width;
    }
    return pattern;
}

OG_HOST Numbers
numbers_of(const og_cuda_format &format)
{
    const uint64_t ones = format.infinite ? format.top : format.magnitude;
    const uint64_t sign = (uint64_t)1 << (8 * format.bytes - 1);
    const uint64_t exponent = repeated(ones, format.bytes);
    const uint64_t lowest = repeated(ones & (~ones + 1), format.bytes);
    const uint64_t carry = repeated(sign, format.bytes);
    Numbers n = {};
    n.format = format;
    for (int odd = 0; odd < 2; odd++) {
        n.exponent[odd] = (uint32_t)(exponent >> 32 * odd);
        n.lowest[odd] = (uint32_t)(lowest >> 32 * odd);
        n.carry[odd] = (uint32_t)(carry >> 32 * odd);
    }
    n.flip = (uint32_t)repeated(format.flip, format.bytes);
    return n;
}

/* Makes the cheap test say yes to everything. */
OG_HOST void
suspect_all(Numbers *n)
{
    for (int odd = 0; odd < 2; odd++) {
        n->exponent[odd] = 0;
        n->lowest[odd] = n->carry[odd];
    }
}

/* Non-zero under the carry mask where a number of the word may count. A word
 * of zeros never does. */
template <bool kWhole>
OG_DEVICE uint32_t
suspicion(const Numbers &n, uint32_t word, int odd)
{
    if (kWhole) {
        /* bit 7 of each byte that is all ones once flipped */
        const uint32_t rest = ~(word ^ n.flip);
        const uint32_t low = (rest & 0x7F7F7F7Fu) + 0x7F7F7F7Fu;
        return ~(low | rest);
    }
    return (word & n.exponent[odd]) + n.lowest[odd];
}

template <bool kWhole>
OG_DEVICE bool
suspicious(const Numbers &n, const uint4 &a, const uint4 &b, const uint4 &c,
           const uint4 &d)
{
    const uint32_t even =
        suspicion<kWhole>(n, a.x, 0) | suspicion<kWhole>(n, a.z, 0) |
        suspicion<kWhole>(n, b.x, 0) | suspicion<kWhole>(n, b.z, 0) |
        suspicion<kWhole>(n, c.x, 0) | suspicion<kWhole>(n, c.z, 0) |
        suspicion<kWhole>(n, d.x, 0) | suspicion<kWhole>(n, d.z, 0);
    const uint32_t odd =
        suspicion<kWhole>(n, a.y, 1) | suspicion<kWhole>(n, a.w, 1) |
        suspicion<kWhole>(n, b.y, 1) | suspicion<kWhole>(n, b.w, 1) |
        suspicion<kWhole>(n, c.y, 1) | suspicion<kWhole>(n, c.w, 1) |
        suspicion<kWhole>(n, d.y, 1) | suspicion<kWhole>(n, d.w, 1);
    return ((even & n.carry[0]) | (odd & n.carry[1])) != 0;
}

OG_DEVICE unsigned
judge(const og_cuda_format &format, uint64_t number)
{
    const uint64_t m = (number ^ format.flip) & format.magnitude;
    if (m > format.top) {
        return kNan;
    }
    if (m == format.top && format.infinite) {
        return number >> (8 * format.bytes - 1) & 1 ? kNegative : kPositive;
    }
    return 0;
}

/* Numbers that lie side by side in 8 bytes. */
OG_DEVICE unsigned
judge_pair(const og_cuda_format &format, uint32_t low, uint32_t high)
{
    const uint64_t all = (uint64_t)high << 32 | low;
    const int width = 8 * format.bytes;
    const uint64_t one = ~(uint64_t)0 >> (64 - width);
    unsigned found = 0;
    for (int at = 0; at < 64; at += width) {
        found |= judge(format, all >> at & one);
    }
    return found;
}

OG_DEVICE unsigned
judge_vector(const og_cuda_format &format, const uint4 &v)
{
    return judge_pair(format, v.x, v.y) | judge_pair(format, v.z, v.w);
}

template <bool kWhole>
OG_DEVICE unsigned
judge_four(const Numbers &n, const uint4 &a, const uint4 &b, const uint4 &c,
           const uint4 &d)
{
    if (!suspicious<kWhole>(n, a, b, c, d)) {
        return 0;
    }
    return judge_vector(n.format, a) | judge_vector(n.format, b) |
           judge_vector(n.format, c) | judge_vector(n.format, d);
}

/* One number, its other bytes zero. */
OG_DEVICE uint64_t
load_number(const char *at, int bytes)
{
    switch (bytes) {
        case 1:
            return __ldcg((const unsigned char *)at);
        case 2:
            return __ldcg((const unsigned short *)at);
        case 4:
            return __ldcg((const unsigned int *)at);
        default:
            return __ldcg((const unsigned long long *)at);
    }
}

/* 16 bytes, or one number in a vector of zeros. Read past the first cache,
 * which a single pass has no use for, and kept in the second, where the next
 * layer will look for them. */
OG_DEVICE uint4
load_unit(const char *at, int bytes)
{
    if (bytes == 16) {
        return __ldcg((const uint4 *)at);
    }
    const uint64_t number = load_number(at, bytes);
    return make_uint4((unsigned)number, (unsigned)(number >> 32), 0, 0);
}

}  // namespace og

#endif
