// Attention over a cache of any format; that of the values themselves is compiled here.
#include "attention.h"

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void ATTENTION(attention_##suffix, T) {                                                                \
        auto run = cache->format == INT8  ? attention_int8_##suffix                                                   \
                   : cache->format == FP8 ? attention_fp8_##suffix                                                    \
                                          : run_attention<T, T>;                                                      \
        run(q, q_stride, cache, out, spans, tables, num_spans, heads, kv_heads, size, block_size, window, scale,      \
            softcap);                                                                                                 \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
