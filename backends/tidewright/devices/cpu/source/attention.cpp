// Attention over a cache of any format; that of the values themselves is compiled here.
#include "attention.h"

#define EXPORT(T, suffix)                                                                                             \
    DEFINE_ATTENTION(                                                                                                 \
        attention_##suffix, T,                                                                                        \
        (cache->format == INT8  ? attention_int8_##suffix                                                             \
         : cache->format == FP8 ? attention_fp8_##suffix                                                              \
                                : run_attention<T, T>))
EXPORT(float, f32)
EXPORT(BF16, bf16)
