// y = x w^T + bias for few rows of x. Each weight is read once from memory, which sets the pace.
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t PREFETCH = 4096;  // bytes ahead of what is computed

// The sums of COUNT vectors (a power of two up to LANES); number i in lane i * LANES / COUNT.
template <int COUNT, int STEP = LANES / 2>
INLINE Floats sums(Floats* x) {
    constexpr int HALF = COUNT > 1 ? COUNT / 2 : 1;
#pragma GCC unroll 8
    for (int i = 0; i < HALF; i++) {
        Floats other = x[COUNT > 1 ? i + HALF : i];
        exchange<STEP>(x[i], other);
        x[i] += other;
    }
    if constexpr (STEP > 1) return sums<HALF, STEP / 2>(x);
    else return x[0];
}

constexpr int power_of_two(int least) { return least <= 1 ? 1 : 2 * power_of_two((least + 1) / 2); }

// M rows of x, as floats in the order that the parts of w have, times N rows of w.
// Of each step's N rows of w, those from `fetched` on, `apart` from one another, are fetched ahead: the blocks of rows of x
// share that work, for the processor keeps no more than a dozen or so lines on their way.
template <typename T, int M, int N>
INLINE void product_block(
    int fetched, int apart, const float* x, int64_t x_stride, const T* w, int64_t depth, const T* bias, T* out, int64_t out_stride) {
    constexpr int PARTS = Wide<T>::PARTS, WIDTH = Wide<T>::WIDTH, COUNT = power_of_two(M * N);
    Floats total[COUNT] = {};
    auto step = [&](int64_t k, const T* rows, int64_t stride) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            Floats parts[PARTS];
            Wide<T>::split(read_words(rows + n * stride), parts);
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
        for (int n = fetched; n < N; n += apart) __builtin_prefetch((const char*)(w + n * depth + k) + PREFETCH);
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
    int blocks = (rows + 3) / 4;
    for (int block = 0; block < blocks; block++, rows -= 4, x += 4 * x_stride, out += 4 * out_stride) {
        if (rows >= 4) product_block<T, 4, N>(block, blocks, x, x_stride, w, depth, bias, out, out_stride);
        else if (rows == 3) product_block<T, 3, N>(block, blocks, x, x_stride, w, depth, bias, out, out_stride);
        else if (rows == 2) product_block<T, 2, N>(block, blocks, x, x_stride, w, depth, bias, out, out_stride);
        else product_block<T, 1, N>(block, blocks, x, x_stride, w, depth, bias, out, out_stride);
    }
}

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {
    constexpr int N = LANES / 4, WIDTH = Wide<T>::WIDTH, PARTS = Wide<T>::PARTS;
    int64_t stride = (depth + WIDTH - 1) / WIDTH * WIDTH, whole = features / N;
    static thread_local std::vector<float> arranged;
    arranged.resize(rows * stride);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t k = 0; k < depth; k += WIDTH) {
            Floats parts[PARTS];
            Wide<T>::split(read_words(x + row * depth + k, depth - k), parts);
            std::memcpy(&arranged[row * stride + k], parts, sizeof parts);
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
