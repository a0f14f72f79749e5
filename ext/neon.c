/* The neon kernel set: ARMv8.2 with dot products; floats of 8 lanes in two registers, so that
 * lanes, groups and trees are those of avx2.
 *
 * Integer dots: sdot adds 4 signed products to an int32 lane, exact.  Tolerance:
 * docs/ARITHMETIC.md.
 */
#include "fl_kernels.h"

#ifdef FL_HAVE_NEON

#include <arm_neon.h>
#include <math.h>
#include <string.h>

#if defined(__clang__)
#define TARGET __attribute__((target("dotprod")))
#else
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#endif
#define FN static inline __attribute__((always_inline)) TARGET
#define KERNEL static TARGET

enum { W = 8, DOT_T = 2, SUM_T = 2 };
typedef struct {
    float32x4_t lo, hi;
} vf;

#define BOTH(CALL_LO, CALL_HI) ((vf){CALL_LO, CALL_HI})

FN vf v_set1(float a) { return BOTH(vdupq_n_f32(a), vdupq_n_f32(a)); }
FN vf v_zero(void) { return v_set1(0); }
FN vf v_load(const float *p) { return BOTH(vld1q_f32(p), vld1q_f32(p + 4)); }
FN vf v_add(vf a, vf b) { return BOTH(vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)); }
FN vf v_sub(vf a, vf b) { return BOTH(vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)); }
FN vf v_mul(vf a, vf b) { return BOTH(vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)); }
FN vf v_div(vf a, vf b) { return BOTH(vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)); }
FN vf v_max(vf a, vf b) { return BOTH(vmaxq_f32(a.lo, b.lo), vmaxq_f32(a.hi, b.hi)); }
FN vf v_min(vf a, vf b) { return BOTH(vminq_f32(a.lo, b.lo), vminq_f32(a.hi, b.hi)); }
FN vf v_round(vf a) { return BOTH(vrndnq_f32(a.lo), vrndnq_f32(a.hi)); }
FN float v_most(vf a) { return vmaxvq_f32(vmaxq_f32(a.lo, a.hi)); }

FN vf v_fma(vf a, vf b, vf c)
{
    return BOTH(vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi));
}

FN vf v_fnma(vf a, vf b, vf c)
{
    return BOTH(vfmsq_f32(c.lo, a.lo, b.lo), vfmsq_f32(c.hi, a.hi, b.hi));
}

FN void v_store(float *p, vf a)
{
    vst1q_f32(p, a.lo);
    vst1q_f32(p + 4, a.hi);
}

FN float32x4_t pow2_of(float32x4_t n)
{
    int32x4_t biased = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
    return vreinterpretq_f32_s32(vshlq_n_s32(biased, 23));
}

FN vf v_pow2(vf n) { return BOTH(pow2_of(n.lo), pow2_of(n.hi)); }

FN vf v_load_part(const float *p, size_t n)
{
    if (n == W) return v_load(p);
    float lanes[W] = {0};
    memcpy(lanes, p, n * sizeof *lanes);
    return v_load(lanes);
}

FN void v_store_part(float *p, vf a, size_t n)
{
    if (n == W) {
        v_store(p, a);
        return;
    }
    float lanes[W];
    v_store(lanes, a);
    memcpy(p, lanes, n * sizeof *lanes);
}

FN float32x4_t fold(vf a) { return vaddq_f32(a.lo, a.hi); }

FN float32x4_t sum4(vf a, vf b, vf c, vf d)
{
    return vpaddq_f32(vpaddq_f32(fold(a), fold(b)), vpaddq_f32(fold(c), fold(d)));
}

FN void store4(float *out, float32x4_t sums, const int n)
{
    if (n == 4)
        vst1q_f32(out, sums);
    else
        vst1q_lane_f32(out, sums, 0);
}

/* ------------------------------------------------------------------------------------- weights */

