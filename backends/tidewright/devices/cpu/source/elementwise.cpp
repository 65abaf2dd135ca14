// The operations between the matrix products, one pass over memory each: norms, activation, rotation, storing into
// the cache.
#include <vector>

#include "cache.h"

namespace {

constexpr int64_t WORTH_THREADS = 16384;  // values; waking the other threads costs about as much as this many

template <typename T>
void rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const T* in = x + row * size;
        Floats squares = {};
        if (residual) {
            T* total = residual + row * size;
            for (int64_t i = 0; i < size; i += LANES)
                store(total + i, load(total + i, size - i) + load(in + i, size - i), size - i);
            in = total;
        }
        for (int64_t i = 0; i < size; i += LANES) {
            Floats value = load(in + i, size - i);
            squares += value * value;
        }
        float factor = 1 / std::sqrt(sum(squares) / size + eps);
        for (int64_t i = 0; i < size; i += LANES)
            store(out + row * size + i, load(in + i, size - i) * factor * load(weight + i, size - i), size - i);
    }
}

template <typename T>
void silu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > WORTH_THREADS)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; i += LANES) {
            Floats x = load(gate + i, size - i);
            // Rounded in between, as two operations of torch do it.
            Floats activated = rounded<T>(x / (exponential(-x) + 1.0f));
            store(out + row * size + i, activated * load(up + i, size - i), size - i);
        }
    }
}

// ---- Rotation of halves, and storing into the cache ----

// cos and sin hold `size` values each; those of sin's first half are negated.
template <typename T, typename Out>
INLINE void rotate_head(const T* x, const float* cos, const float* sin, Out* out, int64_t size) {
    int64_t half = size / 2;
    for (int64_t i = 0; i < half; i += LANES) {
        int64_t left = half - i;
        Floats first = load(x + i, left), second = load(x + half + i, left);
        Floats new_first = first * load(cos + i, left) + second * load(sin + i, left);
        Floats new_second = second * load(cos + half + i, left) + first * load(sin + half + i, left);
        store(out + i, new_first, left);
        store(out + half + i, new_second, left);
    }
}

// A cache of codes takes them from the rotated keys before those would be rounded to a T.
template <typename T, typename C>
void rotate_and_store(
    const T* qkv, const float* cos, const float* sin, const int64_t* positions, const int64_t* slots, T* q,
    const Cache& cache, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size) {
    int64_t all_heads = heads + 2 * kv_heads;
    C *keys = (C*)cache.keys, *values = (C*)cache.values;
#pragma omp parallel for schedule(static) if (tokens * all_heads * size > WORTH_THREADS)
    for (int64_t t = 0; t < tokens; t++) {
        const T* in = qkv + t * all_heads * size;
        const float *c = cos + positions[t] * size, *s = sin + positions[t] * size;
        int64_t vector = slots[t] * kv_heads;
        for (int64_t h = 0; h < heads; h++) rotate_head(in + h * size, c, s, q + (t * heads + h) * size, size);
        const T *k = in + heads * size, *v = k + kv_heads * size;
        if constexpr (!QUANTIZED<C>) {
            for (int64_t h = 0; h < kv_heads; h++) rotate_head(k + h * size, c, s, keys + (vector + h) * size, size);
            std::memcpy(values + vector * size, v, kv_heads * size * sizeof(T));
        } else {
            static thread_local std::vector<float> x;
            if ((int64_t)x.size() < size) x.resize(size);
            for (int64_t h = 0; h < kv_heads; h++) {
                rotate_head(k + h * size, c, s, x.data(), size);
                int64_t scale = cache.scale_at(slots[t], h, kv_heads);
                cache.key_scales[scale] = quantize(x.data(), keys + (vector + h) * size, size);
                cache.value_scales[scale] = quantize(v + h * size, values + (vector + h) * size, size);
            }
        }
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    extern "C" {                                                                                                      \
    void rms_norm_##suffix(                                                                                           \
        const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t size, float eps) {                    \
        rms_norm(x, residual, weight, out, rows, size, eps);                                                          \
    }                                                                                                                 \
    void silu_and_mul_##suffix(const T* gate_up, T* out, int64_t rows, int64_t size) {                                \
        silu_and_mul(gate_up, out, rows, size);                                                                       \
    }                                                                                                                 \
    void rotate_and_store_##suffix(                                                                                   \
        const T* qkv, const float* cos, const float* sin, const int64_t* positions, const int64_t* slots, T* q,       \
        const Cache* cache, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size) {                          \
        with_format<T>(*cache, [&](auto code) {                                                                       \
            rotate_and_store<T, decltype(code)>(                                                                      \
                qkv, cos, sin, positions, slots, q, *cache, tokens, heads, kv_heads, size);                           \
        });                                                                                                           \
    }                                                                                                                 \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
