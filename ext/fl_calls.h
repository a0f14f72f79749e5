/* A call of an operator with all it needs, so that it can be made again without the interpreter.
 *
 * What a call points to belongs to whoever keeps it.  Of a token's calls only the position changes
 * from token to token: rows of the rope's tables and of the KV cache are found by it. */
#ifndef FL_CALLS_H
#define FL_CALLS_H

#include "fl_kernels.h"

typedef enum {
    FL_CALL_PREPARE,
    FL_CALL_LINEAR,
    FL_CALL_NEURONS,
    FL_CALL_ACTIVATE,
    FL_CALL_ACCUMULATE,
    FL_CALL_LOW_BIT,
    FL_CALL_ABOVE,
    FL_CALL_DECIDED,
    FL_CALL_RMS_NORM,
    FL_CALL_LAYER_NORM,
    FL_CALL_ADD_RMS_NORM,
    FL_CALL_ATTEND_TOKEN,
    FL_CALL_CLEAR,
    FL_CALL_ADD,
    FL_CALL_SCALE
} fl_call_kind;

/* PREPARE fills acts->q and acts->scales; LINEAR does so first where `prepares`. */
typedef struct {
    fl_acts acts;
    uint8_t *q;
    float *scales;
    int prepares;
    fl_piece piece;
    fl_items items;
    float *out;
    int64_t out_stride;
} fl_linear_call;

typedef struct {
    fl_acts acts;
    fl_piece first, second, down;
    int has_first, has_second;
    fl_items items;
    fl_activation kind;
    float *pre, *up, *y;
} fl_neurons_call;

typedef struct {
    fl_activation kind;
    const float *pre, *up;
    int64_t n;
    float *out;
} fl_activate_call;

typedef struct {
    const float *coef;
    int64_t coef_stride, n_tokens;
    fl_piece piece;
    fl_items items;
    float *y;
    int64_t y_stride;
} fl_accumulate_call;

typedef struct {
    fl_acts acts;
    const uint8_t *rows;
    int64_t n_rows, n_planes;
    float *out;
} fl_low_bit_call;

typedef struct {
    const float *values, *cut;
    int64_t n;
    int32_t *ids;
    int64_t *count;
} fl_above_call;

/* Of `items` the first *count, which a call before has put there; *added of them are added. */
typedef struct {
    fl_acts acts;
    fl_piece deciding, second, down;
    int has_deciding, has_second;
    fl_items items;
    const int64_t *count;
    fl_activation kind;
    const float *bias;
    float *decided;
    int64_t n_decided;
    float *pre, *up, *y;
    int32_t *active;
    int64_t *added;
} fl_decided_call;

/* x is written by ADD_RMS_NORM only. */
typedef struct {
    float *x;
    const float *added, *weight, *bias;
    int64_t n_rows, n;
    float eps;
    float *out;
} fl_norm_call;

/* token: cosines and sines are tables of n_positions rows, and so many the KV cache has room for. */
typedef struct {
    fl_token token;
    int64_t n_positions;
} fl_attend_call;

/* x = 0, x += added, x *= factor. */
typedef struct {
    float *x;
    const float *added;
    int64_t n;
    float factor;
} fl_vector_call;

typedef struct {
    fl_call_kind kind;
    int phase; /* what the caller was about, for clocks */
    union {
        fl_linear_call linear;
        fl_neurons_call neurons;
        fl_activate_call activate;
        fl_accumulate_call sums;
        fl_low_bit_call bits;
        fl_above_call above;
        fl_decided_call decided;
        fl_norm_call norm;
        fl_attend_call attend;
        fl_vector_call vector;
    };
} fl_call;

/* Make it; position >= 0: at this position and not at its own. */
fl_kernel_status fl_make_call(const fl_engine *e, const fl_call *call, int64_t position);

#endif
