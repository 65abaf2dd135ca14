// Causal grouped-query attention over the blocks of the cache, read in place, with an online softmax (Milakov and
// Gimelshein, 2018).
//
// A unit of work is a few tokens of one sequence, with the query heads of one KV head: up to ROWS rows of queries that
// read the same keys and values, KEYS at a time. Few tokens with a long context are cut into parts of SPLIT keys, whose
// results are merged at the end, as in Flash-Decoding (Dao et al., 2023). The cuts depend on the sequence alone: its
// result is the same in any batch and with any number of threads.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2, TILE_ROWS = 6;  // what a product keeps in registers
constexpr int KEYS = TILE_VECTORS * LANES, ROWS = 48, SPLIT = 256;
constexpr float MASKED = -1e30f;  // finite, so that masked minus masked is not NaN

struct Span {  // as attention/native.py lays it out
    int32_t first_row, start, count, table;
};

struct Unit {
    int32_t span, token, head, first_key, end_key;
    bool partial;  // one of several over the same queries
};

struct Scratch {
    std::vector<float> queries, scores, totals, highest, weights;
    std::vector<float> keys, values;  // a tile, for many rows only
    Scratch(int64_t rows, int64_t width)
        : queries(rows * width), scores(rows * KEYS), totals(rows * width), highest(rows), weights(rows),
          keys(rows > TILE_ROWS ? width * KEYS : 0), values(keys.size()) {}
};

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

template <typename T>
struct Attention {
    const T *q, *k_cache, *v_cache;
    T* out;
    const Span* spans;
    const int32_t* tables;
    int64_t num_spans, q_stride, heads, kv_heads, size, block_size, window;
    float scale, softcap;
    int64_t group, width;           // query heads a KV head; `size` in whole vectors of words
    int64_t unit_tokens, max_rows;  // tokens a unit at most; rows of the largest unit

