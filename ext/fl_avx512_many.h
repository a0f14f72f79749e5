/* Dots of integer rows with many tokens: a lane is a token.
 *
 * A lane of the canonical dot is a sum of its own, over every second group (docs/ARITHMETIC.md); here
 * it is a register of sixteen tokens' such sums.  What a row of weights is multiplied by then comes
 * out of memory, spread over the lanes by the load itself: a product of four, its widening and its
 * fma are all that is left per 64 products, where lanes of one token need the scales permuted too. */

enum { MANY_T = FL_MANY, MANY_R = 3, LANES = 8, MANY_COLS = FL_MANY_COLS };

/* MANY_R rows: int8 weights; -128 times the sum of each four, for activations are stored plus 128;
 * scales.  Groups are padded to an even number, as the lanes of one token have them. */
typedef struct {
    const uint8_t *w[MANY_R];
    int32_t minus[MANY_R][MANY_COLS / 4] __attribute__((aligned(64)));
    float scales[MANY_R][MANY_COLS / FL_GROUP] __attribute__((aligned(64)));
    uint8_t unpacked[MANY_R][MANY_COLS] __attribute__((aligned(64)));
} many_rows;

FN __m512i minus_of(__m512i w)
{
    __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8((char)128), w);
    return _mm512_sub_epi32(_mm512_setzero_si512(), sums);
}

FN void take_row(many_rows *m, const int r, const uint8_t *row, size_t groups, const int bits)
{
    const size_t group_bytes = 4 * (size_t)bits, padded = (groups + 1) / 2 * 2;
    m->w[r] = bits == 8 && groups % 2 == 0 ? row : m->unpacked[r];
    for (size_t g = 0; g < padded; g += 2) {
        const uint8_t *at = row + g * group_bytes;
        const int both = g + 2 <= groups;
        __m512i w;
        if (bits == 8) {
            w = both ? _mm512_loadu_si512(at) : _mm512_zextsi256_si512(load_halves(at));
        } else {
            w = w_int4(at, both ? 2 : 1);
            w = _mm512_sub_epi8(w, _mm512_set1_epi8(INT4_ZERO));
        }
        if (m->w[r] != row) _mm512_store_si512(m->unpacked[r] + g * FL_GROUP, w);
        _mm512_store_si512(m->minus[r] + g * FL_GROUP / 4, minus_of(w));
    }
    for (size_t g = 0; g < padded; g += W) {
        const uint8_t *at = row + groups * group_bytes + 2 * g;
        v_store(m->scales[r] + g,
                g + W <= groups ? load_f16(at) : load_f16_part(at, groups - g));
    }
}

/* Groups parity, parity + 2, … of R rows and MANY_T tokens, LANES sums each; with `next`, those rows
 * are asked for on the way. */
FN void many_groups(const int R, const int parity, const many_rows *m, size_t groups,
                    const uint8_t *x, const float *xs, const uint8_t *const *next, size_t row_step,
                    float (*out)[LANES][MANY_T])
{
    vf acc[MANY_R][LANES];
    EACH (r, R)
        EACH (k, LANES) acc[r][k] = v_zero();
    x += (size_t)parity * groups / 2 * LANES * 64;
    for (size_t g = (size_t)parity; g < groups; g += 2, x += LANES * 64) {
        vf f[MANY_R];
        EACH (r, R) f[r] = v_mul(v_set1(m->scales[r][g]), v_load(xs + MANY_T * g));
        if (next)
            EACH (r, R) {
                __builtin_prefetch(next[r] + g * row_step, 0, 3);
                if (g % W == 0) __builtin_prefetch(next[r] + groups * row_step + 2 * g, 0, 3);
            }
        EACH (k, LANES) {
            const __m512i q = _mm512_load_si512(x + k * 64);
            EACH (r, R) {
                int32_t four;
                memcpy(&four, m->w[r] + g * FL_GROUP + 4 * k, 4);
                const __m512i sums = _mm512_dpbusd_epi32(
                    _mm512_set1_epi32(m->minus[r][g * LANES + (size_t)k]), q,
                    _mm512_set1_epi32(four));
                acc[r][k] = v_fma(_mm512_cvtepi32_ps(sums), f[r], acc[r][k]);
            }
        }
    }
    EACH (r, R)
        EACH (k, LANES) v_store(out[r][k], acc[r][k]);
}

