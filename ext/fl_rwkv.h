/* RWKV's time-mix between its matrices: arguments of the operators and of the kernels.
 *
 * Arrays of tokens are [n_tokens, n] floats with n = n_heads * head_dim, vectors are [n]; a memory
 * is [n_heads, head_dim keys, head_dim values].  What is computed, and in which order every sum
 * runs, is in docs/ARITHMETIC.md, "Recurrences".  kernels/recurrent.py has checked every shape.
 */
#ifndef FL_RWKV_H
#define FL_RWKV_H

#include <stdint.h>

enum { FL_MAX_RWKV_HEAD = 512 }; /* head_dim: what the kernels keep of a head on their stack */

typedef enum {
    FL_SHARE_NOW,      /* before + share * (x - before) */
    FL_SHARE_PAST,     /* x + share * (before - x) */
    FL_SHARE_PAST_PLUS /* x + (share + out) * (before - x) */
} fl_share;

typedef struct {
    int64_t n_tokens, n;
    const float *r, *k, *v;
    const float *decay, *first;
    float *numerator, *denominator, *exponent; /* [n]: the memory */
    float *out;                                /* may be r */
} fl_rwkv4;

typedef struct {
    int64_t n_tokens, n_heads, head_dim;
    float eps;
    const float *r, *k, *v, *gate; /* gate may be NULL */
    const float *decay;            /* [n], or [n_tokens, n] where decay_bias is given */
    const float *decay_bias;       /* NULL, or: the decay is exp(-exp(decay + decay_bias)) */
    const float *first, *norm_weight, *norm_bias;
    float *memory, *out;
} fl_rwkv5;

typedef struct {
    int64_t n_tokens, n_heads, head_dim;
    float eps;
    const float *r, *decay, *k, *rate, *gate;
    float *v;           /* becomes what is remembered: drawn towards first_v */
    const float *share; /* how far, before bias and sigmoid; NULL in the first layer, where */
    float *first_v;     /* first_v is written instead */
    const float *decay_bias, *rate_bias, *share_bias;
    const float *key_unit, *key_rate, *bonus, *norm_weight, *norm_bias;
    float *memory, *out;
} fl_rwkv7;

#endif
