// What attention.cpp computes with: products of small tiles in registers, keys transposed on the way from the cache.
#pragma once

#include <algorithm>

#include "cache.h"

namespace {

constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2, TILE_ROWS = 6;  // what a product keeps in registers
constexpr int KEYS = TILE_VECTORS * LANES;

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
            for (int v = 0; v < V; v++) S::add(total[r][v], a[r * lda + k], y[v]);
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
// LANES, depth counts words that S adds products of.
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

// A tile for many rows: the keys, transposed, as S takes them; the values as P takes them, if it exists, or else as floats, in
// the order of Values' parts. What is `next` is called from memory meanwhile.
template <typename S, typename P, typename C>
void read_tile(
    const C* k_cache, const C* v_cache, const int64_t* places, const int64_t* next, int count, float* keys,
    float* values, int64_t size, int64_t width) {
    constexpr int WIDTH = Wide<C>::WIDTH;
    for (int j = 0; j < count; j += LANES) {
        float* to = keys + j;
        for (int64_t d = 0; d < size; d += WIDTH) {
            Floats x[LANES];
            for (int i = j; i < j + LANES; i++) __builtin_prefetch(k_cache + next[i] + d);
            read_transposed(k_cache + d, places + j, size - d, x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                Floats parts[S::PARTS];
                S::split((Words)x[i], parts);
                for (int p = 0; p < S::PARTS; p++, to += KEYS) store(to, parts[p]);
            }
        }
    }
    for (int j = 0; j < count; j++) {
        for (int64_t d = 0; d < size; d += WIDTH) __builtin_prefetch(v_cache + next[j] + d);
        if constexpr (P::EXIST) {
            if (j % 2) continue;
            for (int64_t d = 0; d < size; d += P::WIDTH) {
                Floats parts[2];
                P::read(v_cache + places[j] + d, v_cache + places[j + 1] + d, size - d, parts);
                std::memcpy(values + j / 2 * width + d, parts, sizeof parts);
            }
            continue;
        }
        for (int64_t d = 0; d < size; d += Values<C>::WIDTH) {
            Floats parts[Values<C>::PARTS];
            Values<C>::read(v_cache + places[j] + d, size - d, parts);
            std::memcpy(values + j * width + d, parts, sizeof parts);
        }
    }
}

// For R rows, few, a tile of floats would not pay: the scores of a tile straight from the keys,
template <typename S, int R, typename C>
void few_scores(
    const float* queries, const C* keys, const int64_t* places, Ahead<C>& ahead, int count, float* scores,
    int64_t size, int64_t stride) {
    constexpr int WIDTH = Wide<C>::WIDTH, PARTS = S::PARTS, SUMS = S::SUMS;
    for (int j = 0; j < count; j += LANES) {
        Floats total[R][SUMS] = {};
        const float* query = queries;
        for (int64_t d = 0; d < size; d += WIDTH, query += PARTS * LANES) {
            Floats x[LANES];
            ahead.call(LANES);
            read_transposed(keys + d, places + j, size - d, x);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) {
                Floats parts[PARTS];
                S::split((Words)x[i], parts);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
#pragma GCC unroll 4
                    for (int p = 0; p < PARTS; p++)
                        S::add(total[r][p % SUMS], query[r * stride + i * PARTS + p], parts[p]);
            }
        }
        for (int r = 0; r < R; r++) {
            for (int p = 1; p < SUMS; p++) S::combine(total[r][0], total[r][p]);
            store(scores + r * KEYS + j, total[r][0]);
        }
    }
}

// and the sum of the weighted values, `left` of them from each of `count` positions, V times WIDTH at once.
template <int R, int V, typename C>
INLINE void few_values(
    const float* weights, const C* values, const int64_t* places, Ahead<C>& ahead, int count, float* totals,
    int64_t left, int64_t width) {
    constexpr int PARTS = Values<C>::PARTS, WIDTH = Values<C>::WIDTH;
    Floats total[R][V * PARTS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < V * PARTS; i++) total[r][i] = load(totals + r * width + i * LANES);
    for (int j = 0; j < count; j++) {
        Floats parts[V * PARTS];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            Values<C>::read(values + places[j] + v * WIDTH, left - v * WIDTH, parts + v * PARTS);
        ahead.call((V * WIDTH * int(sizeof(C)) + 63) / 64);
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

// The same by pairs of positions; `units` are what the rows' sums have to be multiplied by.
template <typename P, int R, int V, typename C>
INLINE void few_pairs(
    const float* words, const float* units, const C* values, const int64_t* places, Ahead<C>& ahead, int count,
    float* totals, int64_t left, int64_t width) {
    Floats total[R][2 * V] = {};
    for (int j = 0; j < count; j += 2) {
        Floats parts[2 * V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            P::read(
                values + places[j] + v * P::WIDTH, values + places[j + 1] + v * P::WIDTH, left - v * P::WIDTH,
                parts + 2 * v);
        ahead.call((2 * V * P::WIDTH * int(sizeof(C)) + 63) / 64);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int i = 0; i < 2 * V; i++) P::add(total[r][i], words[r * KEYS + j / 2], parts[i]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int i = 0; i < 2 * V; i++) {
            float* to = totals + r * width + i * LANES;
            store(to, load(to) + P::finish(total[r][i]) * units[r]);
        }
}

}  // namespace
