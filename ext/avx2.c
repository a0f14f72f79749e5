/* The avx2 kernel set: AVX2, FMA and F16C; floats of 8 lanes.
 *
 * Integer dots: vpmaddubsw multiplies unsigned by signed bytes, so the weight's sign moves to the
 * activation; both lie in [-127, 127], two products stay below 2^15 and nothing saturates.
 * Tolerance: docs/ARITHMETIC.md.
 */
#include "fl_kernels.h"

#ifdef FL_HAVE_X86

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define FN static inline __attribute__((always_inline)) TARGET
#define KERNEL static TARGET

enum { W = 8, DOT_T = 2, SUM_T = 2 };
typedef __m256 vf;

FN vf v_zero(void) { return _mm256_setzero_ps(); }
FN vf v_set1(float a) { return _mm256_set1_ps(a); }
FN vf v_load(const float *p) { return _mm256_loadu_ps(p); }
FN void v_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
FN vf v_add(vf a, vf b) { return _mm256_add_ps(a, b); }
FN vf v_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
FN vf v_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
FN vf v_div(vf a, vf b) { return _mm256_div_ps(a, b); }
FN vf v_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
FN vf v_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
FN vf v_max(vf a, vf b) { return _mm256_max_ps(a, b); }
FN vf v_min(vf a, vf b) { return _mm256_min_ps(a, b); }
FN vf v_round(vf a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FN float v_most(vf a)
{
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

FN vf v_pow2(vf n)
{
    __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

FN __m256i first_lanes(size_t n)
{
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lanes);
}

FN vf v_load_part(const float *p, size_t n)
{
    return n == W ? v_load(p) : _mm256_maskload_ps(p, first_lanes(n));
}

FN void v_store_part(float *p, vf a, size_t n)
{
    if (n == W)
        v_store(p, a);
    else
        _mm256_maskstore_ps(p, first_lanes(n), a);
}

FN __m128 fold(vf a) { return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); }

FN __m128 sum4(vf a, vf b, vf c, vf d)
{
    return _mm_hadd_ps(_mm_hadd_ps(fold(a), fold(b)), _mm_hadd_ps(fold(c), fold(d)));
}

FN void store4(float *out, __m128 sums, const int n)
{
    if (n == 4)
        _mm_storeu_ps(out, sums);
    else
        _mm_store_ss(out, sums);
}

/* ------------------------------------------------------------------------------------- weights */

FN vf load_f32(const uint8_t *p) { return _mm256_loadu_ps((const float *)p); }
FN vf load_f32_part(const uint8_t *p, size_t n) { return v_load_part((const float *)p, n); }
FN __m128i load_halves(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
FN __m128i load_halves_part(const uint8_t *p, size_t n)
{
    uint8_t bytes[16] = {0};
    memcpy(bytes, p, 2 * n);
    return load_halves(bytes);
}
FN vf widen_bf16(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
FN vf load_f16(const uint8_t *p) { return _mm256_cvtph_ps(load_halves(p)); }
FN vf load_f16_part(const uint8_t *p, size_t n) { return _mm256_cvtph_ps(load_halves_part(p, n)); }
FN vf load_bf16(const uint8_t *p) { return widen_bf16(load_halves(p)); }
FN vf load_bf16_part(const uint8_t *p, size_t n) { return widen_bf16(load_halves_part(p, n)); }

FN vf widen_i8(__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)); }
FN vf load_i8(const uint8_t *p) { return widen_i8(_mm_loadl_epi64((const __m128i *)p)); }

FN vf load_i4(const uint8_t *p, const int shift)
{
    __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
    __m256i levels =
        shift ? _mm256_srli_epi32(bytes, 4) : _mm256_and_si256(bytes, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(levels, _mm256_set1_epi32(8)));
}

FN vf load_scale(const uint8_t *p)
{
    int16_t half;
    memcpy(&half, p, 2);
    return _mm256_cvtph_ps(_mm_set1_epi16(half));
}

/* --------------------------------------------------------------------------------- integer dots */

enum { INT8_ZERO = 0, INT4_ZERO = 0 }; /* weights and activations are signed as they are */
typedef struct {
    __m256i w, magnitude;
} wi;
typedef __m256i xi;

FN wi w_int8(const uint8_t *p, const int groups)
{
    __m256i w = _mm256_loadu_si256((const __m256i *)p);
    return (wi){w, _mm256_abs_epi8(w)};
}

FN wi w_int4(const uint8_t *p, const int groups)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
    __m256i levels = _mm256_and_si256(both, _mm256_set1_epi8(15));
    __m256i w = _mm256_sub_epi8(levels, _mm256_set1_epi8(8));
    return (wi){w, _mm256_abs_epi8(w)};
}

FN xi x_int(const uint8_t *q, const int zero) { return _mm256_loadu_si256((const __m256i *)q); }

FN vf spread(vf v, const int k) { return _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(k)); }

FN vf w_dot(wi w, xi x)
{
    __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.w));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

/* -------------------------------------------------------------------------------- rows of bits */

/* A plane's 32 bits select bytes of q; two of them stay below 2^8 in magnitude. */
KERNEL void low_bit(const fl_acts *acts, const uint8_t *rows, size_t n_rows, size_t n_planes,
                    float *out)
{
    size_t plane = (size_t)acts->q_stride / 8, groups = ((size_t)acts->n_cols + 31) / 32;
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2,
                                            2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    const __m256i bit = _mm256_set1_epi64x((long long)0x8040201008040201);
    const __m256i ones = _mm256_set1_epi8(1);
    const __m256i below = _mm256_set1_epi16((int16_t)(1 - (1 << n_planes)));
    for (size_t r = 0; r < n_rows; r++, rows += n_planes * plane) {
        vf acc = v_zero();
        for (size_t g = 0; g < groups; g++) {
            __m256i q = _mm256_loadu_si256((const __m256i *)(acts->q + 32 * g));
            __m256i sum = _mm256_madd_epi16(_mm256_maddubs_epi16(ones, q), below);
            for (size_t p = 0; p < n_planes; p++) {
                int32_t bits;
                memcpy(&bits, rows + p * plane + 4 * g, 4);
                __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), spread);
                __m256i on = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
                __m256i pairs = _mm256_maddubs_epi16(ones, _mm256_and_si256(q, on));
                __m256i weight = _mm256_set1_epi16((int16_t)(2 << p));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, weight));
            }
            acc = v_fma(_mm256_cvtepi32_ps(sum), _mm256_broadcast_ss(acts->scales + g), acc);
        }
        out[r] = _mm_cvtss_f32(sum4(acc, acc, acc, acc));
    }
}

#include "fl_simd_rows.h"
#include "fl_simd_layers.h"
#include "fl_simd_rwkv.h"
#include "fl_simd_table.h"

const fl_kernel_set fl_avx2 = FL_SIMD_TABLE("avx2");

#endif
