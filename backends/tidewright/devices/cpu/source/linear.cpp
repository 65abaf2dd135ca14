// y = x w^T + bias for any number of rows of x. For few, memory sets the pace, and each weight is read from it once;
// for many it is the multiplication.
//
// The weight lies in blocks of BLOCK features, a block as steps through its depth, a step as a word of each feature:
// PAIR values that are next to each other in its depth. So each lane of a vector sums up a feature of its own, and a
// block is one stream of memory. Whatever the number of rows, a sum adds up in the order of its depth: a row's result
// does not depend on the others.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "kernels.h"

namespace {

constexpr int LINE = 64;  // bytes that memory hands out at once
constexpr int VECTORS = 2, BLOCK = VECTORS * LANES, STEP_LINES = BLOCK * 4 / LINE;
constexpr int TILE_ROWS = LANES == 16 ? 12 : 4;  // of x, at once: as many as find room for their sums in the registers
// At once: so much of TILE_ROWS rows of x stays in the first cache, so much of a block in the second.
constexpr int MOST_STEPS = 384;
constexpr int PANEL_ROWS = 16 * TILE_ROWS;  // of x, which stay in the second cache while all blocks pass
constexpr int AHEAD = 1024;  // words

template <typename T>
constexpr int PAIR = Wide<T>::PARTS;  // values in a word

// What stands beside a word of w in a product: PAIR values of x, in the type that they are multiplied in.
template <typename T>
struct Widened {
    float values[PAIR<T>];
};
template <typename T>
using Element = std::conditional_t<Product<T>::OF_WORDS, uint32_t, Widened<T>>;

template <typename T>
INLINE typename Product<T>::Factor spread(const Element<T>& x) {
    if constexpr (Product<T>::OF_WORDS) return Words{} + x;
    else {
        typename Product<T>::Factor factor;
        // Minus zero: nothing, and so one load. Plus zero would be computed, as it makes +0 of -0.
        for (int p = 0; p < PAIR<T>; p++) factor.parts[p] = x.values[p] - Floats{};
        return factor;
    }
}

template <typename T>
struct Problem {
    const Element<T>* x;
    const uint32_t* w;
    const T* bias;
    T* out;
    int64_t rows, steps, features;
};

// M rows of x times a block. `sums` has what came before in the depth, unless this is `first`. Each step calls LINES
// lines of the weight from memory, from `ahead` on.
template <typename T, int M, int LINES>
INLINE void tile(
    const Element<T>* x, int64_t x_stride, const uint32_t* w, int64_t steps, float* sums, bool first,
    const char* ahead) {
    Floats total[M][VECTORS];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) total[m][n] = first ? Floats{} : load(sums + m * BLOCK + n * LANES);
    for (int64_t k = 0; k < steps; k++, w += BLOCK, ahead += STEP_LINES * LINE) {
        // Into the second cache: the first has too few lines on their way to wait for memory while it multiplies.
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) __builtin_prefetch(ahead + i * LINE, 0, 2);
        typename Product<T>::Factor factors[VECTORS];
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) {
            Words words;
            std::memcpy(&words, w + n * LANES, sizeof words);
            factors[n] = Product<T>::factor(words);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            auto factor = spread<T>(x[m * x_stride + k]);
#pragma GCC unroll 2
            for (int n = 0; n < VECTORS; n++) Product<T>::add(total[m][n], factors[n], factor);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) store(sums + m * BLOCK + n * LANES, total[m][n]);
}

template <typename T, int LINES, int M = TILE_ROWS, typename... Arguments>
INLINE void tile_of(int64_t rows, Arguments... arguments) {
    if (rows == M) tile<T, M, LINES>(arguments...);
    else if constexpr (M > 1) tile_of<T, LINES, M - 1>(rows, arguments...);
}

// The sums of some rows and a block, from `row` and `feature` on, go to `out`.
template <typename T>
INLINE void finish(const Problem<T>& p, const float* sums, int64_t row, int64_t rows, int64_t feature) {
    for (int64_t end = row + rows; row < end; row++, sums += BLOCK)
        for (int n = 0; n < BLOCK && feature + n < p.features; n += LANES) {
            int64_t count = p.features - feature - n;
            Floats y = load(sums + n);
            if (p.bias) y += load(p.bias + feature + n, count);
            store(p.out + row * p.features + feature + n, y, count);
        }
}

