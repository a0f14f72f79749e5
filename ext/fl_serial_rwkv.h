/* RWKV's kernels of the serial set, part of serial.c: sums in float64 over ascending keys, rounded
 * once; the memory is float32 from token to token.
 */

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static void mix_tokens(fl_share kind, const float *x, const float *before, const float *share,
                       size_t n, float *out)
{
    for (size_t c = 0; c < n; c++) {
        if (kind == FL_SHARE_NOW) {
            out[c] = before[c] + share[c] * (x[c] - before[c]);
        } else {
            float part = kind == FL_SHARE_PAST_PLUS ? share[c] + out[c] : share[c];
            out[c] = x[c] + part * (before[c] - x[c]);
        }
    }
}

static float larger_of(float a, float b) { return a > b ? a : b; }

static void rwkv4(const fl_rwkv4 *a, size_t from, size_t to)
{
    for (size_t t = 0; t < (size_t)a->n_tokens; t++)
        for (size_t c = from; c < to; c++) {
            size_t at = t * (size_t)a->n + c;
            float *sum = a->numerator + c, *weight = a->denominator + c, *top = a->exponent + c;
            float now = a->first[c] + a->k[at], most = larger_of(*top, now);
            float old = expf(*top - most), new = expf(now - most);
            float average = (old * *sum + new * a->v[at]) / (old * *weight + new);
            a->out[at] = sigmoid(a->r[at]) * average;
            float faded = *top + a->decay[c];
            *top = larger_of(faded, a->k[at]);
            old = expf(faded - *top), new = expf(a->k[at] - *top);
            *sum = old * *sum + new * a->v[at];
            *weight = old * *weight + new;
        }
}

static void rwkv5(const fl_rwkv5 *a, size_t head)
{
    size_t d = (size_t)a->head_dim, n = (size_t)a->n_heads * d, start = head * d;
    float own[FL_MAX_RWKV_HEAD], *memory = a->memory + head * d * d;
    for (size_t t = 0; t < (size_t)a->n_tokens; t++) {
        size_t at = t * n + start;
        for (size_t i = 0; i < d; i++) {
            float z = a->decay[a->decay_bias ? at + i : start + i];
            own[i] = a->decay_bias ? expf(-expf(z + a->decay_bias[start + i])) : z;
        }
        float *out = a->out + at;
        for (size_t c = 0; c < d; c++) {
            double sum = 0;
            for (size_t i = 0; i < d; i++) {
                float *place = memory + i * d + c, term = a->k[at + i] * a->v[at + c];
                sum += (double)a->r[at + i] * (a->first[start + i] * term + *place);
                *place = own[i] * *place + term;
            }
            out[c] = (float)sum;
        }
        layer_norm(out, a->norm_weight + start, a->norm_bias + start, d, a->eps, out);
        if (a->gate) activate(FL_SILU, a->gate + at, out, d, out);
    }
}

static void rwkv7(const fl_rwkv7 *a, size_t head)
{
    size_t d = (size_t)a->head_dim, n = (size_t)a->n_heads * d, start = head * d;
    float unit[FL_MAX_RWKV_HEAD], unlearn[FL_MAX_RWKV_HEAD];
    float key[FL_MAX_RWKV_HEAD], decay[FL_MAX_RWKV_HEAD];
    float *memory = a->memory + head * d * d;
    for (size_t t = 0; t < (size_t)a->n_tokens; t++) {
        size_t at = t * n + start;
        const float *r = a->r + at;
        float *v = a->v + at, *out = a->out + at;
        double squares = 0, bonus = 0;
        for (size_t i = 0; i < d; i++) {
            size_t s = start + i;
            decay[i] = expf(-0.606531f * sigmoid(a->decay[at + i] + a->decay_bias[s]));
            float rate = sigmoid(a->rate[at + i] + a->rate_bias[s]), plain = a->k[at + i];
            unit[i] = plain * a->key_unit[s];
            squares += (double)unit[i] * unit[i];
            unlearn[i] = rate;
            key[i] = plain * (1.0f + (rate - 1.0f) * a->key_rate[s]);
            bonus += (double)(r[i] * key[i]) * a->bonus[s];
            if (a->share)
                v[i] += (a->first_v[at + i] - v[i]) *
                        sigmoid(a->share[at + i] + a->share_bias[s]);
            else
                a->first_v[at + i] = v[i];
        }
        float length = larger_of((float)sqrt(squares), 1e-12f);
        for (size_t i = 0; i < d; i++) {
            unit[i] /= length;
            unlearn[i] *= unit[i];
        }
        for (size_t c = 0; c < d; c++) {
            double found = 0, sum = 0;
            for (size_t i = 0; i < d; i++) found += (double)unit[i] * memory[i * d + c];
            for (size_t i = 0; i < d; i++) {
                float *place = memory + i * d + c;
                *place = *place * decay[i] - unlearn[i] * (float)found + key[i] * v[c];
                sum += (double)r[i] * *place;
            }
            out[c] = (float)sum;
        }
        layer_norm(out, a->norm_weight + start, a->norm_bias + start, d, a->eps, out);
        for (size_t c = 0; c < d; c++)
            out[c] = (out[c] + (float)bonus * v[c]) * a->gate[at + c];
    }
}
