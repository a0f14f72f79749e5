/* The serial kernel set: every kernel as a plain loop.  Read this first; it is the C truth that the
 * vector sets are compared with.
 *
 * Instructions: the ABI's baseline.  Accumulators: products and sums in float64, rounded once;
 * accumulate in float32, multiply then add.  Tolerance: docs/ARITHMETIC.md.
 */
#include <math.h>

#include "fl_kernels.h"
#include "fl_quant.h"

/* ------------------------------------------------------------------------------------- values */

static float value_f32(const uint8_t *row, size_t c)
{
    float value;
    memcpy(&value, row + 4 * c, 4);
    return value;
}

static float value_f16(const uint8_t *row, size_t c) { return fl_f16(fl_load_u16(row + 2 * c)); }

static float value_bf16(const uint8_t *row, size_t c) { return fl_bf16(fl_load_u16(row + 2 * c)); }

static int level_int8(const uint8_t *row, size_t c) { return (int8_t)row[c]; }

static int level_int4(const uint8_t *row, size_t c)
{
    uint8_t byte = row[c / 32 * 16 + c % 16];
    return (c % 32 < 16 ? byte & 15 : byte >> 4) - 8;
}

static float scale_int8(const uint8_t *row, size_t n_cols, size_t group)
{
    size_t groups = (n_cols + 31) / 32;
    return fl_f16(fl_load_u16(row + groups * 32 + 2 * group));
}

static float scale_int4(const uint8_t *row, size_t n_cols, size_t group)
{
    size_t groups = (n_cols + 31) / 32;
    return fl_f16(fl_load_u16(row + groups * 16 + 2 * group));
}

/* --------------------------------------------------------------------------------------- dots */

#define FLOAT_DOT(NAME, VALUE)                                                                     \
    static void NAME(const fl_acts *acts, const uint8_t *const *rows, size_t n_rows, float *out,   \
                     size_t out_stride)                                                            \
    {                                                                                              \
        size_t n = (size_t)acts->n_cols;                                                           \
        for (size_t t = 0; t < (size_t)acts->n_tokens; t++)                                        \
            for (size_t r = 0; r < n_rows; r++) {                                                  \
                const float *x = acts->x + t * n;                                                  \
                double sum = 0;                                                                    \
                for (size_t c = 0; c < n; c++) sum += (double)VALUE(rows[r], c) * x[c];            \
                out[t * out_stride + r] = (float)sum;                                              \
            }                                                                                      \
    }
FLOAT_DOT(dot_f32, value_f32)
FLOAT_DOT(dot_f16, value_f16)
FLOAT_DOT(dot_bf16, value_bf16)

#define INTEGER_DOT(NAME, LEVEL, SCALE)                                                            \
    static void NAME(const fl_acts *acts, const uint8_t *const *rows, size_t n_rows, float *out,   \
                     size_t out_stride)                                                            \
    {                                                                                              \
        size_t n = (size_t)acts->n_cols, groups = (n + 31) / 32;                                   \
        for (size_t t = 0; t < (size_t)acts->n_tokens; t++)                                        \
            for (size_t r = 0; r < n_rows; r++) {                                                  \
                const uint8_t *q = acts->q + t * (size_t)acts->q_stride;                           \
                const float *scales = acts->scales + t * (size_t)acts->scale_stride;               \
                double sum = 0;                                                                    \
                for (size_t g = 0; g < groups; g++) {                                              \
                    int32_t products = 0; /* at most 32 * 127 * 127 */                             \
                    for (size_t c = 32 * g; c < 32 * g + 32; c++)                                  \
                        products += LEVEL(rows[r], c) * (int8_t)q[c];                              \
                    sum += (double)products * (SCALE(rows[r], n, g) * scales[g]);                  \
                }                                                                                  \
                out[t * out_stride + r] = (float)sum;                                              \
            }                                                                                      \
    }
INTEGER_DOT(dot_int8, level_int8, scale_int8)
INTEGER_DOT(dot_int4, level_int4, scale_int4)

void fl_serial_low_bit(const fl_acts *acts, const uint8_t *rows, size_t n_rows, size_t n_planes,
                       float *out)
{
    size_t plane = (size_t)acts->q_stride / 8, groups = ((size_t)acts->n_cols + 31) / 32;
    for (size_t r = 0; r < n_rows; r++, rows += n_planes * plane) {
        double sum = 0;
        for (size_t g = 0; g < groups; g++) {
            int32_t products = 0; /* at most 32 * 127 * 63 */
            for (size_t c = 32 * g; c < 32 * g + 32; c++) {
                int code = 0;
                for (size_t p = 0; p < n_planes; p++)
                    code |= (rows[p * plane + c / 8] >> c % 8 & 1) << p;
                products += (2 * code - (1 << n_planes) + 1) * (int8_t)acts->q[c];
            }
            sum += (double)products * acts->scales[g];
        }
        out[r] = (float)sum;
    }
}

/* --------------------------------------------------------------------------------- accumulate */

#define FLOAT_ACCUMULATE(NAME, VALUE)                                                              \
    static void NAME(const float *coef, size_t coef_stride, size_t n_tokens,                       \
                     const uint8_t *const *rows, size_t n_rows, size_t n_cols, size_t first,       \
                     size_t last, float *y, size_t y_stride)                                       \
    {                                                                                              \
        for (size_t t = 0; t < n_tokens; t++)                                                      \
            for (size_t r = 0; r < n_rows; r++) {                                                  \
                float s = coef[t * coef_stride + r], *to = y + t * y_stride;                       \
                for (size_t c = first; c < last; c++)                                              \
                    to[c] = (to[c] + s * VALUE(rows[r], c)) + 0.0f;                                \
            }                                                                                      \
    }