FN void many_block(const int R, const many_rows *m, size_t groups, const uint8_t *x,
                   const float *xs, const uint8_t *const *next, size_t row_step, float *out,
                   size_t stride)
{
    float even[MANY_R][LANES][MANY_T], odd[MANY_R][LANES][MANY_T];
    const size_t padded = (groups + 1) / 2 * 2;
    many_groups(R, 0, m, padded, x, xs, next, row_step, even);
    many_groups(R, 1, m, padded, x, xs, next, row_step, odd);
    float sums[MANY_R][MANY_T];
    EACH (r, R) {
        vf a[LANES];
        EACH (k, LANES) a[k] = v_add(v_load(even[r][k]), v_load(odd[r][k]));
        EACH (k, LANES / 2) a[k] = v_add(a[k], a[k + 4]);
        v_store(sums[r], v_add(v_add(a[0], a[1]), v_add(a[2], a[3])));
    }
    for (size_t t = 0; t < MANY_T; t++)
        EACH (r, R) out[t * stride + (size_t)r] = sums[r][t];
}

/* n_rows rows and the first n_tokens / MANY_T * MANY_T tokens. */
#define MANY(TYPE, BITS)                                                                           \
    FN void many_some_##TYPE(const int R, const fl_acts *acts, const uint8_t *const *rows,         \
                             const uint8_t *const *next, many_rows *m, float *out, size_t stride)  \
    {                                                                                              \
        const size_t groups = ((size_t)acts->n_cols + FL_GROUP - 1) / FL_GROUP;                    \
        const size_t q_bytes = MANY_T * (size_t)acts->q_stride;                                    \
        const size_t bytes = q_bytes + MANY_T * sizeof(float) * (size_t)acts->scale_stride;        \
        EACH (r, R) take_row(m, r, rows[r], groups, BITS);                                         \
        for (size_t b = 0; b < (size_t)acts->n_tokens / MANY_T; b++) {                             \
            const uint8_t *x = acts->tiles + b * bytes;                                            \
            many_block(R, m, groups, x, (const float *)(x + q_bytes), b ? NULL : next, 4 * BITS,   \
                       out + b * MANY_T * stride, stride);                                         \
        }                                                                                          \
    }                                                                                              \
    KERNEL void many_##TYPE(const fl_acts *acts, const uint8_t *const *rows, size_t n_rows,        \
                            float *out, size_t stride)                                             \
    {                                                                                              \
        many_rows m;                                                                               \
        size_t r = 0;                                                                              \
        for (; r + MANY_R <= n_rows; r += MANY_R)                                                  \
            many_some_##TYPE(MANY_R, acts, rows + r,                                               \
                             r + 2 * MANY_R <= n_rows ? rows + r + MANY_R : rows + r, &m,          \
                             out + r, stride);                                                     \
        for (; r < n_rows; r++) many_some_##TYPE(1, acts, rows + r, NULL, &m, out + r, stride);    \
    }
MANY(int8, 8)
MANY(int4, 4)

/* [q_stride / 4][MANY_T] fours of activations plus 128, then [scale_stride][MANY_T] scales. */
KERNEL void pack_tokens(const uint8_t *q, size_t q_stride, const float *scales,
                        size_t scale_stride, uint8_t *tile)
{
    float *to = (float *)(tile + MANY_T * q_stride);
    for (size_t t = 0; t < MANY_T; t++) {
        for (size_t c = 0; c < q_stride; c += 4) {
            uint32_t four;
            memcpy(&four, q + t * q_stride + c, 4);
            four ^= 0x80808080u;
            size_t g = c / 32; memcpy(tile + ((g % 2 * (q_stride / 64) + g / 2) * 32 + c % 32) * MANY_T + 4 * t, &four, 4);
        }
        for (size_t g = 0; g < scale_stride; g++) to[g * MANY_T + t] = scales[t * scale_stride + g];
    }
}

/* Sums of rows for many tokens: a group of columns is widened once for all of them, and a tile of y
 * meets up to MANY_ROWS rows between load and store. */
enum { MANY_ROWS = FL_MANY_ROWS, SUM_TOKENS = FL_SUM_TOKENS };

/* SUM_TOKENS tokens; `next` is where the next call's y lies.  With `ahead`, those rows' bytes `at` are
 * asked for on the way. */
