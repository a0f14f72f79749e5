/* What a vector set offers, after all of its kernels. */

#define FL_SIMD_TABLE(NAME, ...)                                                                        \
    {                                                                                              \
        .name = NAME,                                                                              \
        .dot = {dot_f32, dot_f16, dot_bf16, dot_int8, dot_int4},                                   \
        .accumulate = {accumulate_f32, accumulate_f16, accumulate_bf16, accumulate_int8,           \
                       accumulate_int4},                                                           \
        .decode = {decode_f32, decode_f16, decode_bf16, decode_int8, decode_int4},                 \
        .low_bit = low_bit,                                                                        \
        .rms_norm = rms_norm,                                                                      \
        .layer_norm = layer_norm,                                                                  \
        .rope = rope,                                                                              \
        .softmax = softmax,                                                                        \
        .scale_by = scale_by,                                                                      \
        .activate = activate,                                                                      \
        .mix_tokens = mix_tokens,                                                                  \
        .rwkv4 = rwkv4,                                                                            \
        .rwkv5 = rwkv5,                                                                            \
        .rwkv7 = rwkv7,                                                                            \
        __VA_ARGS__                                                                                \
    }
