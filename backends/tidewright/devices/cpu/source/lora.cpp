// Adds to each row what its LoRA adapter says, all adapters of a step in one call (as Punica's SGMV: Chen et al. 2023).
// First each row shrinks to `rank` numbers, which stay float, then those expand to the outputs. An adapter's matrices are
// read once for up to TILE rows that have it, each as one stream of memory.
//
// Whatever rows there are, a sum adds up in the same order: a row's result does not depend on the others.
#include <algorithm>
#include <vector>

#include "kernels.h"

namespace {

constexpr int TILE = 4;              // rows at once, and ranks: as many as find room for their sums in the registers
constexpr int VECTORS = 4;  // of outputs, beside TILE rows
constexpr int64_t GROUP = VECTORS * LANES, BLOCK = 8 * GROUP;  // outputs; a thread takes a block at once
constexpr int AHEAD = 4096;  // bytes
constexpr int LINE = 64;

// `a`: RANKS ranks, a vector of each in turn, the last ones filled up with zeros.
template <typename T, int ROWS, int RANKS>
INLINE void shrink(const T* const* x, const T* a, int64_t depth, float scale, float* const* h) {
    Floats total[ROWS][RANKS] = {};
    for (int64_t k = 0; k < depth; k += LANES, a += RANKS * LANES) {
        for (int i = 0; i < RANKS * LANES * (int)sizeof(T); i += LINE) __builtin_prefetch((const char*)a + AHEAD + i, 0, 2);
        Floats values[ROWS];
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) values[m] = load(x[m] + k, depth - k);
#pragma GCC unroll 4
        for (int r = 0; r < RANKS; r++) {
            Floats weight = load(a + r * LANES);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) total[m][r] += values[m] * weight;
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int r = 0; r < RANKS; r++) h[m][r] = sum(total[m][r]) * scale;
}

template <typename T, int ROWS = TILE, int RANKS = TILE>
INLINE void shrink_some(
    int rows, int ranks, const T* const* x, const T* a, int64_t depth, float scale, float* const* h) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return shrink_some<T, ROWS - 1, RANKS>(rows, ranks, x, a, depth, scale, h);
    if constexpr (RANKS > 1)
        if (ranks < RANKS) return shrink_some<T, ROWS, RANKS - 1>(rows, ranks, x, a, depth, scale, h);
    shrink<T, ROWS, RANKS>(x, a, depth, scale, h);
}

// `b`: group after group of outputs, all ranks of each, the last group filled up with zeros.
template <typename T, int ROWS>
INLINE void expand(const float* const* h, int64_t rank, const T* b, int64_t features, T* const* out) {
    for (int64_t f = 0; f < features; f += GROUP) {
        Floats total[ROWS][VECTORS] = {};
        for (int64_t r = 0; r < rank; r++, b += GROUP) {
            for (int i = 0; i < GROUP * (int)sizeof(T); i += LINE) __builtin_prefetch((const char*)b + AHEAD + i, 0, 2);
#pragma GCC unroll 4
            for (int n = 0; n < VECTORS; n++) {
                Floats weight = load(b + n * LANES);
#pragma GCC unroll 4
                for (int m = 0; m < ROWS; m++) total[m][n] += weight * h[m][r];
            }
        }
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < VECTORS && f + n * LANES < features; n++) {
                T* to = out[m] + f + n * LANES;
                int64_t count = features - f - n * LANES;
                store(to, load(to, count) + total[m][n], count);
            }
    }
}

template <typename T, int ROWS = TILE>
INLINE void expand_some(int rows, const float* const* h, int64_t rank, const T* b, int64_t features, T* const* out) {
    if constexpr (ROWS > 1)
        if (rows < ROWS) return expand_some<T, ROWS - 1>(rows, h, rank, b, features, out);
    expand<T, ROWS>(h, rank, b, features, out);
}

template <typename T>
void add_lora(const Lora& lora, const LoraRows& rows, const T* x, T* out) {
    static thread_local std::vector<float> memory;
    int64_t width = lora.parts * lora.most_rank;
    if ((int64_t)memory.size() < rows.num_rows * width) memory.resize(rows.num_rows * width);
    float* shrunk = memory.data();
    int64_t depth = (lora.depth + LANES - 1) / LANES * LANES, chunks = (lora.most_rank + TILE - 1) / TILE;
    int64_t blocks = (lora.most_features + BLOCK - 1) / BLOCK;
    // Threads take whole stretches, the same tiles in both loops: so what each of them reads is one stream of memory.
#pragma omp parallel
    {
#pragma omp for schedule(static) collapse(3)
        for (int64_t t = 0; t < rows.num_tiles; t++)
            for (int64_t part = 0; part < lora.parts; part++)
                for (int64_t chunk = 0; chunk < chunks; chunk++) {
                    const LoraTile& tile = rows.tiles[t];
                    const LoraUpdate& update = lora.updates[tile.slot * lora.parts + part];
                    int64_t rank = chunk * TILE;
                    if (rank >= update.rank) continue;
                    const T* a = (const T*)update.a + rank * depth;
                    for (int64_t row = 0; row < tile.count; row += TILE) {
                        int count = std::min<int64_t>(TILE, tile.count - row);
                        const T* from[TILE];
                        float* to[TILE];
                        for (int m = 0; m < count; m++) {
                            int64_t number = tile.first + row + m;
                            from[m] = x + rows.rows[number] * lora.depth;
                            to[m] = shrunk + number * width + part * lora.most_rank + rank;
                        }
                        int ranks = std::min<int64_t>(TILE, update.rank - rank);
                        shrink_some<T>(count, ranks, from, a, lora.depth, update.scale, to);
                    }
                }
#pragma omp for schedule(static) nowait collapse(3)
        for (int64_t t = 0; t < rows.num_tiles; t++)
            for (int64_t part = 0; part < lora.parts; part++)
                for (int64_t block = 0; block < blocks; block++) {
                    const LoraTile& tile = rows.tiles[t];
                    const LoraUpdate& update = lora.updates[tile.slot * lora.parts + part];
                    int64_t first = block * BLOCK, features = std::min(BLOCK, update.features - first);
                    if (!update.rank || features <= 0) continue;
                    const T* b = (const T*)update.b + first * update.rank;
                    for (int64_t row = 0; row < tile.count; row += TILE) {
                        int count = std::min<int64_t>(TILE, tile.count - row);
                        const float* from[TILE];
                        T* to[TILE];
                        for (int m = 0; m < count; m++) {
                            int64_t number = tile.first + row + m;
                            from[m] = shrunk + number * width + part * lora.most_rank;
                            to[m] = out + rows.rows[number] * lora.features + update.first + first;
                        }
                        expand_some<T>(count, from, update.rank, b, features, to);
                    }
                }
    }
}

}  // namespace

// How the matrices lie: ranks side by side in a, values of each in turn, and outputs in a group of b.
extern "C" void lora_layout(int64_t* ranks, int64_t* values, int64_t* group) {
    *ranks = TILE, *values = LANES, *group = GROUP;
}

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void add_lora_##suffix(const Lora* lora, const LoraRows* rows, const T* x, T* out) {                   \
        add_lora(*lora, *rows, x, out);                                                                               \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
