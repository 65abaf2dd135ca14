// Attention over a cache of Fp8 codes: compiled beside the other formats, as that takes long.
#include "attention.h"

DEFINE_ATTENTION(attention_fp8_f32, float, (run_attention<float, Fp8>))
DEFINE_ATTENTION(attention_fp8_bf16, BF16, (run_attention<BF16, Fp8>))
