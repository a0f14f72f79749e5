/* Compare one compiled kernel set with serial, and with itself in other divisions, without Python:
 * what a machine that is only emulated here can run.  Prints each failure; the exit status is their
 * number (at most 100).  Usage: compare_sets <kernel set>
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fl_kernels.h"
#include "fl_quant.h"

enum { N_ROWS = 37, N_TOKENS = 21, MAX_N = 400, N_CONTEXT = 70 };

static int failures;

static void expect(int good, const char *what, int type, size_t n, double a, double b)
{
    if (good) return;
    printf("%s: type %d, n %zu: %.9g against %.9g\n", what, type, n, a, b);
    failures += failures < 100;
}

static uint32_t state = 1;

static uint32_t next_word(void)
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static float next_float(void) { return (float)next_word() / 8388608.0f - 1.0f; }

static int below_one_in(uint32_t n) { return next_word() % n == 0; }

static void *plane[N_ROWS];
static uint64_t addresses[N_ROWS];

/* Random valid rows: any bits for levels, moderate halves for scales and floats.  Each is a frame
 * of its own that ends where the row ends, so that a sanitizer sees every byte read beyond. */
static fl_piece fill(int type, size_t n)
{
    size_t groups = (n + 31) / 32;
    for (size_t r = 0; r < N_ROWS; r++) {
        size_t levels = type == FL_INT8 ? groups * 32 : type == FL_INT4 ? groups * 16 : 0;
        size_t row_bytes = levels ? levels + 2 * groups : n * (type == FL_F32 ? 4 : 2);
        free(plane[r]);
        plane[r] = malloc(16 + row_bytes);
        if (!plane[r]) exit(102);
        addresses[r] = (uint64_t)(uintptr_t)plane[r];
        uint8_t *row = (uint8_t *)plane[r] + 16;
        for (size_t i = 0; i < levels; i++) {
            row[i] = (uint8_t)next_word();
            if (type == FL_INT8 && row[i] == 0x80) row[i] = 0; /* q >= -127 */
        }
        size_t halves = levels ? groups : n;
        for (size_t i = 0; i < halves; i++) {
            float value = next_float();
            uint16_t f16 = (uint16_t)(0x2000 + (next_word() & 0x1bff)); /* up to 2, some tiny */
            uint16_t bf16 = (uint16_t)(fl_bits(value) >> 16);
            f16 |= (uint16_t)(next_word() & 0x8000);
            if (type == FL_F32) memcpy(row + 4 * i, &value, 4);
            if (type != FL_F32) memcpy(row + levels + 2 * i, type == FL_BF16 ? &bf16 : &f16, 2);
        }
    }
    return (fl_piece){type, 1, 1 << 20, 16, (int64_t)n};
}