// Some rows times a block.
template <typename T>
void product(const Problem<T>& p, int64_t first_row, int64_t rows, int64_t block) {
    static thread_local std::vector<float> memory;
    int64_t parts = (p.steps + MOST_STEPS - 1) / MOST_STEPS, part = (p.steps + parts - 1) / parts;
    int64_t groups = (rows + TILE_ROWS - 1) / TILE_ROWS;
    memory.resize((parts > 1 ? rows : TILE_ROWS) * BLOCK);
    for (int64_t k = 0; k < p.steps; k += part) {
        int64_t steps = std::min(part, p.steps - k);
        const uint32_t* w = p.w + (block * p.steps + k) * BLOCK;
        for (int64_t group = 0; group < groups; group++) {
            int64_t row = rows * group / groups, count = rows * (group + 1) / groups - row;
            const Element<T>* x = p.x + (first_row + row) * p.steps + k;
            float* sums = memory.data() + (parts > 1 ? row * BLOCK : 0);
            // Each of the first groups calls one line of each step of the part that follows this one.
            const char* ahead = (const char*)(w + (groups > 1 ? steps * BLOCK : AHEAD)) + group * LINE;
            if (groups == 1) tile_of<T, STEP_LINES>(count, x, p.steps, w, steps, sums, k == 0, ahead);
            else if (group < STEP_LINES) tile_of<T, 1>(count, x, p.steps, w, steps, sums, k == 0, ahead);
            else tile_of<T, 0>(count, x, p.steps, w, steps, sums, k == 0, ahead);
            if (k + steps == p.steps) finish(p, sums, first_row + row, count, block * BLOCK);
        }
    }
}

template <typename T>
void linear(const Problem<T>& p) {
    int64_t blocks = (p.features + BLOCK - 1) / BLOCK, panels = (p.rows + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t row = p.rows * panel / panels, rows = p.rows * (panel + 1) / panels - row;
            product(p, row, rows, block);
        }
}

template <typename T>
void linear(const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {
    int64_t steps = (depth + PAIR<T> - 1) / PAIR<T>;
    Problem<T> problem = {(const Element<T>*)x, (const uint32_t*)w, bias, out, rows, steps, features};
    if (depth % PAIR<T> || sizeof(Element<T>) > PAIR<T> * sizeof(T)) {
        static thread_local std::vector<Element<T>> arranged;
        arranged.resize(rows * steps);
        problem.x = arranged.data();
        Element<T>* to = arranged.data();
#pragma omp parallel for schedule(static) if (rows > TILE_ROWS)
        for (int64_t row = 0; row < rows; row++) {
            const T* from = x + row * depth;
            if constexpr (Product<T>::OF_WORDS) {
                to[(row + 1) * steps - 1] = 0;
                std::memcpy(to + row * steps, from, depth * sizeof(T));
            } else {
                to[(row + 1) * steps - 1] = {};
                float* values = to[row * steps].values;
                for (int64_t k = 0; k < depth; k += LANES) store(values + k, load(from + k, depth - k), depth - k);
            }
        }
    }
    linear(problem);
}

// In place, [features, depth] as it lies in a checkpoint; features a multiple of BLOCK, depth of PAIR.
template <typename T>
void pack_weight(T* weight, int64_t depth, int64_t features) {
    int64_t steps = depth / PAIR<T>;
#pragma omp parallel
    {
        std::vector<uint32_t> plain(BLOCK * steps);
#pragma omp for schedule(static)
        for (int64_t block = 0; block < features / BLOCK; block++) {
            uint32_t* words = (uint32_t*)weight + block * BLOCK * steps;
            std::copy_n(words, BLOCK * steps, plain.data());
            for (int64_t k = 0; k < steps; k++)
                for (int64_t n = 0; n < BLOCK; n++) words[k * BLOCK + n] = plain[n * steps + k];
        }
    }
}

// Features of a packed weight, as rows: what an embedding reads that is a head as well.
template <typename T>
void embedding(const T* weight, const int64_t* features, T* out, int64_t count, int64_t depth) {
    int64_t steps = depth / PAIR<T>;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < count; i++) {
        const uint32_t* from = (const uint32_t*)weight + features[i] / BLOCK * BLOCK * steps + features[i] % BLOCK;
        uint32_t* to = (uint32_t*)out + i * steps;
        for (int64_t k = 0; k < steps; k++) to[k] = from[k * BLOCK];
    }
}

}  // namespace

extern "C" int64_t linear_block() { return BLOCK; }

#define EXPORT(T, suffix)                                                                                             \
    extern "C" {                                                                                                      \
    void linear_##suffix(                                                                                             \
        const T* x, const T* w, const T* bias, T* out, int64_t rows, int64_t depth, int64_t features) {               \
        if (rows) linear(x, w, bias, out, rows, depth, features);                                                     \
    }                                                                                                                 \
    void pack_weight_##suffix(T* weight, int64_t depth, int64_t features) { pack_weight(weight, depth, features); }   \
    void embedding_##suffix(const T* weight, const int64_t* features, T* out, int64_t count, int64_t depth) {         \
        embedding(weight, features, out, count, depth);                                                               \
    }                                                                                                                 \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
