/* The low-rank kernel for AVX-512: 16 floats a vector. */
#include "core/lowrank_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                      \
    __attribute__((target("avx512f,avx512bw,avx512vl,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,fma,f16c")
#endif

#define OG_VEC __m512
#define OG_LANES 16
#define OG_ROWS 8
#define OG_NAME og_low_rank_avx512

static inline OG_VEC
vec_set(float value)
{
    return _mm512_set1_ps(value);
}

static inline OG_VEC
vec_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

static inline OG_VEC
vec_fma(OG_VEC a, OG_VEC b, OG_VEC c)
{
    return _mm512_fmadd_ps(a, b, c);
}

static inline OG_VEC
vec_from(og_low_rank_kind kind, const char *p)
{
    if (kind == OG_LOW_RANK_F32) {
        return _mm512_loadu_ps(p);
    }
    __m256i narrow = _mm256_loadu_si256((const __m256i *)(const void *)p);
    if (kind == OG_LOW_RANK_F16) {
        return _mm512_cvtph_ps(narrow);
    }
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

/* To the nearest even; NaN keeps its sign and becomes quiet. */
static inline __m256i
to_bf16(OG_VEC value)
{
    __m512i bits = _mm512_castps_si512(value);
    __m512i upper = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(
        bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m512i all = _mm512_srli_epi32(up, 16);
    all = _mm512_mask_or_epi32(all, nan, upper, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(all);
}

static inline void
vec_to(og_low_rank_kind kind, char *p, OG_VEC value, bool stream)
{
    if (kind == OG_LOW_RANK_F32) {
        if (stream) {
            _mm512_stream_ps((void *)p, value);
        }
        else {
            _mm512_storeu_ps(p, value);
        }
        return;
    }
    __m256i narrow = kind == OG_LOW_RANK_F16
                         ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT |
                                                      _MM_FROUND_NO_EXC)
                         : to_bf16(value);
    if (stream) {
        _mm256_stream_si256((__m256i *)(void *)p, narrow);
    }
    else {
        _mm256_storeu_si256((__m256i *)(void *)p, narrow);
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
