/* Norms, rope, softmax and activations of the vector sets, over the words listed in fl_simd_rows.h
 * and v_sub v_div v_fnma (c - a b) v_max v_min (a NaN in the second argument stays) v_round v_pow2
 * v_most.  A tail goes through the same instructions as whole vectors.
 */

FN float sum1(vf a)
{
    float out[4];
    store4(out, sum4(a, v_zero(), v_zero(), v_zero()), 1);
    return out[0];
}

/* `for` over vectors of n values: c the column, k how many of them. */
#define VECTORS(n) for (size_t c = 0, k; c < (n) && (k = smaller_of(W, (n) - c)); c += W)

KERNEL void rms_norm(const float *x, const float *weight, size_t n, float eps, float *out)
{
    vf squares = v_zero();
    VECTORS (n) {
        vf v = v_load_part(x + c, k);
        squares = v_fma(v, v, squares);
    }
    vf r = v_set1(1.0f / sqrtf(sum1(squares) / (float)n + eps));
    VECTORS (n)
        v_store_part(out + c, v_mul(v_mul(v_load_part(x + c, k), r), v_load_part(weight + c, k)),
                     k);
}

KERNEL void layer_norm(const float *x, const float *weight, const float *bias, size_t n, float eps,
                       float *out)
{
    vf sum = v_zero(), squares = v_zero();
    VECTORS (n) sum = v_add(sum, v_load_part(x + c, k));
    float mean = sum1(sum) / (float)n;
    VECTORS (n) {
        float means[W]; /* the mean in k lanes, so that the others stay 0 */
        for (size_t i = 0; i < W; i++) means[i] = mean;
        vf d = v_sub(v_load_part(x + c, k), v_load_part(means, k));
        squares = v_fma(d, d, squares);
    }
    vf r = v_set1(1.0f / sqrtf(sum1(squares) / (float)n + eps)), m = v_set1(mean);
    VECTORS (n) {
        vf scaled = v_mul(v_sub(v_load_part(x + c, k), m), r);
        v_store_part(out + c, v_fma(scaled, v_load_part(weight + c, k), v_load_part(bias + c, k)),
                     k);
    }
}

KERNEL void rope(float *x, const float *cosines, const float *sines, size_t half)
{
    VECTORS (half) {
        vf a = v_load_part(x + c, k), b = v_load_part(x + half + c, k);
        vf cosine = v_load_part(cosines + c, k), sine = v_load_part(sines + c, k);
        v_store_part(x + c, v_fnma(b, sine, v_mul(a, cosine)), k);
        v_store_part(x + half + c, v_fma(a, sine, v_mul(b, cosine)), k);
    }
}

/* e^x: see "Elementwise" in docs/ARITHMETIC.md.  The clamps lie just where float32 ends: e^89 is
 * infinite and e^-105 is zero after the two scalings. */
FN vf v_exp(vf x)
{
    x = v_max(v_set1(-105.0f), v_min(v_set1(89.0f), x));
    vf n = v_round(v_mul(x, v_set1(0x1.715476p+0f)));  /* x log2 e */
    vf r = v_fnma(n, v_set1(0x1.62e43p-1f), x);        /* ln 2, upper part */
    r = v_fnma(n, v_set1(-0x1.05c610ca86c39p-29f), r); /* and the rest of it */
    vf p = v_set1(1.0f / 5040);
    p = v_fma(p, r, v_set1(1.0f / 720));
    p = v_fma(p, r, v_set1(1.0f / 120));
    p = v_fma(p, r, v_set1(1.0f / 24));
    p = v_fma(p, r, v_set1(1.0f / 6));
    p = v_fma(p, r, v_set1(0.5f));
    p = v_fma(p, r, v_set1(1.0f));
    p = v_fma(p, r, v_set1(1.0f));
    vf first = v_round(v_mul(n, v_set1(0.5f)));
    return v_mul(v_mul(p, v_pow2(first)), v_pow2(v_sub(n, first)));
}

KERNEL float softmax(float *scores, size_t lo, size_t hi, float scale)
{
    /* Whole vectors counted from position 0, so that a lane is a position mod W. */
    size_t first = lo / W * W, last = (hi + W - 1) / W * W;
    for (size_t j = first; j < lo; j++) scores[j] = -INFINITY;
    for (size_t j = hi; j < last; j++) scores[j] = -INFINITY;
    vf most = v_set1(-INFINITY), sum = v_zero(), factor = v_set1(scale);
    for (size_t j = first; j < last; j += W) {
        vf score = v_mul(v_load(scores + j), factor);
        v_store(scores + j, score);
        most = v_max(most, score);
    }
    most = v_set1(v_most(most));
    for (size_t j = first; j < last; j += W) {
        vf e = v_exp(v_sub(v_load(scores + j), most));
        v_store(scores + j, e);
        sum = v_add(sum, e);
    }
    return 1.0f / sum1(sum);
}

KERNEL void scale_by(float *y, size_t n, float factor)
{
    vf f = v_set1(factor);
    VECTORS (n) v_store_part(y + c, v_mul(v_load_part(y + c, k), f), k);
}

FN vf v_silu(vf x) { return v_div(x, v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x)))); }

FN vf v_sigmoid(vf x)
{
    return v_div(v_set1(1.0f), v_add(v_set1(1.0f), v_exp(v_sub(v_zero(), x))));
}

FN vf v_tanh(vf x)
{
    vf both = v_add(v_set1(1.0f), v_exp(v_add(x, x)));
    return v_sub(v_set1(1.0f), v_div(v_set1(2.0f), both));
}

FN vf v_relu(vf x) { return v_max(v_zero(), x); }

FN vf v_relu2(vf x) { return v_mul(v_relu(x), v_relu(x)); }

FN vf v_gelu_tanh(vf x)
{
    vf cube = v_mul(v_mul(x, x), x);
    vf u = v_mul(v_set1(0.79788456f), v_fma(v_set1(0.044715f), cube, x));
    return v_div(x, v_add(v_set1(1.0f), v_exp(v_mul(v_set1(-2.0f), u))));
}

/* erf is libm's: gelu by erf is rare, and slow and exact beats fast with 1e-7 of error. */
FN vf v_gelu(vf x)
{
    float lanes[W];
    v_store(lanes, x);
    for (int i = 0; i < W; i++)
        lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0x1.6a09e6p-1f));
    return v_load(lanes);
}

#define ACTIVATE(FUNCTION)                                                                         \
    VECTORS (n) {                                                                                  \
        vf value = FUNCTION(v_load_part(pre + c, k));                                              \
        if (up) value = v_mul(value, v_load_part(up + c, k));                                      \
        v_store_part(out + c, value, k);                                                           \
    }

KERNEL void activate(fl_activation kind, const float *pre, const float *up, size_t n, float *out)
{
    switch (kind) {
    case FL_SILU: ACTIVATE(v_silu) break;
    case FL_RELU: ACTIVATE(v_relu) break;
    case FL_RELU2: ACTIVATE(v_relu2) break;
    case FL_GELU: ACTIVATE(v_gelu) break;
    case FL_GELU_TANH: ACTIVATE(v_gelu_tanh) break;
    case FL_SIGMOID: ACTIVATE(v_sigmoid) break;
    case FL_TANH: ACTIVATE(v_tanh) break;
    }
}
