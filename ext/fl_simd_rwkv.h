/* RWKV's kernels of the vector sets: lanes are channels (version 4) or values (the others), so that
 * every sum over keys is sequential.  After fl_simd_layers.h, with its words.
 */

KERNEL void mix_tokens(fl_share kind, const float *x, const float *before, const float *share,
                       size_t n, float *out)
{
    VECTORS (n) {
        vf now = v_load_part(x + c, k), past = v_load_part(before + c, k);
        vf part = v_load_part(share + c, k);
        if (kind == FL_SHARE_NOW) {
            v_store_part(out + c, v_fma(part, v_sub(now, past), past), k);
            continue;
        }
        if (kind == FL_SHARE_PAST_PLUS) part = v_add(part, v_load_part(out + c, k));
        v_store_part(out + c, v_fma(part, v_sub(past, now), now), k);
    }
}

KERNEL void rwkv4(const fl_rwkv4 *a, size_t from, size_t to)
{
    size_t n = (size_t)a->n;
    for (size_t c = from, k; c < to && (k = smaller_of(W, to - c)); c += W) {
        vf sum = v_load_part(a->numerator + c, k), weight = v_load_part(a->denominator + c, k);
        vf top = v_load_part(a->exponent + c, k);
        vf decay = v_load_part(a->decay + c, k), first = v_load_part(a->first + c, k);
        for (size_t at = c; at < (size_t)a->n_tokens * n; at += n) {
            vf key = v_load_part(a->k + at, k), value = v_load_part(a->v + at, k);
            vf now = v_add(first, key), most = v_max(top, now);
            vf old = v_exp(v_sub(top, most)), new = v_exp(v_sub(now, most));
            vf average = v_div(v_fma(old, sum, v_mul(new, value)), v_fma(old, weight, new));
            v_store_part(a->out + at, v_mul(v_sigmoid(v_load_part(a->r + at, k)), average), k);
            vf faded = v_add(top, decay);
            top = v_max(faded, key);
            old = v_exp(v_sub(faded, top)), new = v_exp(v_sub(key, top));
            sum = v_fma(old, sum, v_mul(new, value));
            weight = v_fma(old, weight, new);
        }
        v_store_part(a->numerator + c, sum, k);
        v_store_part(a->denominator + c, weight, k);
        v_store_part(a->exponent + c, top, k);
    }
}

KERNEL void rwkv5(const fl_rwkv5 *a, size_t head)
{
    size_t d = (size_t)a->head_dim, n = (size_t)a->n_heads * d, start = head * d;
    float own[FL_MAX_RWKV_HEAD], *memory = a->memory + head * d * d;
    const float *first = a->first + start, *decay = a->decay + start;
    for (size_t t = 0; t < (size_t)a->n_tokens; t++) {
        size_t at = t * n + start;
        if (a->decay_bias) {
            VECTORS (d) {
                vf z = v_add(v_load_part(a->decay + at + c, k),
                             v_load_part(a->decay_bias + start + c, k));
                v_store_part(own + c, v_exp(v_sub(v_zero(), v_exp(z))), k);
            }
            decay = own;
        }
        VECTORS (d) {
            vf value = v_load_part(a->v + at + c, k), sum = v_zero();
            for (size_t i = 0; i < d; i++) {
                float *place = memory + i * d + c;
                vf old = v_load_part(place, k), term = v_mul(v_set1(a->k[at + i]), value);
                sum = v_fma(v_set1(a->r[at + i]), v_fma(v_set1(first[i]), term, old), sum);
                v_store_part(place, v_fma(v_set1(decay[i]), old, term), k);
            }
            v_store_part(a->out + at + c, sum, k);
        }
        float *out = a->out + at;
        layer_norm(out, a->norm_weight + start, a->norm_bias + start, d, a->eps, out);
        if (a->gate) activate(FL_SILU, a->gate + at, out, d, out);
    }
}

KERNEL void rwkv7(const fl_rwkv7 *a, size_t head)
{
    size_t d = (size_t)a->head_dim, n = (size_t)a->n_heads * d, start = head * d;
    float unit[FL_MAX_RWKV_HEAD], unlearn[FL_MAX_RWKV_HEAD];
    float key[FL_MAX_RWKV_HEAD], decay[FL_MAX_RWKV_HEAD];
    float *memory = a->memory + head * d * d;
    vf one = v_set1(1.0f);
    for (size_t t = 0; t < (size_t)a->n_tokens; t++) {
        size_t at = t * n + start;
        const float *r = a->r + at;
        float *v = a->v + at, *first = a->first_v + at, *out = a->out + at;
        vf squares = v_zero(), bonus = v_zero();
        VECTORS (d) {
            size_t s = start + c;
            vf slow = v_add(v_load_part(a->decay + at + c, k), v_load_part(a->decay_bias + s, k));
            slow = v_mul(v_set1(-0.606531f), v_sigmoid(slow)); /* -exp(-0.5) */
            v_store_part(decay + c, v_exp(slow), k);
            vf rate = v_sigmoid(
                v_add(v_load_part(a->rate + at + c, k), v_load_part(a->rate_bias + s, k)));
            vf plain = v_load_part(a->k + at + c, k);
            vf direction = v_mul(plain, v_load_part(a->key_unit + s, k));
            squares = v_fma(direction, direction, squares);
            v_store_part(unit + c, direction, k);
            v_store_part(unlearn + c, rate, k);
            plain = v_mul(plain, v_fma(v_sub(rate, one), v_load_part(a->key_rate + s, k), one));
            v_store_part(key + c, plain, k);
            plain = v_mul(v_load_part(r + c, k), plain);
            bonus = v_fma(plain, v_load_part(a->bonus + s, k), bonus);
            vf value = v_load_part(v + c, k);
            if (a->share) {
                vf share = v_sigmoid(
                    v_add(v_load_part(a->share + at + c, k), v_load_part(a->share_bias + s, k)));
                value = v_fma(v_sub(v_load_part(first + c, k), value), share, value);
                v_store_part(v + c, value, k);
            } else {
                v_store_part(first + c, value, k);
            }
        }
        float length = sqrtf(sum1(squares));
        vf shorten = v_set1(1.0f / (length > 1e-12f ? length : 1e-12f));
        VECTORS (d) {
            vf direction = v_mul(v_load_part(unit + c, k), shorten);
            v_store_part(unit + c, direction, k);
            v_store_part(unlearn + c, v_mul(direction, v_load_part(unlearn + c, k)), k);
        }
        VECTORS (d) {
            vf value = v_load_part(v + c, k), found = v_zero(), sum = v_zero();
            for (size_t i = 0; i < d; i++)
                found = v_fma(v_set1(unit[i]), v_load_part(memory + i * d + c, k), found);
            for (size_t i = 0; i < d; i++) {
                float *place = memory + i * d + c;
                vf kept = v_mul(v_load_part(place, k), v_set1(decay[i]));
                kept = v_fma(v_set1(key[i]), value, v_fnma(v_set1(unlearn[i]), found, kept));
                v_store_part(place, kept, k);
                sum = v_fma(v_set1(r[i]), kept, sum);
            }
            v_store_part(out + c, sum, k);
        }
        layer_norm(out, a->norm_weight + start, a->norm_bias + start, d, a->eps, out);
        vf extra = v_set1(sum1(bonus));
        VECTORS (d) {
            vf sum = v_fma(extra, v_load_part(v + c, k), v_load_part(out + c, k));
            v_store_part(out + c, v_mul(sum, v_load_part(a->gate + at + c, k)), k);
        }
    }
}
