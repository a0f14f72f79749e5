/* Dots, accumulate and decode of the vector sets, written once over the words of the including set:
 *
 *   FN, KERNEL         qualifiers (inlined helper, table entry) with the set's target attribute
 *   W                  lanes of vf; DOT_T, SUM_T tokens in a register block
 *   vf                 v_zero v_set1 v_load v_store v_load_part v_store_part v_add v_mul v_fma
 *   weights from bytes load_f32|f16|bf16 (p), the same with _part (p, n), load_i8 (p),
 *                      load_i4 (p, shift)
 *   wi, xi             W / 8 groups of integer weights: w_int8 w_int4 (p, groups), stored as they
 *                      are plus INT8_ZERO or INT4_ZERO; of activations: x_int (q, zero), which
 *                      takes that off again; w_dot (wi, xi) -> exact sums of 4 products
 *   spread             (v, k): lanes k * W / 8 … of v, each for the 8 lanes of its group
 *   sum4, store4       the trees of four accumulators side by side
 *
 * A _part takes 1..W values.  The order of every sum is in docs/ARITHMETIC.md; a block of R rows
 * and T tokens is R x T dots with the pattern of one.
 */

enum { R_BLOCK = 4 };            /* rows whose accumulators are live together */
enum { ROWS_PER_PASS = 8 };      /* rows that a tile of y meets before it is stored */
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

/* One token is bound by memory.  Rows that lie one behind the other are walked one by one: a single
 * stream is what the processor's own prefetcher follows (measured, one thread: 23 GB/s, against 11
 * in blocks of four rows).  Not every processor's looks far enough: lines are asked for FURTHER bytes
 * before their turn too (two threads of a Xeon: 28 GB/s, against 19; 4 KiB and 16 KiB give 27; an
 * EPYC's neither gain nor lose).  Rows here and there are walked R_BLOCK at a time
 * while those AHEAD of them are asked for (13 GB/s, against 9 one by one).  All into the second-level
 * cache: the first is too small to be asked in advance (24 GB/s). */
enum { AHEAD = 8, FURTHER = 8192 };

static int in_sequence(const uint8_t *const *rows, size_t n_rows, size_t row_bytes)
{
    size_t near = 0;
    for (size_t r = 1; r < n_rows; r++) near += (size_t)(rows[r] - rows[r - 1]) <= 2 * row_bytes;
    return 4 * near >= 3 * n_rows;
}

/* Walk rows by R_BLOCK and tokens by DOT_T. */
#define DOT(NAME, BLOCK, GROUP_BYTES)                                                              \
    KERNEL void NAME(const fl_acts *acts, const uint8_t *const *rows, size_t n_rows, float *out,   \
                     size_t stride)                                                                \
    {                                                                                              \
        size_t r = 0, T = (size_t)acts->n_tokens;                                                  \
        const size_t groups = ((size_t)acts->n_cols + FL_GROUP - 1) / FL_GROUP;                    \
        const int one_by_one = T == 1 && in_sequence(rows, n_rows, groups * (GROUP_BYTES));        \
        for (; !one_by_one && r + R_BLOCK <= n_rows; r += R_BLOCK) {                               \
            const size_t ahead = r + AHEAD + R_BLOCK <= n_rows ? r + AHEAD : r;                    \
            size_t t = 0;                                                                          \
            for (; t + DOT_T <= T; t += DOT_T)                                                     \
                BLOCK(R_BLOCK, DOT_T, acts, rows + r, NULL, t, out + t * stride + r, stride);      \
            for (; t < T; t++)                                                                     \
                BLOCK(R_BLOCK, 1, acts, rows + r, rows + ahead, t, out + t * stride + r, stride);  \
        }                                                                                          \
        for (; one_by_one && r < n_rows; r++) {                                                    \
            const uint8_t *further = rows[r] + FURTHER;                                            \
            BLOCK(1, 1, acts, rows + r, &further, 0, out + r, stride);                             \
        }                                                                                          \
        for (; r < n_rows; r++)                                                                    \
            for (size_t t = 0; t < T; t++)                                                         \
                BLOCK(1, 1, acts, rows + r, NULL, t, out + t * stride + r, stride);                \
    }