static void check_rows(const fl_engine *serial, const fl_engine *ours, int type, size_t n)
{
    static float x[N_TOKENS * MAX_N], coef[N_TOKENS * N_ROWS], scales[2][N_TOKENS * 16];
    static uint8_t q[2][2 * N_TOKENS * (MAX_N + 128) + 64];
    static float out[3][N_TOKENS * N_ROWS], y[3][N_TOKENS * MAX_N], decoded[2][N_ROWS * MAX_N];
    fl_piece piece = fill(type, n);
    fl_items all = {addresses, N_ROWS, NULL, 0, N_ROWS};
    int64_t q_stride = (int64_t)(n + 63) / 64 * 64, acts_n = (int64_t)n;
    for (size_t i = 0; i < N_TOKENS * n; i++) x[i] = next_float();
    for (size_t i = 0; i < N_TOKENS * N_ROWS; i++) coef[i] = next_float();
    const fl_engine *engines[2] = {serial, ours};
    for (int e = 0; e < 2; e++) {
        int64_t at = fl_tiles_at(engines[e], q[e], sizeof q[e], N_TOKENS, q_stride, 16);
        fl_acts acts = {x, q[e], scales[e], N_TOKENS, acts_n, q_stride, 16, at ? q[e] + at : NULL};
        fl_op_prepare(engines[e], x, N_TOKENS, acts_n, q[e], q_stride, scales[e], 16, acts.tiles);
        fl_op_dot(engines[e], &acts, &piece, &all, out[e], N_ROWS);
        fl_op_decode(engines[e], &piece, &all, decoded[e]);
        for (size_t i = 0; i < N_TOKENS * n; i++) y[e][i] = x[i];
        fl_op_accumulate(engines[e], coef, N_ROWS, N_TOKENS, &piece, &all, y[e], (int64_t)n);
    }
    expect(!memcmp(decoded[0], decoded[1], N_ROWS * n * 4), "decode", type, n, 0, 0);
    for (size_t t = 0; t < N_TOKENS; t++) {
        for (size_t r = 0; r < N_ROWS; r++) {
            double a = out[0][t * N_ROWS + r], b = out[1][t * N_ROWS + r], terms = 0;
            for (size_t c = 0; c < n; c++)
                terms += fabs((double)decoded[0][r * n + c] * x[t * n + c]);
            expect(fabs(a - b) <= terms * 0x1p-20 * 1.1 + 1e-30, "dot", type, n, a, b);
        }
        for (size_t c = 0; c < n; c++) {
            double a = y[0][t * n + c], b = y[1][t * n + c], partial = fabs(x[t * n + c]);
            for (size_t r = 0; r < N_ROWS; r++)
                partial += fabs((double)coef[t * N_ROWS + r] * decoded[0][r * n + c]);
            expect(fabs(a - b) <= partial * 0x1p-22 * (N_ROWS + 1), "accumulate", type, n, a, b);
        }
    }
    /* Token by token, ids instead of a range, one call per item: the same bits. */
    for (int64_t t = 0; t < N_TOKENS; t++) {
        const float *token = x + t * (int64_t)n;
        fl_acts one = {token, q[1] + t * q_stride, scales[1] + t * 16, 1, acts_n, q_stride, 16, NULL};
        for (size_t i = 0; i < n; i++) y[2][(size_t)t * n + i] = x[(size_t)t * n + i];
        for (int32_t r = 0; r < N_ROWS; r++) {
            fl_items item = {addresses, N_ROWS, &r, 0, 1};
            fl_op_dot(ours, &one, &piece, &item, out[2] + t * N_ROWS + r, N_ROWS);
            fl_op_accumulate(ours, coef + t * N_ROWS + r, N_ROWS, 1, &piece, &item,
                             y[2] + t * (int64_t)n, (int64_t)n);
        }
    }
    expect(!memcmp(out[1], out[2], sizeof out[1]), "dot bits", type, n, 0, 0);
    expect(!memcmp(y[1], y[2], N_TOKENS * n * 4), "accumulate bits", type, n, 0, 0);
}

/* A file's rows may hold any bits and lists of items may lie: a status says so, and a sanitizer that
 * nothing beyond a row was touched. */
