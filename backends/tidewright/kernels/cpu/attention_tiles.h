// What attention.cpp computes with: products of small tiles in registers, keys transposed on the way from the cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2, TILE_ROWS = 6;  // what a product keeps in registers
constexpr int KEYS = TILE_VECTORS * LANES;

// c[R, V vectors] += a[R, depth] b[depth, V vectors]
template <int R, int V>
void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
    Floats total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) total[r][v] = load(c + r * ldc + v * LANES);
    for (int64_t k = 0; k < depth; k++) {
        Floats y[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) y[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) total[r][v] += a[r * lda + k] * y[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, total[r][v]);
}

// Calls `work` with the number of rows, 1 to TILE_ROWS, as a constant.
template <typename Work>
INLINE void with_rows(int64_t rows, Work work) {
    switch (rows) {
        case 1: return work(std::integral_constant<int, 1>());
        case 2: return work(std::integral_constant<int, 2>());
        case 3: return work(std::integral_constant<int, 3>());
        case 4: return work(std::integral_constant<int, 4>());
        case 5: return work(std::integral_constant<int, 5>());
        default: return work(std::integral_constant<int, TILE_ROWS>());
    }
}

template <int V>
void product_columns(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
        with_rows(std::min<int64_t>(rows - r, TILE_ROWS), [&](auto count) {
            product_block<decltype(count)::value, V>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth);
        });
}

// c[rows, columns] += a[rows, depth] b[depth, columns]; columns are a multiple of LANES.
void product(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t columns,
    int64_t depth) {
    int64_t i = 0;
    for (; i + KEYS <= columns; i += KEYS) product_columns<TILE_VECTORS>(a, lda, b + i, ldb, c + i, ldc, rows, depth);
    for (; i < columns; i += LANES) product_columns<1>(a, lda, b + i, ldb, c + i, ldc, rows, depth);
}

template <int STEP>
INLINE void transpose(Floats* x) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) exchange<STEP>(x[i], x[i + STEP]);
    if constexpr (STEP > 1) transpose<STEP / 2>(x);
}

template <typename T>
__attribute__((noinline)) void read_tail(const T* keys, const int64_t* places, int64_t count, Floats* x) {
    for (int j = 0; j < LANES; j++) x[j] = (Floats)read_words(keys + places[j], count);
}

// x[d][j] = keys[places[j]][d] for LANES keys and as many words, of whose values `count` exist.
template <typename T>
INLINE void read_transposed(const T* keys, const int64_t* places, int64_t count, Floats* x) {
    if (count >= Wide<T>::WIDTH) {
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) x[j] = (Floats)read_words(keys + places[j]);
    } else {
        Floats tail[LANES];
        read_tail(keys, places, count, tail);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) x[j] = tail[j];
    }
    transpose<LANES / 2>(x);
}

template <typename T>
INLINE void prefetch(const T* row, int64_t size) {
    for (int64_t d = 0; d < size; d += 64 / sizeof(T)) __builtin_prefetch(row + d);
}

// A tile for many rows: the keys, transposed, and the values as floats; the latter in the order of Wide's parts. What
// is `next` is called from memory meanwhile.
template <typename T>
void read_tile(
    const T* k_cache, const T* v_cache, const int64_t* places, const int64_t* next, int count, float* keys,
    float* values, int64_t size, int64_t width) {
    constexpr int PARTS = Wide<T>::PARTS, WIDTH = Wide<T>::WIDTH;
    for (int j = 0; j < count; j += LANES) {
        for (int i = j; i < j + LANES; i++) prefetch(k_cache + next[i], size);
        for (int64_t d = 0; d < size; d += WIDTH) {
            Floats x[LANES];
            read_transposed(k_cache + d, places + j, size - d, x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                Floats parts[PARTS];
                Wide<T>::split((Words)x[i], parts);
                for (int p = 0; p < PARTS; p++) store(keys + (d + i * PARTS + p) * KEYS + j, parts[p]);
            }
        }
    }
    for (int j = 0; j < count; j++) {
        prefetch(v_cache + next[j], size);
        for (int64_t d = 0; d < size; d += WIDTH) {
            Floats parts[PARTS];
            Wide<T>::split(read_words(v_cache + places[j] + d, size - d), parts);
            std::memcpy(values + j * width + d, parts, sizeof parts);
        }
    }
}

// For R rows, few, a tile of floats would not pay: the scores of a tile straight from the keys,
template <int R, typename T>
void few_scores(
    const float* queries, const T* keys, const int64_t* places, const int64_t* next, int count, float* scores,
    int64_t size, int64_t width) {
    constexpr int PARTS = Wide<T>::PARTS, WIDTH = Wide<T>::WIDTH;
    for (int j = 0; j < count; j += LANES) {
        for (int i = j; i < j + LANES; i++) prefetch(keys + next[i], size);
        Floats total[R][PARTS] = {};
        for (int64_t d = 0; d < size; d += WIDTH) {
            Floats x[LANES];
            read_transposed(keys + d, places + j, size - d, x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                Floats parts[PARTS];
                Wide<T>::split((Words)x[i], parts);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                    for (int p = 0; p < PARTS; p++) total[r][p] += queries[r * width + d + i * PARTS + p] * parts[p];
            }
        }
        for (int r = 0; r < R; r++) {
            for (int p = 1; p < PARTS; p++) total[r][0] += total[r][p];
            store(scores + r * KEYS + j, total[r][0]);
        }
    }
}

// and the sum of the weighted values, `left` of them from each of `count` positions, in V vectors of words.
template <int R, int V, typename T>
INLINE void few_values(
    const float* weights, const T* values, const int64_t* places, int count, float* totals, int64_t left,
    int64_t width) {
    constexpr int PARTS = Wide<T>::PARTS, WIDTH = Wide<T>::WIDTH;
    Floats total[R][V * PARTS];
    for (int r = 0; r < R; r++) std::memcpy(total[r], totals + r * width, sizeof total[r]);
    for (int j = 0; j < count; j++) {
        Floats parts[V * PARTS];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++)
            Wide<T>::split(read_words(values + places[j] + v * WIDTH, left - v * WIDTH), parts + v * PARTS);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int i = 0; i < V * PARTS; i++) total[r][i] += weights[r * KEYS + j] * parts[i];
    }
    for (int r = 0; r < R; r++) std::memcpy(totals + r * width, total[r], sizeof total[r]);
}

}  // namespace
