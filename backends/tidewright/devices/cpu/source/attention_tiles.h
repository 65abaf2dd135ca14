// What attention.cpp computes with: products of small tiles in registers, keys transposed on the way from the cache.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2, TILE_ROWS = 6;  // what a product keeps in registers
constexpr int KEYS = TILE_VECTORS * LANES;

// What scores are computed from: words of a T, two values at once, or else floats.
template <typename T>
using Scored = std::conditional_t<Product<T>::OF_WORDS, T, float>;

// total += a y for words that hold one float or several values of another type.
template <typename S>
INLINE void add_product(Floats& total, float a, Floats y) {
    if constexpr (std::is_same_v<S, float>) {
        total += a * y;
    } else {
        uint32_t word;
        std::memcpy(&word, &a, sizeof word);
        Product<S>::add(total, Words{} + word, (Words)y);
    }
}

// c[R, V vectors] = a[R, depth] b[depth, V vectors], added to what c holds if it is `more`.
template <typename S, bool more, int R, int V>
void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth) {
    Floats total[R][V] = {};
    if constexpr (more)
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
            for (int v = 0; v < V; v++) add_product<S>(total[r][v], a[r * lda + k], y[v]);
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

template <typename S, bool more, int V>
void product_columns(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
        with_rows(std::min<int64_t>(rows - r, TILE_ROWS), [&](auto count) {
            product_block<S, more, decltype(count)::value, V>(a + r * lda, lda, b, ldb, c + r * ldc, ldc, depth);
        });
}

// c[rows, columns] = a[rows, depth] b[depth, columns], added to what c holds if it is `more`; columns are a multiple of
// LANES, depth counts words of S.
template <typename S, bool more>
void product(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t columns,
    int64_t depth) {
    int64_t i = 0;
    for (; i + KEYS <= columns; i += KEYS)
        product_columns<S, more, TILE_VECTORS>(a, lda, b + i, ldb, c + i, ldc, rows, depth);
    for (; i < columns; i += LANES) product_columns<S, more, 1>(a, lda, b + i, ldb, c + i, ldc, rows, depth);
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

// Calls the rows of a tile from memory, line by line as they lie there, which is faster than head by head. Into the second
// level of cache: with all heads a tile is more than the first holds, and to fetch past it keeps more lines on their way.
template <typename T>
struct Ahead {
    const T* cache;
    const int64_t* places;
    int64_t size;  // of a row, with all heads that come
    int row = 0;
    int64_t offset = 0;

    INLINE void call(int lines) {
        for (; lines > 0 && row < KEYS; lines--) {
            __builtin_prefetch(cache + places[row] + offset, 0, 2);
            offset += 64 / sizeof(T);
            if (offset >= size) offset = 0, row++;
        }
    }
};

// The words of a row of queries, as the scores need them.
template <typename T>
INLINE void read_query(const T* from, int64_t size, float* words) {
    if constexpr (Product<T>::OF_WORDS)
        for (int64_t d = 0; d < size; d += Wide<T>::WIDTH, words += LANES)
            store(words, (Floats)read_words(from + d, size - d));
    else
        for (int64_t d = 0; d < size; d += LANES) store(words + d, load(from + d, size - d));
}

// A tile for many rows: the keys, transposed, as Scored; the values as floats, in the order of Wide's parts. What is
// `next` is called from memory meanwhile.
template <typename T>
void read_tile(
    const T* k_cache, const T* v_cache, const int64_t* places, const int64_t* next, int count, float* keys,
    float* values, int64_t size, int64_t width) {
    constexpr int PARTS = Wide<T>::PARTS, WIDTH = Wide<T>::WIDTH;
    for (int j = 0; j < count; j += LANES) {
        float* to = keys + j;
        for (int64_t d = 0; d < size; d += WIDTH) {
            Floats x[LANES];
            for (int i = j; i < j + LANES; i++) __builtin_prefetch(k_cache + next[i] + d);
            read_transposed(k_cache + d, places + j, size - d, x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                if constexpr (Product<T>::OF_WORDS) {
                    store(to, x[i]), to += KEYS;
                    continue;
                }
                Floats parts[PARTS];
                Wide<T>::split((Words)x[i], parts);
                for (int p = 0; p < PARTS; p++, to += KEYS) store(to, parts[p]);
            }
        }
    }
    for (int j = 0; j < count; j++) {
        for (int64_t d = 0; d < size; d += WIDTH) {
            __builtin_prefetch(v_cache + next[j] + d);
            Floats parts[PARTS];
            Wide<T>::split(read_words(v_cache + places[j] + d, size - d), parts);
            std::memcpy(values + j * width + d, parts, sizeof parts);
        }
    }
}

// For R rows, few, a tile of floats would not pay: the scores of a tile straight from the keys,
template <int R, typename T>
void few_scores(
    const float* queries, const T* keys, const int64_t* places, Ahead<T>& ahead, int count, float* scores,
    int64_t size, int64_t stride) {
    constexpr int WIDTH = Wide<T>::WIDTH, PARTS = Product<T>::OF_WORDS ? 1 : Wide<T>::PARTS;
    for (int j = 0; j < count; j += LANES) {
        Floats total[R][PARTS] = {};
        const float* query = queries;
        for (int64_t d = 0; d < size; d += WIDTH, query += PARTS * LANES) {
            Floats x[LANES];
            ahead.call(LANES);
            read_transposed(keys + d, places + j, size - d, x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                Floats parts[PARTS] = {x[i]};
                if constexpr (!Product<T>::OF_WORDS) Wide<T>::split((Words)x[i], parts);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 2
                    for (int p = 0; p < PARTS; p++)
                        add_product<Scored<T>>(total[r][p], query[r * stride + i * PARTS + p], parts[p]);
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
    const float* weights, const T* values, const int64_t* places, Ahead<T>& ahead, int count, float* totals,
    int64_t left, int64_t width) {
    constexpr int PARTS = Wide<T>::PARTS, WIDTH = Wide<T>::WIDTH;
    Floats total[R][V * PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < V * PARTS; i++) total[r][i] = load(totals + r * width + i * LANES);
    for (int j = 0; j < count; j++) {
        Floats parts[V * PARTS];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++)
            Wide<T>::split(read_words(values + places[j] + v * WIDTH, left - v * WIDTH), parts + v * PARTS);
        ahead.call(V);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int i = 0; i < V * PARTS; i++) total[r][i] += weights[r * KEYS + j] * parts[i];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < V * PARTS; i++) store(totals + r * width + i * LANES, total[r][i]);
}

}  // namespace