static void check_any_bytes(const fl_engine *e, int type, size_t n)
{
    static float x[N_TOKENS * MAX_N], coef[N_TOKENS * N_ROWS], scales[N_TOKENS * 16];
    static float out[N_TOKENS * N_ROWS], y[N_TOKENS * MAX_N], decoded[N_ROWS * MAX_N];
    static uint8_t q[2 * N_TOKENS * (MAX_N + 128) + 64];
    static const struct {
        int32_t ids[2];
        fl_kernel_status dot, accumulate;
    } lists[] = {
        {{0, N_ROWS - 1}, FL_KERNEL_OK, FL_KERNEL_OK},
        {{0, N_ROWS}, FL_OUT_OF_RANGE, FL_OUT_OF_RANGE},
        {{-1, 0}, FL_OUT_OF_RANGE, FL_OUT_OF_RANGE},
        {{INT32_MIN, INT32_MAX}, FL_OUT_OF_RANGE, FL_OUT_OF_RANGE},
        {{3, 3}, FL_NOT_ASCENDING, FL_NOT_ASCENDING},
        {{4, 5}, FL_ABSENT_FRAME, FL_ABSENT_FRAME},
        {{6, 7}, FL_MISALIGNED, FL_MISALIGNED},
    };
    const fl_piece piece = fill(type, n);
    const int64_t q_stride = (int64_t)(n + 63) / 64 * 64, groups = (int64_t)(n + 31) / 32;
    const size_t row_bytes = type == FL_INT8   ? (size_t)groups * 34
                             : type == FL_INT4 ? (size_t)groups * 18
                                               : n * (type == FL_F32 ? 4 : 2);
    for (size_t r = 0; r < N_ROWS; r++)
        for (size_t i = 0; i < row_bytes; i++)
            ((uint8_t *)plane[r])[16 + i] = below_one_in(4) ? 0xff : (uint8_t)next_word();
    for (size_t i = 0; i < N_TOKENS * n; i++) x[i] = next_float();
    const int64_t at = fl_tiles_at(e, q, sizeof q, N_TOKENS, q_stride, 16);
    const fl_acts acts = {x, q, scales, N_TOKENS, (int64_t)n, q_stride, 16, at ? q + at : NULL};
    fl_op_prepare(e, x, N_TOKENS, (int64_t)n, q, q_stride, scales, 16, acts.tiles);
    const fl_items all = {addresses, N_ROWS, NULL, 0, N_ROWS};
    expect(fl_op_dot(e, &acts, &piece, &all, out, N_ROWS) == FL_KERNEL_OK, "any dot", type, n, 0, 0);
    fl_op_decode(e, &piece, &all, decoded);
    fl_op_accumulate(e, coef, N_ROWS, N_TOKENS, &piece, &all, y, (int64_t)n);
    addresses[5] = 0;
    addresses[7] += 8;
    for (size_t k = 0; k < sizeof lists / sizeof *lists; k++) {
        const fl_items two = {addresses, N_ROWS, lists[k].ids, 0, 2};
        const fl_kernel_status dot = fl_op_dot(e, &acts, &piece, &two, out, N_ROWS);
        const fl_kernel_status sum = fl_op_accumulate(e, coef, N_ROWS, N_TOKENS, &piece, &two, y,
                                                      (int64_t)n);
        expect(dot == lists[k].dot, "status of dot", type, n, dot, lists[k].dot);
        expect(sum == lists[k].accumulate, "status of accumulate", type, n, sum,
               lists[k].accumulate);
    }
}

static void near(const char *what, size_t n, const float *a, const float *b, size_t count,
                 double rel)
{
    for (size_t i = 0; i < count; i++)
        expect(fabs((double)a[i] - b[i]) <= rel * (fabs((double)a[i]) + 1), what, -1, n, a[i],
               b[i]);
}

static void check_layers(const fl_engine *serial, const fl_engine *ours, size_t n)
{
    static float x[3 * MAX_N], w[MAX_N], b[MAX_N], out[2][3 * MAX_N];
    const fl_engine *engines[2] = {serial, ours};
    for (size_t i = 0; i < 3 * n; i++) x[i] = 4 * next_float();
    for (size_t i = 0; i < n; i++) w[i] = next_float(), b[i] = next_float();
    for (int e = 0; e < 2; e++) fl_op_rms_norm(engines[e], x, w, 3, (int64_t)n, 1e-5f, out[e]);
    near("rms_norm", n, out[0], out[1], 3 * n, 0x1p-20);
    for (int e = 0; e < 2; e++) fl_op_layer_norm(engines[e], x, w, b, 3, (int64_t)n, 1e-5f, out[e]);
    near("layer_norm", n, out[0], out[1], 3 * n, 0x1p-19);
    for (int kind = FL_SILU; kind <= FL_TANH; kind++) {
        for (int e = 0; e < 2; e++)
            fl_op_activate(engines[e], (fl_activation)kind, x, x, 3 * (int64_t)n, out[e]);
        near("activate", n, out[0], out[1], 3 * n, 0x1p-18);
    }
    for (int e = 0; e < 2; e++) {
        memcpy(out[e], x, 3 * n * 4);
        fl_op_rope(engines[e], out[e], w, b, 1, 3, (int64_t)n, (int64_t)n / 2);
    }
    near("rope", n, out[0], out[1], 3 * n, 0x1p-21);
}

