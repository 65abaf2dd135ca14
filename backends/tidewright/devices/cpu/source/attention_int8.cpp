// Attention over a cache of Int8 codes: compiled beside the other formats, as that takes long.
#include "attention.h"

DEFINE_ATTENTION(attention_int8_f32, float, (run_attention<float, Int8>))
DEFINE_ATTENTION(attention_int8_bf16, BF16, (run_attention<BF16, Int8>))