    void run() {
        group = heads / kv_heads;
        width = (size + Wide<T>::WIDTH - 1) / Wide<T>::WIDTH * Wide<T>::WIDTH;
        unit_tokens = std::max<int64_t>(1, ROWS / group);
        std::vector<Unit> units;
        std::vector<std::pair<int64_t, int64_t>> merges;  // of units: first, count
        list_units(units, merges);
        for (const Unit& unit : units) max_rows = std::max(max_rows, num_rows(unit));
        std::vector<float> partials(merges.empty() ? 0 : units.size() * partial_size());
#pragma omp parallel
        {
            Scratch scratch(max_rows, width);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < units.size(); i++) {
                attend(units[i], scratch);
                if (units[i].partial) save(units[i], scratch, partials.data() + i * partial_size());
                else finish(units[i], scratch);
            }
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < merges.size(); i++) {
                const Unit& unit = units[merges[i].first];
                merge(unit, partials.data() + merges[i].first * partial_size(), merges[i].second, scratch);
                finish(unit, scratch);
            }
        }
    }

    int64_t partial_size() const { return max_rows * (width + 2); }

    int64_t num_rows(const Unit& unit) const {
        return std::min<int64_t>(unit_tokens, spans[unit.span].count - unit.token) * group;
    }

    void list_units(std::vector<Unit>& units, std::vector<std::pair<int64_t, int64_t>>& merges) const {
        for (int32_t s = 0; s < num_spans; s++)
            for (int32_t token = 0; token < spans[s].count; token += unit_tokens) {
                int32_t position = spans[s].start + token;
                int32_t first = window ? std::max<int32_t>(0, position - window + 1) : 0;
                int32_t end = std::min<int32_t>(position + unit_tokens, spans[s].start + spans[s].count);
                // Many tokens are units enough.
                int32_t part = spans[s].count <= unit_tokens ? SPLIT : end;
                bool partial = end - first > part;
                for (int32_t head = 0; head < kv_heads; head++) {
                    if (partial) merges.push_back({units.size(), (end - first + part - 1) / part});
                    for (int32_t key = first; key < end; key += part)
                        units.push_back({s, token, head, key, std::min(key + part, end), partial});
                }
            }
    }

    // Leaves in `scratch`, for each row: the sum of its weighted values, its weights' sum, its highest score.
    void attend(const Unit& unit, Scratch& scratch) const {
        int64_t rows = num_rows(unit), first_row = spans[unit.span].first_row + unit.token;
        for (int64_t row = 0; row < rows; row++) {
            const T* from = q + (first_row + row / group) * q_stride + (unit.head * group + row % group) * size;
            for (int64_t d = 0; d < size; d += LANES)
                store(&scratch.queries[row * width + d], load(from + d, size - d) * scale);
        }
        std::fill_n(scratch.totals.begin(), rows * width, 0.0f);
        std::fill_n(scratch.weights.begin(), rows, 0.0f);
        std::fill_n(scratch.highest.begin(), rows, MASKED);
        int64_t places[KEYS], next[KEYS];
        locate(unit, unit.first_key, next);
        for (int32_t key = unit.first_key; key < unit.end_key; key += KEYS) {
            int32_t count = std::min(KEYS, unit.end_key - key);
            std::copy_n(next, KEYS, places);
            locate(unit, key + KEYS, next);
            float *scores = scratch.scores.data(), *totals = scratch.totals.data();
            if (rows <= TILE_ROWS) {
                with_rows(rows, [&](auto few) {
                    constexpr int R = decltype(few)::value, STEP = 2 * Wide<T>::WIDTH;
                    few_scores<R>(scratch.queries.data(), k_cache, places, next, count, scores, size, width);
                    weigh_rows(unit, key, count, scratch);
                    for (int j = 0; j < count; j++) prefetch(v_cache + next[j], size);
                    int64_t d = 0;
                    for (; d + STEP <= size; d += STEP)
                        few_values<R, 2>(scores, v_cache + d, places, count, totals + d, STEP, width);
                    for (; d < size; d += STEP / 2)
                        few_values<R, 1>(scores, v_cache + d, places, count, totals + d, size - d, width);
                });
                continue;
            }
            float *keys = scratch.keys.data(), *values = scratch.values.data();
            read_tile(k_cache, v_cache, places, next, count, keys, values, size, width);
            std::fill_n(scores, rows * KEYS, 0.0f);
            product(scratch.queries.data(), width, keys, KEYS, scores, KEYS, rows, KEYS, size);
            weigh_rows(unit, key, count, scratch);
            product(scores, KEYS, values, width, totals, width, rows, width, count);
        }
    }

    // Where the keys and values of KEYS positions from `first` on lie. What is beyond the end is masked later, so it only
    // has to lie somewhere.
    void locate(const Unit& unit, int32_t first, int64_t* places) const {
        const int32_t* table = tables + spans[unit.span].table;
        int32_t block = first / block_size, offset = first % block_size;
        for (int j = 0; j < KEYS; j++) {
            int64_t slot = first + j < unit.end_key ? table[block] * block_size + offset : 0;
            places[j] = (slot * kv_heads + unit.head) * size;
            if (++offset == block_size) offset = 0, block++;
        }
    }

    void weigh_rows(const Unit& unit, int32_t key, int32_t count, Scratch& scratch) const {
        for (int64_t row = 0; row < num_rows(unit); row++) {
            int32_t position = spans[unit.span].start + unit.token + row / group;
            int32_t end = std::min(position - key + 1, count);
            weigh(row, window ? position - window + 1 - key : 0, end, scratch);
        }
    }

    // From a row's scores of a tile to weights; only the keys [first, end) count.
    void weigh(int64_t row, int32_t first, int32_t end, Scratch& scratch) const {
        float* scores = &scratch.scores[row * KEYS];
        if (softcap)
            for (int j = 0; j < KEYS; j += LANES)  // tanh(x) = 1 - 2 / (e^2x + 1)
                store(scores + j, softcap - 2 * softcap / (exponential(load(scores + j) * (2 / softcap)) + 1.0f));
        for (int j = 0; j < first; j++) scores[j] = MASKED;
        for (int j = std::max(end, 0); j < KEYS; j++) scores[j] = MASKED;
        Floats high = load(scores);
        for (int j = LANES; j < KEYS; j += LANES) high = load(scores + j) > high ? load(scores + j) : high;
        float highest = std::max(scratch.highest[row], largest(high));
        // A row whose keys are all masked so far gets weights of 1 here; the first real score takes them to 0.
        Floats weights = {};
        for (int j = 0; j < KEYS; j += LANES) {
            Floats weight = exponential(load(scores + j) - highest);
            store(scores + j, weight);
            weights += weight;
        }
        float keep = std::exp(scratch.highest[row] - highest);
        scratch.weights[row] = scratch.weights[row] * keep + sum(weights);
        scratch.highest[row] = highest;
        if (keep != 1)
            for (int64_t d = 0; d < width; d += LANES)
                store(&scratch.totals[row * width + d], load(&scratch.totals[row * width + d]) * keep);
    }

    void finish(const Unit& unit, const Scratch& scratch) const {
        int64_t first_row = spans[unit.span].first_row + unit.token;
        for (int64_t row = 0; row < num_rows(unit); row++) {
            T* to = out + ((first_row + row / group) * heads + unit.head * group + row % group) * size;
            for (int64_t d = 0; d < size; d += Wide<T>::WIDTH) {
                Floats parts[Wide<T>::PARTS];
                std::memcpy(parts, &scratch.totals[row * width + d], sizeof parts);
                for (Floats& part : parts) part /= scratch.weights[row];
                Words words = Wide<T>::join(parts);
                std::memcpy(to + d, &words, std::min<int64_t>(sizeof words, (size - d) * sizeof(T)));
            }
        }
    }

    void save(const Unit& unit, const Scratch& scratch, float* partial) const {
        int64_t rows = num_rows(unit);
        partial = std::copy_n(scratch.highest.begin(), rows, partial);
        partial = std::copy_n(scratch.weights.begin(), rows, partial);
        std::copy_n(scratch.totals.begin(), rows * width, partial);
    }

    void merge(const Unit& unit, const float* partials, int64_t count, Scratch& scratch) const {
        int64_t rows = num_rows(unit);
        for (int64_t row = 0; row < rows; row++) {
            float highest = MASKED, weight = 0;
            for (int64_t i = 0; i < count; i++) highest = std::max(highest, partials[i * partial_size() + row]);
            float* total = &scratch.totals[row * width];
            std::fill_n(total, width, 0.0f);
            for (int64_t i = 0; i < count; i++) {
                const float* part = partials + i * partial_size();
                float keep = std::exp(part[row] - highest);
                weight += part[rows + row] * keep;
                for (int64_t d = 0; d < width; d += LANES)
                    store(total + d, load(total + d) + load(part + 2 * rows + row * width + d) * keep);
            }
            scratch.weights[row] = weight;
        }
    }
};

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void attention_##suffix(                                                                               \
        const T* q, int64_t q_stride, const T* k_cache, const T* v_cache, T* out, const Span* spans,                  \
        const int32_t* tables, int64_t num_spans, int64_t heads, int64_t kv_heads, int64_t size, int64_t block_size,  \
        int64_t window, float scale, float softcap) {                                                                 \
        Attention<T> attention = {};                                                                                  \
        attention.q = q, attention.q_stride = q_stride, attention.out = out;                                          \
        attention.k_cache = k_cache, attention.v_cache = v_cache;                                                     \
        attention.spans = spans, attention.tables = tables, attention.num_spans = num_spans;                          \
        attention.heads = heads, attention.kv_heads = kv_heads, attention.size = size;                                \
        attention.block_size = block_size, attention.window = window;                                                 \
        attention.scale = scale, attention.softcap = softcap;                                                         \
        attention.run();                                                                                              \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