static void check_attention(const fl_engine *serial, const fl_engine *ours, int64_t head_dim,
                            int64_t window)
{
    enum { HEADS = 6, KV_HEADS = 2, T = 7, FIRST = 50, MAX_D = 64 };
    static float q[T * HEADS * MAX_D], k[KV_HEADS * N_CONTEXT * MAX_D], out[3][T * HEADS * MAX_D];
    static float v[KV_HEADS * N_CONTEXT * MAX_D], scratch[4096];
    for (size_t i = 0; i < sizeof q / 4; i++) q[i] = 2 * next_float();
    for (size_t i = 0; i < sizeof k / 4; i++) k[i] = next_float(), v[i] = next_float();
    fl_attention a = {.q = q, .k = (const uint8_t *)k, .v = (const uint8_t *)v};
    a.kv_type = FL_F32, a.n_tokens = T, a.n_heads = HEADS, a.n_kv_heads = KV_HEADS;
    a.head_dim = head_dim, a.n_context = N_CONTEXT, a.first_position = FIRST;
    a.window = window, a.scale = 0.3f, a.scratch = scratch, a.out = out[0];
    fl_op_attention(serial, &a);
    a.out = out[1];
    fl_op_attention(ours, &a);
    size_t row = (size_t)(HEADS * head_dim);
    near("attention", (size_t)head_dim, out[0], out[1], T * row, 0x1p-17);
    a.n_tokens = 1;
    for (size_t t = 0; t < T; t++) {
        a.q = q + t * row;
        a.out = out[2] + t * row;
        a.first_position = FIRST + (int64_t)t;
        fl_op_attention(ours, &a);
    }
    expect(!memcmp(out[1], out[2], T * row * 4), "attention bits", -1, (size_t)head_dim, 0, 0);
}

enum { N_HEADS = 3, T_R = 4, MAX_R = N_HEADS * 70 };
static float tokens[8][T_R * MAX_R], vectors[8][MAX_R];
static float memory[3][MAX_R * 70], v_out[3][T_R * MAX_R], out_r[3][T_R * MAX_R];

/* One recurrence over tokens first .. first + n - 1, into results number `into`. */
static void recur(const fl_engine *e, int version, int64_t d, int into, int64_t first, int64_t n)
{
    int64_t width = N_HEADS * d, at = first * width;
    float *out = out_r[into] + at, *v = v_out[into] + at, *m = memory[into];
    if (version == 4) {
        fl_rwkv4 a = {.n_tokens = n, .n = width, .r = tokens[0] + at, .k = tokens[1] + at, .v = v};
        a.decay = vectors[6], a.first = vectors[0], a.out = out;
        a.numerator = m, a.denominator = m + width, a.exponent = m + 2 * width;
        fl_op_rwkv4(e, &a);
    } else if (version < 7) {
        fl_rwkv5 a = {.n_tokens = n, .n_heads = N_HEADS, .head_dim = d, .eps = 1e-3f, .v = v};
        a.r = tokens[0] + at, a.k = tokens[1] + at, a.gate = version == 6 ? tokens[2] + at : NULL;
        a.decay = version == 6 ? tokens[3] + at : vectors[0], a.first = vectors[1];
        a.decay_bias = version == 6 ? vectors[4] : NULL;
        a.norm_weight = vectors[2], a.norm_bias = vectors[3], a.memory = m, a.out = out;
        fl_op_rwkv5(e, &a);
    } else {
        fl_rwkv7 a = {.n_tokens = n, .n_heads = N_HEADS, .head_dim = d, .eps = 1e-3f, .v = v};
        a.r = tokens[0] + at, a.k = tokens[1] + at, a.gate = tokens[2] + at;
        a.decay = tokens[3] + at, a.rate = tokens[4] + at, a.first_v = tokens[6] + at;
        a.share = tokens[5] + at, a.share_bias = vectors[7];
        a.decay_bias = vectors[0], a.rate_bias = vectors[1], a.key_unit = vectors[2];
        a.key_rate = vectors[3], a.bonus = vectors[4], a.norm_weight = vectors[5];
        a.norm_bias = vectors[6], a.memory = m, a.out = out;
        fl_op_rwkv7(e, &a);
    }
}