FN vf load_f32(const uint8_t *p) { return v_load((const float *)p); }
FN vf load_f32_part(const uint8_t *p, size_t n) { return v_load_part((const float *)p, n); }
FN uint16x8_t load_halves(const uint8_t *p) { return vld1q_u16((const uint16_t *)p); }
FN uint16x8_t load_halves_part(const uint8_t *p, size_t n)
{
    uint8_t bytes[16] = {0};
    memcpy(bytes, p, 2 * n);
    return load_halves(bytes);
}

FN vf widen_f16(uint16x8_t halves)
{
    float16x8_t h = vreinterpretq_f16_u16(halves);
    return BOTH(vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h));
}

FN vf widen_bf16(uint16x8_t halves)
{
    uint32x4_t lo = vshll_n_u16(vget_low_u16(halves), 16), hi = vshll_high_n_u16(halves, 16);
    return BOTH(vreinterpretq_f32_u32(lo), vreinterpretq_f32_u32(hi));
}

FN vf load_f16(const uint8_t *p) { return widen_f16(load_halves(p)); }
FN vf load_f16_part(const uint8_t *p, size_t n) { return widen_f16(load_halves_part(p, n)); }
FN vf load_bf16(const uint8_t *p) { return widen_bf16(load_halves(p)); }
FN vf load_bf16_part(const uint8_t *p, size_t n) { return widen_bf16(load_halves_part(p, n)); }

FN vf widen_i8(int8x8_t bytes)
{
    int16x8_t wide = vmovl_s8(bytes);
    return BOTH(vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_high_s16(wide)));
}

FN vf load_i8(const uint8_t *p) { return widen_i8(vld1_s8((const int8_t *)p)); }

FN vf load_i4(const uint8_t *p, const int shift)
{
    uint8x8_t bytes = vld1_u8(p);
    uint8x8_t levels = shift ? vshr_n_u8(bytes, 4) : vand_u8(bytes, vdup_n_u8(15));
    return widen_i8(vsub_s8(vreinterpret_s8_u8(levels), vdup_n_s8(8)));
}

FN vf load_scale(const uint8_t *p)
{
    uint16_t half;
    memcpy(&half, p, 2);
    float32x4_t wide = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half)));
    return BOTH(wide, wide);
}

/* --------------------------------------------------------------------------------- integer dots */

enum { INT8_ZERO = 0, INT4_ZERO = 0 }; /* weights and activations are signed as they are */
typedef struct {
    int8x16_t lo, hi;
} wi;
typedef wi xi;

FN wi w_int8(const uint8_t *p, const int groups)
{
    return (wi){vld1q_s8((const int8_t *)p), vld1q_s8((const int8_t *)p + 16)};
}

FN wi w_int4(const uint8_t *p, const int groups)
{
    uint8x16_t bytes = vld1q_u8(p);
    int8x16_t lo = vreinterpretq_s8_u8(vandq_u8(bytes, vdupq_n_u8(15)));
    int8x16_t hi = vreinterpretq_s8_u8(vshrq_n_u8(bytes, 4));
    return (wi){vsubq_s8(lo, vdupq_n_s8(8)), vsubq_s8(hi, vdupq_n_s8(8))};
}

FN xi x_int(const uint8_t *q, const int zero) { return w_int8(q, 1); }

FN vf spread(vf v, const int k)
{
    float32x4_t one = vdupq_n_f32(k < 4 ? v.lo[k % 4] : v.hi[k % 4]);
    return BOTH(one, one);
}

FN vf w_dot(wi w, xi x)
{
    return BOTH(vcvtq_f32_s32(vdotq_s32(vdupq_n_s32(0), w.lo, x.lo)),
                vcvtq_f32_s32(vdotq_s32(vdupq_n_s32(0), w.hi, x.hi)));
}

/* Rows of bits: not worth instructions of their own yet. */
KERNEL void low_bit(const fl_acts *acts, const uint8_t *rows, size_t n_rows, size_t n_planes,
                    float *out)
{
    fl_serial_low_bit(acts, rows, n_rows, n_planes, out);
}

#include "fl_simd_rows.h"
#include "fl_simd_layers.h"
#include "fl_simd_rwkv.h"
#include "fl_simd_table.h"

const fl_kernel_set fl_neon = FL_SIMD_TABLE("neon");

#endif
