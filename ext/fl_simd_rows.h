/* Dots, accumulate and decode of the vector sets, written once over the words of the including set:
 *
 *   FN, KERNEL         qualifiers (inlined helper, table entry) with the set's target attribute
 *   W                  lanes of vf; DOT_T, SUM_T tokens in a register block
 *   vf                 v_zero v_set1 v_load v_store v_load_part v_store_part v_add v_mul v_fma
 *   weights from bytes load_f32|f16|bf16 (p), the same with _part (p, n), load_i8 (p),
 *                      load_i4 (p, shift), load_scale (p)
 *   wi                 W / 8 groups of integer weights: w_int8 w_int4 w_scale (p, groups),
 *                      x_scale (floats), w_dot (wi, q) -> exact sums of 4 products
 *   sum4, store4       the trees of four accumulators side by side
 *
 * A _part takes 1..W values.  The order of every sum is in docs/ARITHMETIC.md; a block of R rows
 * and T tokens is R x T dots with the pattern of one.
 */

enum { R_BLOCK = 4 };            /* rows whose accumulators are live together */
enum { ROWS_PER_PASS = 16 };     /* rows that a tile of y meets before it is stored */
enum { V_GROUP = FL_GROUP / W }; /* vectors in a group */
enum { CHUNK = W / 8 };          /* groups in a vector of integer products */

/* A short loop of constant length, unrolled so that accumulators stay in registers. */
#define EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* Write R sums of T tokens. */
FN void finish(const int R, const int T, vf acc[R_BLOCK][DOT_T], float *out, size_t stride)
{
    EACH (t, T) {
        if (R == R_BLOCK)
            store4(out + (size_t)t * stride, sum4(acc[0][t], acc[1][t], acc[2][t], acc[3][t]), 4);
        else
            store4(out + (size_t)t * stride, sum4(acc[0][t], v_zero(), v_zero(), v_zero()), 1);
    }
}

FN void clear(vf acc[R_BLOCK][DOT_T])
{
    EACH (r, R_BLOCK)
        EACH (t, DOT_T) acc[r][t] = v_zero();
}

/* Walk rows by R_BLOCK and tokens by DOT_T. */
#define DOT(NAME, BLOCK)                                                                           \
    KERNEL void NAME(const fl_acts *acts, const uint8_t *const *rows, size_t n_rows, float *out,   \
                     size_t stride)                                                                \
    {                                                                                              \
        size_t r = 0, T = (size_t)acts->n_tokens;                                                  \
        for (; r + R_BLOCK <= n_rows; r += R_BLOCK) {                                              \
            const uint8_t *const *next =                                                           \
                r + 2 * R_BLOCK <= n_rows ? rows + r + R_BLOCK : rows + r;                         \
            size_t t = 0;                                                                          \
            for (; t + DOT_T <= T; t += DOT_T)                                                     \
                BLOCK(R_BLOCK, DOT_T, acts, rows + r, next, t, out + t * stride + r, stride);      \
            for (; t < T; t++)                                                                     \
                BLOCK(R_BLOCK, 1, acts, rows + r, next, t, out + t * stride + r, stride);          \
        }                                                                                          \
        for (; r < n_rows; r++)                                                                    \
            for (size_t t = 0; t < T; t++)                                                         \
                BLOCK(1, 1, acts, rows + r, rows + r, t, out + t * stride + r, stride);            \
    }

#define FLOAT_STEP(LOADED, AT, X)                                                                  \
    vf w[R_BLOCK];                                                                                 \
    EACH (r, R) {                                                                                  \
        w[r] = LOADED;                                                                             \
        if (T == 1) __builtin_prefetch(next[r] + AT);                                              \
    }                                                                                              \
    EACH (t, T) {                                                                                  \
        vf xv = X;                                                                                 \
        EACH (r, R) acc[r][t] = v_fma(w[r], xv, acc[r][t]);                                        \
    }

