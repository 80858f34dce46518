/* The low-rank kernel for AVX2 with FMA and F16C: 8 floats a vector. */
#include "core/lowrank_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define OG_VEC __m256
#define OG_LANES 8
#define OG_ROWS 6
#define OG_NAME og_low_rank_avx2

static inline OG_VEC
vec_set(float value)
{
    return _mm256_set1_ps(value);
}

static inline OG_VEC
vec_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

static inline OG_VEC
vec_fma(OG_VEC a, OG_VEC b, OG_VEC c)
{
    return _mm256_fmadd_ps(a, b, c);
}

static inline OG_VEC
vec_from(og_low_rank_kind kind, const char *p)
{
    if (kind == OG_LOW_RANK_F32) {
        return _mm256_loadu_ps((const float *)(const void *)p);
    }
    __m128i narrow = _mm_loadu_si128((const __m128i *)(const void *)p);
    if (kind == OG_LOW_RANK_F16) {
        return _mm256_cvtph_ps(narrow);
    }
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

/* To the nearest even; NaN keeps its sign and becomes quiet. */
static inline __m128i
to_bf16(OG_VEC value)
{
    __m256i bits = _mm256_castps_si256(value);
    __m256i upper = _mm256_srli_epi32(bits, 16);
    __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(
        bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan =
        _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    __m256i quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    __m256i all = _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), quiet, nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(all),
                            _mm256_extracti128_si256(all, 1));
}

static inline void
vec_to(og_low_rank_kind kind, char *p, OG_VEC value, bool stream)
{
    if (kind == OG_LOW_RANK_F32) {
        if (stream) {
            _mm256_stream_ps((float *)(void *)p, value);
        }
        else {
            _mm256_storeu_ps((float *)(void *)p, value);
        }
        return;
    }
    __m128i narrow = kind == OG_LOW_RANK_F16
                         ? _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT |
                                                      _MM_FROUND_NO_EXC)
                         : to_bf16(value);
    if (stream) {
        _mm_stream_si128((__m128i *)(void *)p, narrow);
    }
    else {
        _mm_storeu_si128((__m128i *)(void *)p, narrow);
    }
}

static inline void
vec_fence(void)
{
    _mm_sfence();
}

#include "core/lowrank_tile.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
