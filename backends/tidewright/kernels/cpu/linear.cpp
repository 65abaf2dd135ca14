// y = x w^T + bias for few rows of x. Each weight is read once from memory, which sets the pace.
#include <vector>

#include "vectors.h"

namespace {

constexpr int LINE = 64;  // bytes that memory hands out at once

template <typename T>
using Factor = typename Product<T>::Factor;

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

// M rows of x, as factors, times N rows of w.
// Of what lies at `ahead`, each step calls `lines` lines from memory.
template <typename T, int M, int N>
INLINE void product_block(
    const char* ahead, int lines, const Factor<T>* x, int64_t steps, const T* w, int64_t depth, const T* bias, T* out,
    int64_t out_stride) {
    constexpr int WIDTH = Wide<T>::WIDTH, COUNT = power_of_two(M * N);
    Floats total[COUNT] = {};
    auto step = [&](const Factor<T>* x, const T* rows, int64_t stride) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            Factor<T> factor = Product<T>::factor(read_words(rows + n * stride));
#pragma GCC unroll 8
            for (int m = 0; m < M; m++) Product<T>::add(total[m * N + n], factor, x[m * steps]);
        }
    };
    int64_t k = 0;
    for (; k + WIDTH <= depth; k += WIDTH, x++) {
        for (int i = 0; i < lines; i++, ahead += LINE) __builtin_prefetch(ahead);
        step(x, w + k, depth);
    }
    if (k < depth) {
        T tail[N * WIDTH] = {};
        for (int n = 0; n < N; n++) std::memcpy(tail + n * WIDTH, w + n * depth + k, (depth - k) * sizeof(T));
        step(x, tail, WIDTH);
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

// Meanwhile the next N rows of w come from memory, one after another: that is faster than all in step, as they are used.
// The blocks of rows of x share that work, for the processor keeps no more than a dozen or so lines on their way.
template <typename T, int N>
INLINE void product_rows(
    const Factor<T>* x, int64_t steps, const T* w, int64_t depth, const T* bias, T* out, int64_t rows,
    int64_t out_stride) {
    int blocks = (rows + 3) / 4, lines = (N + blocks - 1) / blocks;
    const char* ahead = (const char*)(w + N * depth);
    for (; rows > 0; rows -= 4, x += 4 * steps, out += 4 * out_stride, ahead += lines * LINE * steps) {
        if (rows >= 4) product_block<T, 4, N>(ahead, lines, x, steps, w, depth, bias, out, out_stride);
        else if (rows == 3) product_block<T, 3, N>(ahead, lines, x, steps, w, depth, bias, out, out_stride);
        else if (rows == 2) product_block<T, 2, N>(ahead, lines, x, steps, w, depth, bias, out, out_stride);
        else product_block<T, 1, N>(ahead, lines, x, steps, w, depth, bias, out, out_stride);
    }
}

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {
    constexpr int N = LANES / 4, WIDTH = Wide<T>::WIDTH;
    if (!rows) return;
    int64_t steps = (depth + WIDTH - 1) / WIDTH, whole = features / N;
    static thread_local std::vector<Factor<T>> arranged;
    arranged.resize(rows * steps);
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < steps; i++)
            arranged[row * steps + i] =
                Product<T>::factor(read_words(x + row * depth + i * WIDTH, depth - i * WIDTH));
    const Factor<T>* in = arranged.data();
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < whole; i++)
        product_rows<T, N>(
            in, steps, w + i * N * depth, depth, bias ? bias + i * N : nullptr, out + i * N, rows, features);
    for (int64_t n = whole * N; n < features; n++)
        product_rows<T, 1>(in, steps, w + n * depth, depth, bias ? bias + n : nullptr, out + n, rows, features);
}

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void linear_##suffix(                                                                                  \
        const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {               \
        linear(x, w, bias, out, rows, depth, features);                                                               \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
