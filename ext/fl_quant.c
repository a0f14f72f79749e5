/* See fl_quant.h and "Activations of integer dots" in docs/ARITHMETIC.md. */
#include "fl_quant.h"

#include "fl_kernels.h"

static const float TINY = 0x1p-100f;         /* below it 127 / m would overflow */
static const uint32_t INFINITE = 0x7f800000; /* bits of infinity; NaNs are above */
static const float ROUND = 0x1.8p23f;        /* adding it rounds to an integer, half to even */

static float group(const float *x, size_t n, uint8_t *q)
{
    /* Magnitudes compare as integers, NaN above all; that vectorises, fmaxf does not. */
    int32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        int32_t magnitude = (int32_t)(fl_bits(x[i]) & 0x7fffffff);
        most = magnitude > most ? magnitude : most;
    }
    float m = fl_from_bits((uint32_t)most);
    if ((uint32_t)most >= INFINITE || m < TINY) {
        memset(q, 0, FL_GROUP);
        return m < TINY ? 0.0f : fl_from_bits(0x7fc00000);
    }
    float inverse = 127.0f / m;
    for (size_t i = 0; i < n; i++) {
        float rounded = (x[i] * inverse + ROUND) - ROUND;
        q[i] = (uint8_t)(int8_t)(int32_t)rounded;
    }
    memset(q + n, 0, FL_GROUP - n);
    return m / 127.0f;
}

void fl_quantise(const float *x, size_t n, uint8_t *q, size_t q_stride, float *scales,
                 size_t scale_stride)
{
    size_t g = 0;
    for (; g * FL_GROUP + FL_GROUP <= n; g++)
        scales[g] = group(x + g * FL_GROUP, FL_GROUP, q + g * FL_GROUP);
    if (g * FL_GROUP < n) {
        scales[g] = group(x + g * FL_GROUP, n - g * FL_GROUP, q + g * FL_GROUP);
        g++;
    }
    memset(q + g * FL_GROUP, 0, q_stride - g * FL_GROUP);
    memset(scales + g, 0, (scale_stride - g) * sizeof *scales);
}
