/* The avx512 kernel set: AVX-512 F, BW, DQ, VL and VNNI; floats of 16 lanes.
 *
 * Integer dots: vpdpbusd, two groups of 32 in a vector.  Tolerance: docs/ARITHMETIC.md.
 */
#include "fl_kernels.h"

#ifdef FL_HAVE_X86

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET                                                                                     \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
#define FN static inline __attribute__((always_inline)) TARGET
#define KERNEL static TARGET

enum { W = 16, DOT_T = 4, SUM_T = 4 };
typedef __m512 vf;

FN vf v_zero(void) { return _mm512_setzero_ps(); }
FN vf v_set1(float a) { return _mm512_set1_ps(a); }
FN vf v_load(const float *p) { return _mm512_loadu_ps(p); }
FN void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
FN vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
FN vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
FN vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
FN vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
FN vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
FN vf v_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); }
FN vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
FN vf v_min(vf a, vf b) { return _mm512_min_ps(a, b); }
FN vf v_round(vf a) { return _mm512_roundscale_ps(a, 0); }
FN float v_most(vf a) { return _mm512_reduce_max_ps(a); }

FN vf v_pow2(vf n)
{
    __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

FN __mmask16 first_lanes(size_t n) { return (__mmask16)((1u << n) - 1); }

FN vf v_load_part(const float *p, size_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FN void v_store_part(float *p, vf a, size_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), a); }

FN __m128 fold(vf a)
{
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

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

FN vf load_f32(const uint8_t *p) { return _mm512_loadu_ps(p); }
FN vf load_f32_part(const uint8_t *p, size_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FN __m256i load_halves(const uint8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
FN __m256i load_halves_part(const uint8_t *p, size_t n)
{
    return _mm256_maskz_loadu_epi16(first_lanes(n), p);
}
FN vf widen_bf16(__m256i halves)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
FN vf load_f16(const uint8_t *p) { return _mm512_cvtph_ps(load_halves(p)); }
FN vf load_f16_part(const uint8_t *p, size_t n) { return _mm512_cvtph_ps(load_halves_part(p, n)); }
FN vf load_bf16(const uint8_t *p) { return widen_bf16(load_halves(p)); }
FN vf load_bf16_part(const uint8_t *p, size_t n) { return widen_bf16(load_halves_part(p, n)); }

FN vf widen_i8(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }
FN vf load_i8(const uint8_t *p) { return widen_i8(_mm_loadu_si128((const __m128i *)p)); }

/* A permutation looks at the low 4 bits of an index only: a table of the 16 levels. */
FN vf load_i4(const uint8_t *p, const int shift)
{
    const vf levels = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(bytes, 4) : bytes, levels);
}

FN vf load_scale(const uint8_t *p)
{
    int16_t half;
    memcpy(&half, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(half));
}

/* --------------------------------------------------------------------------------- integer dots */

/* vpdpbusd multiplies unsigned by signed bytes: weights are stored plus a zero point, and a lane
 * starts at minus that zero point times the sum of its 4 activations. */
enum { INT8_ZERO = 128, INT4_ZERO = 8 };
typedef __m512i wi;
typedef struct {
    __m512i x, minus;
} xi;

FN xi x_int(const uint8_t *q, const int zero)
{
    __m512i x = _mm512_loadu_si512(q);
    __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8((char)zero), x);
    return (xi){x, _mm512_sub_epi32(_mm512_setzero_si512(), sums)};
}

FN wi w_int8(const uint8_t *p, const int groups)
{
    __m512i w = groups == 2 ? _mm512_loadu_si512(p) : _mm512_zextsi256_si512(load_halves(p));
    return _mm512_xor_si512(w, _mm512_set1_epi8((char)128));
}

FN wi w_int4(const uint8_t *p, const int groups)
{
    __m128i one = _mm_loadu_si128((const __m128i *)p);
    __m256i both = groups == 2 ? load_halves(p) : _mm256_zextsi128_si256(one);
    __m512i twice =
        _mm512_shuffle_i64x2(_mm512_castsi256_si512(both), _mm512_castsi256_si512(both), 0x50);
    __m512i shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi64(twice, shifts), _mm512_set1_epi8(15));
}

FN vf w_dot(wi w, xi x) { return _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(x.minus, w, x.x)); }

FN vf spread(vf v, const int k)
{
    const __m512i pair = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_permutexvar_ps(_mm512_add_epi32(pair, _mm512_set1_epi32(2 * k)), v);
}

/* -------------------------------------------------------------------------------- rows of bits */

/* A plane's 64 bits are a mask of 2^(p + 1); activations lose their + 128 and are the signed side. */
KERNEL void low_bit(const fl_acts *acts, const uint8_t *rows, size_t n_rows, size_t n_planes,
                    float *out)
{
    enum { ROWS = 4 };
    size_t blocks = (size_t)acts->q_stride / 64, row_bytes = n_planes * blocks * 8;
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i below = _mm512_set1_epi32(-((1 << n_planes) - 1));
    for (size_t r = 0; r < n_rows; r += ROWS) {
        size_t some = n_rows - r < ROWS ? n_rows - r : ROWS;
        vf acc[ROWS] = {v_zero(), v_zero(), v_zero(), v_zero()};
        for (size_t b = 0; b < blocks; b++) {
            __m512i q = _mm512_loadu_si512(acts->q + 64 * b);
            __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, q);
            __m512i from = _mm512_mullo_epi32(sums, below);
            vf scale = spread(v_load_part(acts->scales + 2 * b, 2), 0);
            for (size_t i = 0; i < some; i++) {
                const uint8_t *at = rows + (r + i) * row_bytes + 8 * b;
                __m512i products = from;
                for (size_t p = 0; p < n_planes; p++, at += blocks * 8) {
                    uint64_t bits;
                    memcpy(&bits, at, 8);
                    __m512i weight = _mm512_maskz_set1_epi8(bits, (char)(2 << p));
                    products = _mm512_dpbusd_epi32(products, weight, q);
                }
                acc[i] = v_fma(_mm512_cvtepi32_ps(products), scale, acc[i]);
            }
        }
        for (size_t i = 0; i < some; i++)
            out[r + i] = _mm_cvtss_f32(sum4(acc[i], acc[i], acc[i], acc[i]));
    }
}

#include "fl_simd_rows.h"
#include "fl_avx512_many.h"
#include "fl_simd_layers.h"
#include "fl_simd_rwkv.h"
#include "fl_simd_table.h"

const fl_kernel_set fl_avx512 = FL_SIMD_TABLE(
    "avx512", .dot_many = {[FL_INT8] = many_int8, [FL_INT4] = many_int4},
    .sum_many = {many_sums_f32, many_sums_f16, many_sums_bf16, many_sums_int8, many_sums_int4}, .pack_many = pack_tokens);

#endif
