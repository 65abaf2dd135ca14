// Attention over a cache of Fp8 codes: compiled beside the other formats, as that takes long.
#include "attention.h"

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void ATTENTION(attention_fp8_##suffix, T) {                                                            \
        run_attention<T, Fp8>(                                                                                      \
            q, q_stride, cache, out, spans, tables, num_spans, heads, kv_heads, size, block_size, window, scale,      \
            softcap);                                                                                                 \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
