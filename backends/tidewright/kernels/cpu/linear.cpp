// y = x w^T + bias for few rows of x: each weight is read once, so that the memory sets the pace.
#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t PREFETCH = 4096;  // bytes ahead of what is computed

// A weight's row is read in steps of WIDTH values, which become PARTS vectors. `arrange` puts as many values of x into
// the same order.
template <typename T>
struct Weights;

template <>
struct Weights<float> {
    static constexpr int PARTS = 1, WIDTH = LANES;
    static INLINE void read(const float* from, Floats* parts) { parts[0] = load(from); }
    static INLINE void arrange(const float* from, float* to) { std::memcpy(to, from, WIDTH * sizeof(float)); }
};

// A word holds two values. Shifting up the lower and masking out the upper costs one operation each, half of what it
// takes to widen them in order; the processor's own dot product of bfloat16 is slower still (Sapphire Rapids).
template <>
struct Weights<BF16> {
    static constexpr int PARTS = 2, WIDTH = 2 * LANES;
    static INLINE void read(const BF16* from, Floats* parts) {
        Words words;
        std::memcpy(&words, from, sizeof words);
        parts[0] = (Floats)(words << 16);
        parts[1] = (Floats)(words & 0xffff0000u);
    }
    static INLINE void arrange(const BF16* from, float* to) {
        Floats parts[PARTS];
        read(from, parts);
        store(to, parts[0]);
        store(to + LANES, parts[1]);
    }
};

template <int STEP>
INLINE Floats merge_halves(Floats a, Floats b) {
    Ints low, high;
    for (int j = 0; j < LANES; j++) {
        low[j] = j & STEP ? LANES + j - STEP : j;
        high[j] = j & STEP ? LANES + j : j + STEP;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The sums of COUNT vectors (a power of two up to LANES); number i in lane i * LANES / COUNT.
template <int COUNT, int STEP = LANES / 2>
INLINE Floats sums(Floats* x) {
    constexpr int HALF = COUNT > 1 ? COUNT / 2 : 1;
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) x[i] = merge_halves<STEP>(x[i], x[COUNT > 1 ? i + HALF : i]);
    if constexpr (STEP > 1) return sums<HALF, STEP / 2>(x);
    else return x[0];
}

constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// M rows of x, arranged as floats, times N rows of w.
template <typename T, int M, int N>
INLINE void product_block(
    const float* x, int64_t x_stride, const T* w, int64_t depth, const T* bias, T* out, int64_t out_stride) {
    constexpr int PARTS = Weights<T>::PARTS, WIDTH = Weights<T>::WIDTH, COUNT = power_of_two(M * N);
    Floats total[COUNT] = {};
    auto step = [&](int64_t k, const T* rows, int64_t stride) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            Floats parts[PARTS];
            Weights<T>::read(rows + n * stride, parts);
#pragma GCC unroll 8
            for (int m = 0; m < M; m++)
#pragma GCC unroll 2
                for (int p = 0; p < PARTS; p++)
                    total[m * N + n] += parts[p] * load(x + m * x_stride + k + p * LANES);
        }
    };
    int64_t k = 0;
    for (; k + WIDTH <= depth; k += WIDTH) {
        // The processor's own prefetching stops at the end of a page.
        for (int n = 0; n < N; n++) __builtin_prefetch((const char*)(w + n * depth + k) + PREFETCH);
        step(k, w + k, depth);
    }
    if (k < depth) {
        T tail[N * WIDTH] = {};
        for (int n = 0; n < N; n++) std::memcpy(tail + n * WIDTH, w + n * depth + k, (depth - k) * sizeof(T));
        step(k, tail, WIDTH);
    }
    constexpr int EVERY = LANES / COUNT;
    Floats result = sums<COUNT>(total);
    if (bias) {
        float added[LANES] = {};
        for (int i = 0; i < M * N; i++) added[i * EVERY] = widen(bias[i % N]);
        result += load(added);
    }
    T y[LANES];
    store(y, result);
    for (int i = 0; i < M * N; i++) out[i / N * out_stride + i % N] = y[i * EVERY];
}

template <typename T, int N>
INLINE void product_rows(
    const float* x, int64_t x_stride, const T* w, int64_t depth, const T* bias, T* out, int64_t rows,
    int64_t out_stride) {
    for (; rows >= 4; rows -= 4, x += 4 * x_stride, out += 4 * out_stride)
        product_block<T, 4, N>(x, x_stride, w, depth, bias, out, out_stride);
    if (rows == 3) product_block<T, 3, N>(x, x_stride, w, depth, bias, out, out_stride);
    if (rows == 2) product_block<T, 2, N>(x, x_stride, w, depth, bias, out, out_stride);
    if (rows == 1) product_block<T, 1, N>(x, x_stride, w, depth, bias, out, out_stride);
}

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {
    constexpr int N = LANES / 4, WIDTH = Weights<T>::WIDTH;
    int64_t stride = (depth + WIDTH - 1) / WIDTH * WIDTH, whole = features / N;
    static thread_local std::vector<float> arranged;
    arranged.resize(rows * stride);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < depth; k += WIDTH) {
            T part[WIDTH] = {};
            std::memcpy(part, x + row * depth + k, std::min<int64_t>(WIDTH, depth - k) * sizeof(T));
            Weights<T>::arrange(part, &arranged[row * stride + k]);
        }
    const float* in = arranged.data();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < whole; i++)
        product_rows<T, N>(
            in, stride, w + i * N * depth, depth, bias ? bias + i * N : nullptr, out + i * N, rows, features);
    for (int64_t n = whole * N; n < features; n++)
        product_rows<T, 1>(in, stride, w + n * depth, depth, bias ? bias + n : nullptr, out + n, rows, features);
}

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void linear_##suffix(                                                                                  \
        const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {               \
        linear(x, w, bias, out, rows, depth, features);                                                               \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
