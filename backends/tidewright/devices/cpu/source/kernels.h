// The kernels of the other files, by value type, for those that are made of them.
#pragma once
#include "cache.h"
#include "lora.h"

// `count` new tokens of one sequence, from position `start`; their rows in q from `first_row` on. As attention/native.py
// lays it out.
struct Span {
    int32_t first_row, start, count, table;  // table: where in `tables` its list of blocks begins
};

struct QuantizedWeight;  // quantized.cpp

template <typename T>
struct Kernels;

#define ATTENTION(name, T)                                                                                            \
    name(                                                                                                             \
        const T* q, int64_t q_stride, const Cache* cache, T* out, const Span* spans, const int32_t* tables,           \
        int64_t num_spans, int64_t heads, int64_t kv_heads, int64_t size, int64_t block_size, int64_t window,         \
        float scale, float softcap)

#define DECLARE(T, suffix)                                                                                            \
    extern "C" {                                                                                                      \
    void linear_##suffix(                                                                                             \
        const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features);                \
    void multiply_quantized_##suffix(const QuantizedWeight* w, const T* x, const T* bias, T* out, int64_t rows);      \
    void add_lora_##suffix(const Lora* lora, const LoraRows* rows, const T* x, T* out);                               \
    void rms_norm_##suffix(                                                                                           \
        const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t size, float eps);                     \
    void silu_and_mul_##suffix(const T* gate_up, T* out, int64_t rows, int64_t size);                                 \
    void rotate_and_store_##suffix(                                                                                   \
        const T* qkv, const float* cos, const float* sin, const int64_t* positions, const int64_t* slots, T* q,       \
        const Cache* cache, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size);                           \
    void ATTENTION(attention_##suffix, T);                                                                            \
    void ATTENTION(attention_int8_##suffix, T);                                                                       \
    void ATTENTION(attention_fp8_##suffix, T);                                                                        \
    }                                                                                                                 \
    template <>                                                                                                       \
    struct Kernels<T> {                                                                                               \
        static constexpr auto linear = linear_##suffix;                                                               \
        static constexpr auto multiply_quantized = multiply_quantized_##suffix;                                       \
        static constexpr auto add_lora = add_lora_##suffix;                                                           \
        static constexpr auto rms_norm = rms_norm_##suffix;                                                           \
        static constexpr auto silu_and_mul = silu_and_mul_##suffix;                                                   \
        static constexpr auto rotate_and_store = rotate_and_store_##suffix;                                           \
        static constexpr auto attention = attention_##suffix;                                                         \
    };
DECLARE(float, f32)
DECLARE(BF16, bf16)