#define FLOAT_DOT(TYPE, SIZE)                                                                      \
    FN void block_##TYPE(const int R, const int T, const fl_acts *acts,                            \
                         const uint8_t *const *rows, const uint8_t *const *next, size_t t0,        \
                         float *out, size_t stride)                                                \
    {                                                                                              \
        size_t n = (size_t)acts->n_cols, c = 0;                                                    \
        const float *x = acts->x + t0 * n;                                                         \
        vf acc[R_BLOCK][DOT_T];                                                                    \
        clear(acc);                                                                                \
        for (; c + W <= n; c += W) {                                                               \
            FLOAT_STEP(load_##TYPE(rows[r] + SIZE * c), SIZE * c, v_load(x + (size_t)t * n + c))   \
        }                                                                                          \
        if (c < n) {                                                                               \
            FLOAT_STEP(load_##TYPE##_part(rows[r] + SIZE * c, n - c), SIZE * c,                    \
                       v_load_part(x + (size_t)t * n + c, n - c))                                  \
        }                                                                                          \
        finish(R, T, acc, out, stride);                                                            \
    }                                                                                              \
    DOT(dot_##TYPE, block_##TYPE)
FLOAT_DOT(f32, 4)
FLOAT_DOT(f16, 2)
FLOAT_DOT(bf16, 2)

#define INTEGER_STEP(GROUPS)                                                                       \
    vf xs[DOT_T];                                                                                  \
    EACH (t, T) xs[t] = x_scale(scales + (size_t)t * scale_stride + g);                            \
    EACH (r, R) {                                                                                  \
        wi w = w_int(rows[r] + g * group_bytes, GROUPS);                                           \
        if (T == 1) __builtin_prefetch(next[r] + g * group_bytes);                                 \
        vf ws = w_scale(rows[r] + groups * group_bytes + 2 * g, GROUPS);                           \
        EACH (t, T)                                                                                \
            acc[r][t] = v_fma(w_dot(w, q + (size_t)t * q_stride + g * FL_GROUP), v_mul(ws, xs[t]), \
                              acc[r][t]);                                                          \
    }

#define INTEGER_DOT(TYPE, GROUP_BYTES)                                                             \
    FN void block_##TYPE(const int R, const int T, const fl_acts *acts,                            \
                         const uint8_t *const *rows, const uint8_t *const *next, size_t t0,        \
                         float *out, size_t stride)                                                \
    {                                                                                              \
        const size_t group_bytes = GROUP_BYTES, q_stride = (size_t)acts->q_stride;                 \
        const size_t scale_stride = (size_t)acts->scale_stride;                                    \
        const uint8_t *q = acts->q + t0 * q_stride;                                                \
        const float *scales = acts->scales + t0 * scale_stride;                                    \
        size_t groups = ((size_t)acts->n_cols + FL_GROUP - 1) / FL_GROUP, g = 0;                   \
        vf acc[R_BLOCK][DOT_T];                                                                    \
        clear(acc);                                                                                \
        for (; g + CHUNK <= groups; g += CHUNK) {                                                  \
            INTEGER_STEP(CHUNK)                                                                    \
        }                                                                                          \
        if (CHUNK > 1 && g < groups) {                                                             \
            INTEGER_STEP(1)                                                                        \
        }                                                                                          \
        finish(R, T, acc, out, stride);                                                            \
    }                                                                                              \
    DOT(dot_##TYPE, block_##TYPE)
#define w_int w_int8
INTEGER_DOT(int8, 32)
#undef w_int
#define w_int w_int4
INTEGER_DOT(int4, 16)
#undef w_int

/* --------------------------------------------------------------------------------- accumulate */

/* VALUE(row, c): W values from column c; PART(row, c, n): the first n of them;
 * SCALE(row, c): the scale of c's group in every lane, or 1 with SCALED 0. */
#define TERM_SCALE(SCALED, SCALE, T)                                                               \
    vf s[SUM_T];                                                                                   \
    EACH (t, T) {                                                                                  \
        s[t] = v_set1(coef[(size_t)t * coef_stride + r]);                                          \
        if (SCALED) s[t] = v_mul(s[t], SCALE);                                                     \
    }

#define ACCUMULATE(TYPE, SCALED, VALUE, PART, SCALE)                                               \
    /* T tokens x G groups of columns from c. */                                                   \
    FN void tile_##TYPE(const int T, const int G, const float *coef, size_t coef_stride,           \
                        const uint8_t *const *rows, size_t n_rows, size_t n_cols, size_t c,        \
                        float *y, size_t y_stride)                                                 \
    {                                                                                              \
        vf acc[SUM_T][2 * V_GROUP];                                                                \
        EACH (t, T)                                                                                \
            EACH (v, G * V_GROUP)                                                                  \
                acc[t][v] = v_load(y + (size_t)t * y_stride + c + (size_t)(v * W));                \
        for (size_t r = 0; r < n_rows; r++)                                                        \
            EACH (g, G) {                                                                          \
                TERM_SCALE(SCALED, SCALE(rows[r], c + (size_t)(g * FL_GROUP)), T)                  \
                EACH (i, V_GROUP) {                                                                \
                    const int v = g * V_GROUP + i;                                                 \
                    vf w = VALUE(rows[r], c + (size_t)(v * W));                                    \
                    EACH (t, T) acc[t][v] = v_fma(s[t], w, acc[t][v]);                             \
                }                                                                                  \
            }                                                                                      \
        EACH (t, T)                                                                                \
            EACH (v, G * V_GROUP)                                                                  \
                v_store(y + (size_t)t * y_stride + c + (size_t)(v * W),                            \
                        v_add(acc[t][v], v_zero()));                                               \
    }                                                                                              \
    /* One token, the fewer than 32 columns from c to last. */                                     \
    KERNEL void tail_##TYPE(const float *coef, const uint8_t *const *rows, size_t n_rows,          \
                            size_t n_cols, size_t c, size_t last, float *y)                        \
    {                                                                                              \
        const size_t coef_stride = 0;                                                              \
        for (; c < last; c += W) {                                                                 \
            size_t n = last - c < W ? last - c : W;                                                \
            vf acc = v_load_part(y + c, n);                                                        \
            for (size_t r = 0; r < n_rows; r++) {                                                  \
                TERM_SCALE(SCALED, SCALE(rows[r], c), 1)                                           \
                acc = v_fma(s[0], PART(rows[r], c, n), acc);                                       \
            }                                                                                      \
            v_store_part(y + c, v_add(acc, v_zero()), n);                                          \
        }                                                                                          \
    }                                                                                              \
    KERNEL void accumulate_##TYPE(const float *coef, size_t coef_stride, size_t n_tokens,          \
                                  const uint8_t *const *rows, size_t n_rows, size_t n_cols,        \
                                  size_t first, size_t last, float *y, size_t y_stride)            \
    {                                                                                              \
        size_t whole = last / FL_GROUP * FL_GROUP;                                                 \
        for (; n_rows > 0; n_rows -= smaller_of(n_rows, ROWS_PER_PASS), rows += ROWS_PER_PASS,     \
                           coef += ROWS_PER_PASS) {                                                \
            size_t k = smaller_of(n_rows, ROWS_PER_PASS), t = 0;                                   \
            for (; t + SUM_T <= n_tokens; t += SUM_T)                                              \
                for (size_t c = first; c < whole; c += FL_GROUP)                                   \
                    tile_##TYPE(SUM_T, 1, coef + t * coef_stride, coef_stride, rows, k, n_cols, c, \
                                y + t * y_stride, y_stride);                                       \
            for (; t < n_tokens; t++) {                                                            \
                size_t c = first;                                                                  \
                for (; c + 2 * FL_GROUP <= whole; c += 2 * FL_GROUP)                               \
                    tile_##TYPE(1, 2, coef + t * coef_stride, 0, rows, k, n_cols, c,               \
                                y + t * y_stride, 0);                                              \
                if (c < whole)                                                                     \
                    tile_##TYPE(1, 1, coef + t * coef_stride, 0, rows, k, n_cols, c,               \
                                y + t * y_stride, 0);                                              \
            }                                                                                      \
            for (t = 0; whole < last && t < n_tokens; t++)                                         \
                tail_##TYPE(coef + t * coef_stride, rows, k, n_cols, whole, last,                  \
                            y + t * y_stride);                                                     \
        }                                                                                          \
    }