FLOAT_ACCUMULATE(accumulate_f32, value_f32)
FLOAT_ACCUMULATE(accumulate_f16, value_f16)
FLOAT_ACCUMULATE(accumulate_bf16, value_bf16)

#define INTEGER_ACCUMULATE(NAME, LEVEL, SCALE)                                                     \
    static void NAME(const float *coef, size_t coef_stride, size_t n_tokens,                       \
                     const uint8_t *const *rows, size_t n_rows, size_t n_cols, size_t first,       \
                     size_t last, float *y, size_t y_stride)                                       \
    {                                                                                              \
        for (size_t t = 0; t < n_tokens; t++)                                                      \
            for (size_t r = 0; r < n_rows; r++) {                                                  \
                float *to = y + t * y_stride, s = 0;                                               \
                for (size_t c = first; c < last; c++) {                                            \
                    if (c % 32 == 0)                                                               \
                        s = coef[t * coef_stride + r] * SCALE(rows[r], n_cols, c / 32);            \
                    to[c] = (to[c] + s * (float)LEVEL(rows[r], c)) + 0.0f;                         \
                }                                                                                  \
            }                                                                                      \
    }
INTEGER_ACCUMULATE(accumulate_int8, level_int8, scale_int8)
INTEGER_ACCUMULATE(accumulate_int4, level_int4, scale_int4)

/* ------------------------------------------------------------------------------------- decode */

#define FLOAT_DECODE(NAME, VALUE)                                                                  \
    static void NAME(const uint8_t *row, size_t n_cols, float *out)                                \
    {                                                                                              \
        for (size_t c = 0; c < n_cols; c++) out[c] = VALUE(row, c);                                \
    }
FLOAT_DECODE(decode_f32, value_f32)
FLOAT_DECODE(decode_f16, value_f16)
FLOAT_DECODE(decode_bf16, value_bf16)

#define INTEGER_DECODE(NAME, LEVEL, SCALE)                                                         \
    static void NAME(const uint8_t *row, size_t n_cols, float *out)                                \
    {                                                                                              \
        for (size_t c = 0; c < n_cols; c++)                                                        \
            out[c] = (float)LEVEL(row, c) * SCALE(row, n_cols, c / 32);                            \
    }
INTEGER_DECODE(decode_int8, level_int8, scale_int8)
INTEGER_DECODE(decode_int4, level_int4, scale_int4)

/* -------------------------------------------------------------------------- norms, elementwise */

static void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out)
{
    double squares = 0;
    for (size_t c = 0; c < n; c++) squares += (double)x[c] * x[c];
    float r = 1.0f / sqrtf((float)(squares / (double)n) + eps);
    for (size_t c = 0; c < n; c++) out[c] = x[c] * r * weight[c];
}

static void layer_norm(const float *x, const float *weight, const float *bias, size_t n, float eps,
                       float *out)
{
    double sum = 0, squares = 0;
    for (size_t c = 0; c < n; c++) sum += x[c];
    float mean = (float)(sum / (double)n);
    for (size_t c = 0; c < n; c++) squares += (double)(x[c] - mean) * (x[c] - mean);
    float r = 1.0f / sqrtf((float)(squares / (double)n) + eps);
    for (size_t c = 0; c < n; c++) out[c] = (x[c] - mean) * r * weight[c] + bias[c];
}

static void rope(float *x, const float *cosines, const float *sines, size_t half)
{
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i] + a * sines[i];
    }
}

static float softmax(float *scores, size_t lo, size_t hi, float scale)
{
    float most = -INFINITY;
    for (size_t j = lo; j < hi; j++) {
        scores[j] *= scale;
        most = scores[j] > most ? scores[j] : most;
    }
    double sum = 0;
    for (size_t j = lo; j < hi; j++) {
        scores[j] = expf(scores[j] - most);
        sum += scores[j];
    }
    return 1.0f / (float)sum;
}

static void scale_by(float *y, size_t n, float factor)
{
    for (size_t c = 0; c < n; c++) y[c] *= factor;
}

static float activated(fl_activation kind, float x)
{
    switch (kind) {
    case FL_SILU: return x / (1.0f + expf(-x));
    case FL_RELU: return x <= 0 ? 0.0f : x;
    case FL_RELU2: return x <= 0 ? 0.0f : x * x;
    case FL_GELU: return 0.5f * x * (1.0f + erff(x * 0x1.6a09e6p-1f));
    case FL_GELU_TANH: break;
    case FL_SIGMOID: return 1.0f / (1.0f + expf(-x));
    case FL_TANH: return tanhf(x);
    }
    float u = 0.79788456f * (x + 0.044715f * (x * x * x));
    return x / (1.0f + expf(-2.0f * u));
}

static void activate(fl_activation kind, const float *pre, const float *up, size_t n, float *out)
{
    for (size_t c = 0; c < n; c++) {
        float value = activated(kind, pre[c]);
        out[c] = up ? value * up[c] : value;
    }
}

#include "fl_serial_rwkv.h"

const fl_kernel_set fl_serial = {
    .name = "serial",
    .dot = {dot_f32, dot_f16, dot_bf16, dot_int8, dot_int4},
    .accumulate = {accumulate_f32, accumulate_f16, accumulate_bf16, accumulate_int8,
                   accumulate_int4},
    .decode = {decode_f32, decode_f16, decode_bf16, decode_int8, decode_int4},
    .low_bit = fl_serial_low_bit,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .rope = rope,
    .softmax = softmax,
    .scale_by = scale_by,
    .activate = activate,
    .mix_tokens = mix_tokens,
    .rwkv4 = rwkv4,
    .rwkv5 = rwkv5,
    .rwkv7 = rwkv7,
};
