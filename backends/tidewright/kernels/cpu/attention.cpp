// Causal grouped-query attention over the blocks of the cache, read in place, with an online softmax (Milakov and
// Gimelshein, 2018).
//
// A unit of work is a few tokens of one sequence, with the query heads of one KV head: up to ROWS rows of queries that
// read the same keys and values, KEYS at a time. Few tokens with a long context are cut into parts of SPLIT keys, whose
// results are merged at the end, as in Flash-Decoding (Dao et al., 2023). The cuts depend on the sequence alone: its
// result is the same in any batch and with any number of threads.
#include <algorithm>
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
    std::vector<float> queries, keys, values, scores, totals, highest, weights;
    Scratch(int64_t rows, int64_t width)
        : queries(rows * width), keys(width * KEYS), values(KEYS * width), scores(rows * KEYS), totals(rows * width),
          highest(rows), weights(rows) {}
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

template <int V>
void product_columns(
    const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t rows, int64_t depth) {
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
        const float* block = a + r * lda;
        switch (std::min<int64_t>(rows - r, TILE_ROWS)) {
            case 1: product_block<1, V>(block, lda, b, ldb, c + r * ldc, ldc, depth); break;
            case 2: product_block<2, V>(block, lda, b, ldb, c + r * ldc, ldc, depth); break;
            case 3: product_block<3, V>(block, lda, b, ldb, c + r * ldc, ldc, depth); break;
            case 4: product_block<4, V>(block, lda, b, ldb, c + r * ldc, ldc, depth); break;
            case 5: product_block<5, V>(block, lda, b, ldb, c + r * ldc, ldc, depth); break;
            default: product_block<6, V>(block, lda, b, ldb, c + r * ldc, ldc, depth);
        }
    }
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
INLINE void transpose_step(Floats* x) {
    Ints low, high;
    for (int j = 0; j < LANES; j++) {
        low[j] = j & STEP ? LANES + j - STEP : j;
        high[j] = j & STEP ? LANES + j : j + STEP;
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & STEP)) {
            Floats a = x[i], b = x[i + STEP];
            x[i] = __builtin_shuffle(a, b, low);
            x[i + STEP] = __builtin_shuffle(a, b, high);
        }
}

// to[d][j] = keys[places[j]][d] for LANES keys.
template <typename T>
void transpose_keys(const T* keys, const int64_t* places, float* to, int64_t size) {
    for (int64_t d = 0; d < size; d += LANES) {
        Floats x[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) x[j] = load(keys + places[j] + d, size - d);
        if (LANES == 16) transpose_step<8 % LANES>(x);
        transpose_step<4>(x);
        transpose_step<2>(x);
        transpose_step<1>(x);
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) store(to + (d + j) * KEYS, x[j]);
    }
}

template <typename T>
struct Attention {
    const T *q, *k_cache, *v_cache;
    T* out;
    const Span* spans;
    const int32_t* tables;
    int64_t num_spans, q_stride, heads, kv_heads, size, block_size, window;
    float scale, softcap;
    int64_t group, width;           // query heads a KV head; `size` in whole vectors
    int64_t unit_tokens, max_rows;  // tokens a unit at most; rows of the largest unit

    void run() {
        group = heads / kv_heads;
        width = (size + LANES - 1) / LANES * LANES;
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
        for (int32_t key = unit.first_key; key < unit.end_key; key += KEYS) {
            int32_t count = std::min(KEYS, unit.end_key - key);
            read_tile(unit, key, count, scratch);
            std::fill_n(scratch.scores.begin(), rows * KEYS, 0.0f);
            product(
                scratch.queries.data(), width, scratch.keys.data(), KEYS, scratch.scores.data(), KEYS, rows, KEYS, size);
            for (int64_t row = 0; row < rows; row++) {
                int32_t position = spans[unit.span].start + unit.token + row / group;
                int32_t end = std::min(position - key + 1, count);
                weigh(row, window ? position - window + 1 - key : 0, end, scratch);
            }
            product(
                scratch.scores.data(), KEYS, scratch.values.data(), width, scratch.totals.data(), width, rows, width,
                count);
        }
    }

    // The keys, transposed, and the values of `count` positions from `first` on, as floats.
    void read_tile(const Unit& unit, int32_t first, int32_t count, Scratch& scratch) const {
        const int32_t* table = tables + spans[unit.span].table;
        int64_t places[KEYS];
        int32_t block = first / block_size, offset = first % block_size;
        for (int j = 0; j < KEYS; j++) {
            // What fills up the last vector of keys is masked; it only has to be there.
            places[j] = j < count ? ((table[block] * block_size + offset) * kv_heads + unit.head) * size : places[0];
            if (++offset == block_size) offset = 0, block++;
        }
        for (int j = 0; j < KEYS; j += LANES) transpose_keys(k_cache, places + j, &scratch.keys[j], size);
        for (int j = 0; j < count; j++)
            for (int64_t d = 0; d < size; d += LANES)
                store(&scratch.values[j * width + d], load(v_cache + places[j] + d, size - d));
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
            for (int64_t d = 0; d < size; d += LANES)
                store(to + d, load(&scratch.totals[row * width + d]) / scratch.weights[row], size - d);
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