static void check_rwkv(const fl_engine *serial, const fl_engine *ours, int version, int64_t d)
{
    size_t width = (size_t)(N_HEADS * d);
    for (size_t a = 0; a < 8; a++) {
        for (size_t i = 0; i < T_R * MAX_R; i++) tokens[a][i] = 2 * next_float();
        for (size_t i = 0; i < MAX_R; i++) vectors[a][i] = next_float();
    }
    for (size_t i = 0; i < MAX_R * 70; i++)
        memory[0][i] = memory[1][i] = memory[2][i] = 1.5f + 0.5f * next_float();
    for (size_t i = 0; i < T_R * MAX_R; i++)
        v_out[0][i] = v_out[1][i] = v_out[2][i] = next_float();
    recur(serial, version, d, 0, 0, T_R);
    recur(ours, version, d, 1, 0, T_R);
    for (int64_t t = 0; t < T_R; t++) recur(ours, version, d, 2, t, 1);
    near("rwkv", (size_t)d, out_r[0], out_r[1], T_R * width, 0x1p-13); /* a norm amplifies */
    near("rwkv memory", (size_t)d, memory[0], memory[1], MAX_R * 70, 0x1p-17);
    expect(!memcmp(out_r[1], out_r[2], T_R * width * 4), "rwkv bits", version, (size_t)d, 0, 0);
    expect(!memcmp(memory[1], memory[2], sizeof memory[1]), "rwkv memory bits", version,
           (size_t)d, 0, 0);
    const float *shares[2] = {vectors[0], vectors[1]};
    for (int kind = FL_SHARE_NOW; kind <= FL_SHARE_PAST_PLUS; kind++) {
        for (int e = 0; e < 2; e++) {
            memcpy(out_r[e], v_out[0], sizeof out_r[e]);
            fl_op_mix_tokens(e ? ours : serial, (fl_share)kind, tokens[0], vectors[2], shares, 2,
                             2, (int64_t)width, out_r[e]);
        }
        near("mix", width, out_r[0], out_r[1], 4 * width, 0x1p-20);
    }
}

int main(int argc, char **argv)
{
    const char *why, *name = argc > 1 ? argv[1] : "serial";
    fl_engine serial = {&fl_serial, NULL}, ours = {fl_find_kernel_set(name, &why), NULL};
    if (!ours.set) {
        printf("%s: %s\n", name, why);
        return 101;
    }
    ours.pool = fl_pool_create(3);
    static const size_t sizes[] = {1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 384};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int type = 0; type < FL_N_WEIGHT_TYPES; type++)
            check_rows(&serial, &ours, type, sizes[i]);
        for (int type = 0; type < FL_N_WEIGHT_TYPES; type++) check_any_bytes(&ours, type, sizes[i]);
        check_layers(&serial, &ours, sizes[i]);
    }
    for (int64_t window = 0; window < 40; window += 13) {
        check_attention(&serial, &ours, 64, window);
        check_attention(&serial, &ours, 20, window);
    }
    for (int version = 4; version <= 7; version++)
        for (int64_t d = 1; d <= 70; d += 23) check_rwkv(&serial, &ours, version, d);
    fl_pool_destroy(ours.pool);
    for (int r = 0; r < N_ROWS; r++) free(plane[r]);
    printf("%s: %d failures\n", name, failures);
    return failures;
}