#define FLOAT_STEP(LOADED, AT, X)                                                                  \
    vf w[R_BLOCK];                                                                                 \
    EACH (r, R) {                                                                                  \
        w[r] = LOADED;                                                                             \
        if (next) __builtin_prefetch(next[r] + AT, 0, 2);                                          \
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
    DOT(dot_##TYPE, block_##TYPE, SIZE * FL_GROUP)
FLOAT_DOT(f32, 4)
FLOAT_DOT(f16, 2)
FLOAT_DOT(bf16, 2)

/* Left rolled: a prefetcher that tells streams by the instruction that loads then sees one, line by
 * line.  Eight loads, which the compiler also reorders, see every eighth line each (one thread, rows
 * of 2 KiB out of memory: 13.5 GB/s unrolled, 20 rolled; out of the second-level cache 42 and 36). */
#define ROLLED _Pragma("GCC unroll 1")

/* Chunk k of a span of up to W groups from group g: CHUNK groups, or the last one alone.  With one
 * token ws[r] already holds the products of the scales. */
#define INTEGER_STEP(ZERO, k, GROUPS)                                                              \
    {                                                                                              \
        const size_t at = g + (size_t)(k) * CHUNK;                                                 \
        xi x[DOT_T];                                                                               \
        vf xk[DOT_T];                                                                              \
        EACH (t, T) {                                                                              \
            x[t] = x_int(q + (size_t)t * q_stride + at * FL_GROUP, ZERO);                          \
            if (T > 1) xk[t] = spread(xs[t], k);                                                   \
        }                                                                                          \
        EACH (r, R) {                                                                              \
            wi w = w_int(rows[r] + at * group_bytes, GROUPS);                                      \
            if (next) __builtin_prefetch(next[r] + at * group_bytes, 0, 2);                        \
            vf wk = spread(ws[r], k);                                                              \
            EACH (t, T)                                                                            \
                acc[r][t] = v_fma(w_dot(w, x[t]), T == 1 ? wk : v_mul(wk, xk[t]), acc[r][t]);      \
        }                                                                                          \
    }

/* Scales of a span, W groups at once: widening and multiplying them one by one took as long as the
 * products themselves. */
#define SPAN_SCALES(LOADED)                                                                        \
    vf xs[DOT_T], ws[R_BLOCK];                                                                     \
    EACH (t, T) xs[t] = v_load(scales + (size_t)t * scale_stride + g);                             \
    EACH (r, R) {                                                                                  \
        const size_t ws_offset = groups * group_bytes + 2 * g;                                     \
        const uint8_t *ws_at = rows[r] + ws_offset;                                                \
        if (next) __builtin_prefetch(next[r] + ws_offset, 0, 2);                                   \
        ws[r] = LOADED;                                                                            \
        if (T == 1) ws[r] = v_mul(ws[r], xs[0]);                                                   \
    }

#define INTEGER_DOT(TYPE, GROUP_BYTES, ZERO)                                                       \
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
        for (; g + W <= groups; g += W) {                                                          \
            SPAN_SCALES(load_f16(ws_at))                                                           \
            if (T == 1) {                                                                          \
                ROLLED for (int k = 0; k < W / CHUNK; k++) INTEGER_STEP(ZERO, k, CHUNK)            \
            } else {                                                                               \
                EACH (k, W / CHUNK) INTEGER_STEP(ZERO, k, CHUNK)                                   \
            }                                                                                      \
        }                                                                                          \
        if (g < groups) {                                                                          \
            const size_t rest = groups - g;                                                        \
            int k = 0;                                                                             \
            SPAN_SCALES(load_f16_part(ws_at, rest))                                                \
            for (; (size_t)(k + 1) * CHUNK <= rest; k++) INTEGER_STEP(ZERO, k, CHUNK)              \
            if (CHUNK > 1 && (size_t)k * CHUNK < rest) INTEGER_STEP(ZERO, k, 1)                    \
        }                                                                                          \
        finish(R, T, acc, out, stride);                                                            \
    }                                                                                              \
    DOT(dot_##TYPE, block_##TYPE, GROUP_BYTES + 2)
#define w_int w_int8
INTEGER_DOT(int8, 32, INT8_ZERO)
#undef w_int
#define w_int w_int4
INTEGER_DOT(int4, 16, INT4_ZERO)
#undef w_int

/* --------------------------------------------------------------------------------- accumulate */

/* VALUE(row, c): W values from column c; PART(row, c, n): the first n of them; SCALES(row, n_cols):
 * the row's scales, looked at with SCALED 1 only.  BITS of a value say where the next rows' lines
 * are: they are fetched while these are computed.
 *
 * A term's factor is coef * scale, one for each row and group: those of ROWS_PER_PASS rows and W
 * groups are made together, W at a time, and then broadcast from memory, which costs nothing. */
typedef float factors[SUM_T][ROWS_PER_PASS][W];

#define ACCUMULATE(TYPE, BITS, SCALED, VALUE, PART, SCALES)                                        \
    FN void factors_##TYPE(const int T, const float *coef, size_t coef_stride,                     \
                           const uint8_t *const *rows, size_t n_rows, size_t n_cols, size_t g,     \
                           size_t n, factors s)                                                    \
    {                                                                                              \
        for (size_t r = 0; r < n_rows; r++) {                                                      \
            vf scale = SCALED ? load_scales(SCALES(rows[r], n_cols) + 2 * g, n) : v_set1(1.0f);    \
            EACH (t, T)                                                                            \
                v_store(s[t][r], v_mul(v_set1(coef[(size_t)t * coef_stride + r]), scale));         \
        }                                                                                          \
    }                                                                                              \
    /* T tokens x G groups of columns from c, which is group g of s. */                            \
    FN void tile_##TYPE(const int T, const int G, factors s, size_t g0,                            \
                        const uint8_t *const *rows, const uint8_t *const *next, size_t n_rows,     \
                        size_t c, float *y, size_t y_stride)                                       \
    {                                                                                              \
        vf acc[SUM_T][2 * V_GROUP];                                                                \
        EACH (t, T)                                                                                \
            EACH (v, G * V_GROUP)                                                                  \
                acc[t][v] = v_load(y + (size_t)t * y_stride + c + (size_t)(v * W));                \
        for (size_t r = 0; r < n_rows; r++) {                                                      \
            if (T == 1)                                                                            \
                for (size_t at = 0; at < (size_t)(G * FL_GROUP * BITS / 8); at += 64)              \
                    __builtin_prefetch(next[r] + c * BITS / 8 + at, 0, 2);                         \
            EACH (v, G * V_GROUP) {                                                                \
                vf w = VALUE(rows[r], c + (size_t)(v * W));                                        \
                EACH (t, T)                                                                        \
                    acc[t][v] = v_fma(v_set1(s[t][r][g0 + (size_t)(v / V_GROUP)]), w, acc[t][v]);  \
            }                                                                                      \
        }                                                                                          \
        EACH (t, T)                                                                                \
            EACH (v, G * V_GROUP)                                                                  \
                v_store(y + (size_t)t * y_stride + c + (size_t)(v * W),                            \
                        v_add(acc[t][v], v_zero()));                                               \
    }                                                                                              \
    /* One token, the fewer than 32 columns from c to last. */                                     \
    FN void tail_##TYPE(factors s, size_t g0, const uint8_t *const *rows, size_t n_rows, size_t c, \
                        size_t last, float *y)                                                     \
    {                                                                                              \
        for (; c < last; c += W) {                                                                 \
            size_t n = last - c < W ? last - c : W;                                                \
            vf acc = v_load_part(y + c, n);                                                        \
            for (size_t r = 0; r < n_rows; r++)                                                    \
                acc = v_fma(v_set1(s[0][r][g0]), PART(rows[r], c, n), acc);                        \
            v_store_part(y + c, v_add(acc, v_zero()), n);                                          \
        }                                                                                          \
    }                                                                                              \
    /* T tokens, up to ROWS_PER_PASS rows, up to W groups of columns from first. */                \
    FN void panel_##TYPE(const int T, const float *coef, size_t coef_stride,                       \
                         const uint8_t *const *rows, const uint8_t *const *next, size_t n_rows,    \
                         size_t n_cols, size_t first, size_t last, float *y, size_t y_stride)      \
    {                                                                                              \
        factors s;                                                                                 \
        const size_t whole = first + (last - first) / FL_GROUP * FL_GROUP;                         \
        size_t c = first, g = 0;                                                                   \
        factors_##TYPE(T, coef, coef_stride, rows, n_rows, n_cols, first / FL_GROUP,               \
                       (last - first + FL_GROUP - 1) / FL_GROUP, s);                               \
        for (; T == 1 && c + 2 * FL_GROUP <= whole; c += 2 * FL_GROUP, g += 2)                     \
            tile_##TYPE(T, 2, s, g, rows, next, n_rows, c, y, y_stride);                           \
        for (; c < whole; c += FL_GROUP, g++)                                                      \
            tile_##TYPE(T, 1, s, g, rows, next, n_rows, c, y, y_stride);                           \
        for (size_t t = 0; c < last && t < (size_t)T; t++)                                         \
            tail_##TYPE(s + t, g, rows, n_rows, c, last, y + t * y_stride);                        \
    }                                                                                              \
    KERNEL void accumulate_##TYPE(const float *coef, size_t coef_stride, size_t n_tokens,          \
                                  const uint8_t *const *rows, size_t n_rows, size_t n_cols,        \
                                  size_t first, size_t last, float *y, size_t y_stride)            \
    {                                                                                              \
        for (; n_rows > 0; n_rows -= smaller_of(n_rows, ROWS_PER_PASS), rows += ROWS_PER_PASS,     \
                           coef += ROWS_PER_PASS) {                                                \
            const size_t k = smaller_of(n_rows, ROWS_PER_PASS);                                    \
            const size_t ahead = n_rows >= 2 * ROWS_PER_PASS ? ROWS_PER_PASS : 0;                  \
            for (size_t c = first; c < last; c += W * FL_GROUP) {                                  \
                const size_t stop = smaller_of(last, c + W * FL_GROUP);                            \
                size_t t = 0;                                                                      \
                for (; t + SUM_T <= n_tokens; t += SUM_T)                                          \
                    panel_##TYPE(SUM_T, coef + t * coef_stride, coef_stride, rows, rows + ahead,   \
                                 k, n_cols, c, stop, y + t * y_stride, y_stride);                  \
                for (; t < n_tokens; t++)                                                          \
                    panel_##TYPE(1, coef + t * coef_stride, coef_stride, rows, rows + ahead, k,    \
                                 n_cols, c, stop, y + t * y_stride, y_stride);                     \
            }                                                                                      \
        }                                                                                          \
    }