FN void add_rows(const float *coef, size_t coef_stride, const float *scales,
                 const float (*values)[FL_GROUP], size_t n_rows, float *y, const float *next,
                 size_t y_stride, const uint8_t *const *ahead, size_t at)
{
    float s[SUM_TOKENS][MANY_ROWS] __attribute__((aligned(64)));
    vf acc[SUM_TOKENS][V_GROUP];
    for (size_t r = 0; r < n_rows; r += W) {
        const size_t n = smaller_of(W, n_rows - r);
        EACH (t, SUM_TOKENS)
            v_store(s[t] + r, v_mul(v_load_part(coef + (size_t)t * coef_stride + r, n),
                                    v_load(scales + r)));
    }
    EACH (t, SUM_TOKENS)
        EACH (v, V_GROUP) acc[t][v] = v_load(y + (size_t)t * y_stride + (size_t)(v * W));
    EACH (t, SUM_TOKENS)
        EACH (v, V_GROUP) __builtin_prefetch(next + (size_t)t * y_stride + (size_t)(v * W), 1, 3);
    for (size_t r = 0; r < n_rows; r++) {
        const vf w[V_GROUP] = {v_load(values[r]), v_load(values[r] + W)};
        if (ahead) __builtin_prefetch(ahead[r] + at, 0, 3);
        EACH (t, SUM_TOKENS) {
            const vf factor = v_set1(s[t][r]);
            EACH (v, V_GROUP) acc[t][v] = v_fma(factor, w[v], acc[t][v]);
        }
    }
    EACH (t, SUM_TOKENS)
        EACH (v, V_GROUP)
            v_store(y + (size_t)t * y_stride + (size_t)(v * W), v_add(acc[t][v], v_zero()));
}

#define SUMS(TYPE, BITS, SCALED, VALUE, SCALES)                                                    \
    FN void panel_sums_##TYPE(const float *coef, size_t coef_stride, size_t n_tokens,              \
                              const uint8_t *const *rows, const uint8_t *const *after,             \
                              size_t n_rows, size_t n_cols, size_t first, size_t last, float *y,   \
                              size_t y_stride)                                                     \
    {                                                                                              \
        float values[MANY_ROWS][FL_GROUP] __attribute__((aligned(64)));                            \
        float scales[MANY_ROWS] __attribute__((aligned(64))) = {0};                                \
        for (size_t c = first; c < last; c += FL_GROUP) {                                          \
            const size_t line = 512 / BITS, near = (c / line + 1) * line;                          \
            const uint8_t *const *ahead = near < last ? rows : after;                              \
            const size_t at = (near < last ? near : first) * BITS / 8;                             \
            for (size_t r = 0; r < n_rows; r++) {                                                  \
                const uint8_t *scale = SCALES(rows[r], n_cols) + c / FL_GROUP * 2;                 \
                scales[r] = SCALED ? _mm512_cvtss_f32(load_scale(scale)) : 1.0f;                   \
                EACH (v, V_GROUP)                                                                  \
                    v_store(values[r] + v * W, VALUE(rows[r], c + (size_t)(v * W)));               \
            }                                                                                      \
            for (size_t t = 0; t < n_tokens; t += SUM_TOKENS, coef += SUM_TOKENS * coef_stride) {  \
                float *tile = y + t * y_stride + c;                                                \
                const size_t step = t + SUM_TOKENS < n_tokens ? SUM_TOKENS * y_stride : 0;         \
                if (t == 0)                                                                        \
                    add_rows(coef, coef_stride, scales, values, n_rows, tile, tile + step,         \
                             y_stride, ahead, at);                                                 \
                else if (t == SUM_TOKENS && SCALED && ahead == after)                              \
                    add_rows(coef, coef_stride, scales, values, n_rows, tile, tile + step,         \
                             y_stride, after,                                                      \
                             (size_t)(SCALES(rows[0], n_cols) - rows[0]) + first / FL_GROUP * 2);  \
                else                                                                               \
                    add_rows(coef, coef_stride, scales, values, n_rows, tile,                      \
                             step ? tile + step : y + c + FL_GROUP, y_stride, NULL, 0);            \
            }                                                                                      \
            coef -= n_tokens * coef_stride;                                                        \
        }                                                                                          \
    }                                                                                              \
    KERNEL void many_sums_##TYPE(const float *coef, size_t coef_stride, size_t n_tokens,           \
                                 const uint8_t *const *rows, size_t n_rows, size_t n_cols,         \
                                 size_t first, size_t last, float *y, size_t y_stride)             \
    {                                                                                              \
        for (size_t r = 0; r < n_rows; r += MANY_ROWS)                                             \
            panel_sums_##TYPE(coef + r, coef_stride, n_tokens, rows + r,                           \
                              r + 2 * MANY_ROWS <= n_rows ? rows + r + MANY_ROWS : rows + r,       \
                              smaller_of(MANY_ROWS, n_rows - r), n_cols, first, last, y, y_stride);\
    }
SUMS(int8, 8, 1, VALUE_INT8, SCALES_INT8)
SUMS(int4, 4, 1, value_i4, SCALES_INT4)
SUMS(f32, 32, 0, VALUE_F32, NO_SCALES)
SUMS(f16, 16, 0, VALUE_F16, NO_SCALES)
SUMS(bf16, 16, 0, VALUE_BF16, NO_SCALES)
