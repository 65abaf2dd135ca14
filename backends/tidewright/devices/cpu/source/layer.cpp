// All layers of a Llama in one call. The same kernels as one by one, on the same few buffers in every layer: for few rows,
// calling each from Python costs a fifth. A layer has two halves, each ending where tensor-parallel ranks add up their results.
#include <atomic>
#include <vector>

#include "kernels.h"

// As layer.py lays them out.
struct Linear {
    const void* weight;
    const QuantizedWeight* quantized;  // in its place
    const void* bias;
    const Lora* lora;  // null without
    int64_t depth, features;
};

struct AttentionHalf {
    const void* norm;
    Linear qkv, output;
    const void *q_norm, *k_norm;  // null without
    const float *cos, *sin;
    int64_t heads, kv_heads, size, window;
    float eps, scale, softcap;
};

struct MlpHalf {
    const void* norm;
    Linear gate_up, down;
    float eps;
};

struct Layer {
    AttentionHalf attention;
    MlpHalf mlp;
};

struct Step {
    int64_t rows;
    const int64_t *positions, *slots;
    const Span* spans;
    const int32_t* tables;
    int64_t num_spans, block_size;
    Cache cache;            // the first layer's
    int64_t layer_vectors;  // of keys, from a layer to the next
    const LoraRows* adapters;  // null if no row has one
    std::atomic<int64_t>* layers_computed;  // who waits for the step sees by it that it goes on
};

// Makes of this rank's part of what goes into the stream the sum of all ranks'; false: that failed.
using AddUp = bool();

namespace {

template <typename T>
void multiply(const Linear& linear, const Step& step, const T* x, T* out) {
    int64_t rows = step.rows;
    if (linear.quantized) Kernels<T>::multiply_quantized(linear.quantized, x, (const T*)linear.bias, out, rows);
    else Kernels<T>::linear(x, (const T*)linear.weight, (const T*)linear.bias, out, rows, linear.depth, linear.features);
    if (step.adapters && linear.lora) Kernels<T>::add_lora(linear.lora, step.adapters, x, out);
}

// One thread's scratch memory of at least `size` values.
template <typename T, int WHICH>
T* scratch(int64_t size) {
    static thread_local std::vector<T> memory;
    if ((int64_t)memory.size() < size) memory.resize(size);
    return memory.data();
}

inline Cache cache_of(const Step& step, int64_t layer, int64_t size, int64_t computed_bytes) {
    Cache cache = step.cache;
    int64_t vectors = layer * step.layer_vectors, bytes = size * (cache.format == AS_COMPUTED ? computed_bytes : 1);
    cache.keys = (char*)cache.keys + vectors * bytes;
    cache.values = (char*)cache.values + vectors * bytes;
    if (cache.key_scales) cache.key_scales += vectors, cache.value_scales += vectors;
    return cache;
}

// x is what is still to be added to the residual stream, and then what comes out; in the first layer, null comes in
// `added`, as there is nothing yet but the stream.
template <typename T>
void attention_half(
    const AttentionHalf& half, const Step& step, int64_t layer, const T* added, T* residual, T* out) {
    using K = Kernels<T>;
    Cache cache = cache_of(step, layer, half.size, sizeof(T));
    int64_t rows = step.rows, hidden = half.qkv.depth, size = half.size;
    int64_t row = (half.heads + 2 * half.kv_heads) * size;
    T *normed = scratch<T, 0>(rows * hidden), *qkv = scratch<T, 1>(rows * row);
    T *q = scratch<T, 2>(rows * half.heads * size), *attended = scratch<T, 3>(rows * half.heads * size);
    if (added) K::rms_norm(added, residual, (const T*)half.norm, normed, rows, hidden, half.eps);
    else K::rms_norm(residual, nullptr, (const T*)half.norm, normed, rows, hidden, half.eps);
    multiply(half.qkv, step, normed, qkv);
    if (half.q_norm)
        for (int64_t t = 0; t < rows; t++) {
            T *q_heads = qkv + t * row, *k_heads = q_heads + half.heads * size;
            K::rms_norm(q_heads, nullptr, (const T*)half.q_norm, q_heads, half.heads, size, half.eps);
            K::rms_norm(k_heads, nullptr, (const T*)half.k_norm, k_heads, half.kv_heads, size, half.eps);
        }
    K::rotate_and_store(
        qkv, half.cos, half.sin, step.positions, step.slots, q, &cache, rows, half.heads, half.kv_heads, size);
    K::attention(
        q, half.heads * size, &cache, attended, step.spans, step.tables, step.num_spans, half.heads,
        half.kv_heads, size, step.block_size, half.window, half.scale, half.softcap);
    multiply(half.output, step, attended, out);
}

template <typename T>
void mlp_half(const MlpHalf& half, const Step& step, const T* added, T* residual, T* out) {
    int64_t rows = step.rows, hidden = half.gate_up.depth, size = half.down.depth;
    T *normed = scratch<T, 0>(rows * hidden), *gate_up = scratch<T, 4>(rows * 2 * size);
    T* activated = scratch<T, 5>(rows * size);
    Kernels<T>::rms_norm(added, residual, (const T*)half.norm, normed, rows, hidden, half.eps);
    multiply(half.gate_up, step, normed, gate_up);
    Kernels<T>::silu_and_mul(gate_up, activated, rows, size);
    multiply(half.down, step, activated, out);
}

// `residual` has the embedding, the stream before the first layer. False: adding up failed.
template <typename T>
bool run_layers(const Layer* layers, int64_t count, const Step& step, T* residual, T* added, AddUp* add_up) {
    for (int64_t i = 0; i < count; i++) {
        attention_half(layers[i].attention, step, i, i ? added : nullptr, residual, added);
        if (add_up && !add_up()) return false;
        mlp_half(layers[i].mlp, step, added, residual, added);
        if (add_up && !add_up()) return false;
        step.layers_computed->fetch_add(1, std::memory_order_relaxed);
    }
    return true;
}

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    extern "C" bool run_layers_##suffix(                                                                              \
        const Layer* layers, int64_t count, const Step* step, T* residual, T* added, AddUp* add_up) {                 \
        return run_layers(layers, count, *step, residual, added, add_up);                                             \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