FN size_t smaller_of(size_t a, size_t b) { return a < b ? a : b; }

/* W values of a group of 32 nibbles lie in one half of each of W bytes. */
FN vf value_i4(const uint8_t *row, size_t c)
{
    return load_i4(row + c / 32 * 16 + c % 16, c % 32 < 16 ? 0 : 4);
}

FN vf load_scales(const uint8_t *p, size_t n) { return n == W ? load_f16(p) : load_f16_part(p, n); }

#define NO_SCALES(row, n_cols) (row)
#define SCALES_INT8(row, n_cols) ((row) + ((n_cols) + 31) / 32 * 32)
#define SCALES_INT4(row, n_cols) ((row) + ((n_cols) + 31) / 32 * 16)
#define VALUE_F32(row, c) load_f32((row) + 4 * (c))
#define VALUE_F16(row, c) load_f16((row) + 2 * (c))
#define VALUE_BF16(row, c) load_bf16((row) + 2 * (c))
#define VALUE_INT8(row, c) load_i8((row) + (c))
#define PART_F32(row, c, n) load_f32_part((row) + 4 * (c), n)
#define PART_F16(row, c, n) load_f16_part((row) + 2 * (c), n)
#define PART_BF16(row, c, n) load_bf16_part((row) + 2 * (c), n)
#define PART_INT8(row, c, n) load_i8((row) + (c)) /* groups are padded: whole vectors may be read */
#define PART_INT4(row, c, n) value_i4(row, c)
ACCUMULATE(f32, 32, 0, VALUE_F32, PART_F32, NO_SCALES)
ACCUMULATE(f16, 16, 0, VALUE_F16, PART_F16, NO_SCALES)
ACCUMULATE(bf16, 16, 0, VALUE_BF16, PART_BF16, NO_SCALES)
ACCUMULATE(int8, 8, 1, VALUE_INT8, PART_INT8, SCALES_INT8)
ACCUMULATE(int4, 4, 1, value_i4, PART_INT4, SCALES_INT4)

/* ------------------------------------------------------------------------------------- decode */

#define DECODE(TYPE, SCALED, VALUE, PART, SCALES)                                                  \
    KERNEL void decode_##TYPE(const uint8_t *row, size_t n_cols, float *out)                       \
    {                                                                                              \
        for (size_t c = 0; c < n_cols; c += W) {                                                   \
            size_t n = smaller_of(W, n_cols - c);                                                  \
            vf value = n == W ? VALUE(row, c) : PART(row, c, n);                                   \
            const uint8_t *scale = SCALES(row, n_cols) + c / FL_GROUP * 2;                         \
            v_store_part(out + c, SCALED ? v_mul(value, load_scale(scale)) : value, n);            \
        }                                                                                          \
    }
DECODE(f32, 0, VALUE_F32, PART_F32, NO_SCALES)
DECODE(f16, 0, VALUE_F16, PART_F16, NO_SCALES)
DECODE(bf16, 0, VALUE_BF16, PART_BF16, NO_SCALES)
DECODE(int8, 1, VALUE_INT8, PART_INT8, SCALES_INT8)
DECODE(int4, 1, value_i4, PART_INT4, SCALES_INT4)
