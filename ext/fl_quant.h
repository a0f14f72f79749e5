/* Activations to int8, and the 16-bit floats of rows, in portable C: the same bits in every set. */
#ifndef FL_QUANT_H
#define FL_QUANT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* One token: x[n] -> q[q_stride] (int8) and scales[scale_stride]. */
void fl_quantise(const float *x, size_t n, uint8_t *q, size_t q_stride, float *scales,
                 size_t scale_stride);

static inline uint32_t fl_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float fl_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t fl_load_u16(const uint8_t *p)
{
    uint16_t half;
    memcpy(&half, p, 2);
    return half;
}

static inline float fl_bf16(uint16_t half) { return fl_from_bits((uint32_t)half << 16); }

/* Exact widening.  A normal or subnormal half shifted into binary32 place is too small by 2^112,
 * which the product mends without rounding; infinity and NaN get the full exponent. */
static inline float fl_f16(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    uint32_t bits = magnitude >= 0x7c00 ? magnitude << 13 | 0x7f800000
                                        : fl_bits(fl_from_bits(magnitude << 13) * 0x1p112f);
    return fl_from_bits(bits | sign);
}

/* Rounded to the nearest half, ties to even; what is beyond the largest becomes infinity.  Below
 * 2^-14 the sum with 0.5, whose last bit is worth the least half, does the rounding. */
static inline void fl_store_f16(uint8_t *p, float value)
{
    const uint32_t bits = fl_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude >= 0x47800000)
        half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    else if (magnitude < 0x38800000)
        half = fl_bits(fl_from_bits(magnitude) + 0.5f) - 0x3f000000;
    else
        half = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
    const uint16_t stored = (uint16_t)(half | sign);
    memcpy(p, &stored, 2);
}

#endif