FN size_t smaller_of(size_t a, size_t b) { return a < b ? a : b; }

/* W values of a group of 32 nibbles lie in one half of each of W bytes. */
FN vf value_i4(const uint8_t *row, size_t c)
{
    return load_i4(row + c / 32 * 16 + c % 16, c % 32 < 16 ? 0 : 4);
}

FN vf scale_int8(const uint8_t *row, size_t n_cols, size_t c)
{
    return load_scale(row + (n_cols + 31) / 32 * 32 + c / 32 * 2);
}

FN vf scale_int4(const uint8_t *row, size_t n_cols, size_t c)
{
    return load_scale(row + (n_cols + 31) / 32 * 16 + c / 32 * 2);
}

#define NO_SCALE(row, c) v_set1(1.0f)
#define VALUE_F32(row, c) load_f32((row) + 4 * (c))
#define VALUE_F16(row, c) load_f16((row) + 2 * (c))
#define VALUE_BF16(row, c) load_bf16((row) + 2 * (c))
#define VALUE_INT8(row, c) load_i8((row) + (c))
#define PART_F32(row, c, n) load_f32_part((row) + 4 * (c), n)
#define PART_F16(row, c, n) load_f16_part((row) + 2 * (c), n)
#define PART_BF16(row, c, n) load_bf16_part((row) + 2 * (c), n)
#define PART_INT8(row, c, n) load_i8((row) + (c)) /* groups are padded: whole vectors may be read */
#define PART_INT4(row, c, n) value_i4(row, c)
#define SCALE_INT8(row, c) scale_int8(row, n_cols, c)
#define SCALE_INT4(row, c) scale_int4(row, n_cols, c)
ACCUMULATE(f32, 0, VALUE_F32, PART_F32, NO_SCALE)
ACCUMULATE(f16, 0, VALUE_F16, PART_F16, NO_SCALE)
ACCUMULATE(bf16, 0, VALUE_BF16, PART_BF16, NO_SCALE)
ACCUMULATE(int8, 1, VALUE_INT8, PART_INT8, SCALE_INT8)
ACCUMULATE(int4, 1, value_i4, PART_INT4, SCALE_INT4)

/* ------------------------------------------------------------------------------------- decode */

#define DECODE(TYPE, SCALED, VALUE, PART, SCALE)                                                   \
    KERNEL void decode_##TYPE(const uint8_t *row, size_t n_cols, float *out)                       \
    {                                                                                              \
        for (size_t c = 0; c < n_cols; c += W) {                                                   \
            size_t n = smaller_of(W, n_cols - c);                                                  \
            vf value = n == W ? VALUE(row, c) : PART(row, c, n);                                   \
            v_store_part(out + c, SCALED ? v_mul(value, SCALE(row, c)) : value, n);                \
        }                                                                                          \
    }
DECODE(f32, 0, VALUE_F32, PART_F32, NO_SCALE)
DECODE(f16, 0, VALUE_F16, PART_F16, NO_SCALE)
DECODE(bf16, 0, VALUE_BF16, PART_BF16, NO_SCALE)
DECODE(int8, 1, VALUE_INT8, PART_INT8, SCALE_INT8)
DECODE(int4, 1, value_i4, PART_INT4, SCALE_INT4)
