// Causal grouped-query attention over the blocks of the cache, read in place, with an online softmax (Milakov and
// Gimelshein, 2018).
//
// A unit of work is a few tokens of one sequence, with the query heads of one KV head: up to ROWS rows of queries that
// read the same keys and values, KEYS at a time. Few tokens with a long context are cut into parts of SPLIT keys, whose
// results are merged at the end, as in Flash-Decoding (Dao et al., 2023). Parts that neighbouring sequences share, block
// by block, are read once for all of them, as in Hydragen (Juravsky et al., 2024). The cuts depend on the sequence alone:
// its result is the same with any number of threads and, in float32, in any batch. In bfloat16 many rows are summed in
// another order than few, and where there is AMX, by that.
#include <memory>
#include <vector>

#include "attention_amx.h"

namespace {

constexpr int ROWS = 96, SPLIT = 256;
constexpr float MASKED = -1e30f;  // finite, so that masked minus masked is not NaN

struct Span {  // as attention/native.py lays it out
    int32_t first_row, start, count, table;
};

struct Unit {
    int32_t span, token, head, first_key, end_key;
    int32_t spans = 1;     // of one token each, if several
    int64_t partial = -1;  // where its results wait to be merged, if it is one of several over the same queries
};

// What becomes of a unit's rows of queries: the results of some units, each from one of its rows on.
struct Merge {
    struct Part {
        int64_t unit, row;
    };
    Unit unit;
    std::vector<Part> parts;
};

template <typename T>
struct Scratch {
    std::vector<float> queries, scores, totals, highest, weights;
    std::vector<float> sums;          // of each row's weights, a vector of them
    std::vector<float> keys, values;  // a tile, for many rows only
    std::unique_ptr<Amx<T>> amx;      // instead, where it exists
    std::unique_ptr<TileRegisters> registers;

    // Of up to `rows` rows, padded to whole tiles.
    Scratch(int64_t rows, int64_t width)
        : queries(rows * width), scores(rows * KEYS), totals(rows * width), highest(rows), weights(rows),
          sums(rows * LANES) {
        if (rows <= TILE_ROWS) return;
        if constexpr (Amx<T>::EXISTS)
            if (Amx<T>::permitted()) {
                amx.reset(new Amx<T>(rows, width));
                registers.reset(new TileRegisters());
                return;
            }
        keys.resize(width * KEYS), values.resize(width * KEYS);
    }
};

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
    std::vector<Unit> units;
    std::vector<Merge> merges;

    void run() {
        group = heads / kv_heads;
        width = (size + Wide<T>::WIDTH - 1) / Wide<T>::WIDTH * Wide<T>::WIDTH;
        unit_tokens = std::max<int64_t>(1, ROWS / group);
        list_units();
        int64_t num_partials = 0;
        for (Unit& unit : units) {
            max_rows = std::max(max_rows, num_rows(unit));
            if (unit.partial < 0) continue;
            unit.partial = num_partials;
            num_partials += num_rows(unit) * (width + 2);
        }
        std::unique_ptr<float[]> partials(new float[num_partials]);
#pragma omp parallel
        {
            Scratch<T> scratch(max_rows > TILE_ROWS ? (max_rows + 15) / 16 * 16 : max_rows, width);
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < units.size(); i++) {
                attend(units[i], scratch);
                if (units[i].partial >= 0) save(units[i], scratch, partials.get() + units[i].partial);
                else finish(units[i], scratch);
            }
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < merges.size(); i++) {
                merge(merges[i], partials.get(), scratch);
                finish(merges[i].unit, scratch);
            }
        }
    }

    int64_t num_rows(const Unit& unit) const {
        return std::min<int64_t>(unit_tokens, unit.spans > 1 ? unit.spans : spans[unit.span].count - unit.token) * group;
    }

    void list_units() {
        for (int32_t first = 0; first < num_spans;) {
            int32_t shared;  // keys
            int32_t end = find_sharers(first, shared);
            int64_t shared_units = units.size();
            for (int32_t head = 0; head < kv_heads; head++)
                for (int32_t key = 0; key < shared; key += SPLIT)
                    units.push_back({first, 0, head, key, key + SPLIT, end - first, 0});
            for (int32_t span = first; span < end; span++)
                for (int32_t token = 0; token < spans[span].count; token += unit_tokens)
                    for (int32_t head = 0; head < kv_heads; head++)
                        add_units(span, token, head, shared_units, shared / SPLIT, (span - first) * group);
            first = end;
        }
    }

    // Of the keys of some tokens and a head, the first parts are in units that were made before, in rows from `row` on.
    void add_units(
        int32_t span, int32_t token, int32_t head, int64_t shared_units, int32_t num_shared, int64_t row) {
        int32_t position = spans[span].start + token;
        int32_t first = window ? std::max<int32_t>(0, position - window + 1) : 0;
        int32_t end = std::min<int32_t>(position + unit_tokens, spans[span].start + spans[span].count);
        Unit unit = {span, token, head, first, end};
        // Many tokens are units enough.
        if (spans[span].count > unit_tokens || end - first <= SPLIT) {
            units.push_back(unit);
            return;
        }
        Merge merge = {unit, {}};
        for (int32_t part = 0; part < num_shared; part++)
            merge.parts.push_back({shared_units + head * num_shared + part, row});
        unit.partial = 0;
        for (int32_t key = first + num_shared * SPLIT; key < end; key += SPLIT) {
            unit.first_key = key, unit.end_key = std::min(key + SPLIT, end);
            merge.parts.push_back({int64_t(units.size()), 0});
            units.push_back(unit);
        }
        merges.push_back(merge);
    }

    // The end of the spans of one token, from `first` on, whose first `shared` keys, whole parts, are the same.
    int32_t find_sharers(int32_t first, int32_t& shared) const {
        int32_t end = first + 1;
        shared = 0;
        if (window) return end;
        for (; end < num_spans && end - first < unit_tokens && spans[end].count == 1; end++) {
            int32_t keys = count_shared(spans[first], spans[end]);
            if (end == first + 1) shared = keys;
            if (!keys || keys < shared) break;
        }
        return end;
    }

    int32_t count_shared(const Span& a, const Span& b) const {
        int32_t most = a.count == 1 ? std::min(a.start, b.start) : 0, blocks = 0;
        while (blocks * block_size < most && tables[a.table + blocks] == tables[b.table + blocks]) blocks++;
        return std::min<int32_t>(most, blocks * block_size) / SPLIT * SPLIT;
    }

    // Leaves in `scratch`, for each row: the sum of its weighted values, its weights' sum, its highest score.
    void attend(const Unit& unit, Scratch<T>& scratch) const {
        int64_t rows = num_rows(unit), first_row = spans[unit.span].first_row + unit.token;
        for (int64_t row = 0; row < rows; row++) {
            const T* from = q + (first_row + row / group) * q_stride + (unit.head * group + row % group) * size;
            if constexpr (Amx<T>::EXISTS)
                if (scratch.amx) scratch.amx->set_query(row, from, size);
            for (int64_t d = 0; d < size; d += LANES)
                store(&scratch.queries[row * width + d], load(from + d, size - d));
        }
        std::fill_n(scratch.totals.begin(), rows * width, 0.0f);
        std::fill_n(scratch.sums.begin(), rows * LANES, 0.0f);
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
            if (scratch.amx) {
                attend_by_amx(unit, key, places, next, scratch);
                continue;
            }
            float *keys = scratch.keys.data(), *values = scratch.values.data();
            read_tile(k_cache, v_cache, places, next, count, keys, values, size, width);
            std::fill_n(scores, rows * KEYS, 0.0f);
            product(scratch.queries.data(), width, keys, KEYS, scores, KEYS, rows, KEYS, size);
            weigh_rows(unit, key, count, scratch);
            product(scores, KEYS, values, width, totals, width, rows, width, count);
        }
        for (int64_t row = 0; row < rows; row++) scratch.weights[row] = sum(load(&scratch.sums[row * LANES]));
    }

    void attend_by_amx(
        const Unit& unit, int32_t key, const int64_t* places, const int64_t* next, Scratch<T>& scratch) const {
        if constexpr (Amx<T>::EXISTS) {
            Amx<T>& amx = *scratch.amx;
            int64_t rows = num_rows(unit);
            int32_t count = std::min(KEYS, unit.end_key - key);
            float* scores = scratch.scores.data();
            amx.read(k_cache, v_cache, places, next, count, size);
            amx.score(rows, scores);
            weigh_rows(unit, key, count, scratch);
            for (int64_t row = 0; row < rows; row++) amx.set_weights(row, scores + row * KEYS);
            amx.add_values(rows, scratch.totals.data(), width);
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

    void weigh_rows(const Unit& unit, int32_t key, int32_t count, Scratch<T>& scratch) const {
        for (int64_t row = 0; row < num_rows(unit); row++) {
            int32_t position = spans[unit.span].start + unit.token + row / group;
            int32_t end = std::min(position - key + 1, count);
            weigh(row, window ? position - window + 1 - key : 0, end, scratch);
        }
    }

    // From a row's products of a tile to weights; only the keys [first, end) count.
    void weigh(int64_t row, int32_t first, int32_t end, Scratch<T>& scratch) const {
        float* scores = &scratch.scores[row * KEYS];
        float factor = softcap ? 1 : scale;
        if (softcap)
            for (int j = 0; j < KEYS; j += LANES)  // tanh(x) = 1 - 2 / (e^2x + 1)
                store(scores + j, softcap - 2 * softcap / (exponential(load(scores + j) * (2 * scale / softcap)) + 1.0f));
        for (int j = 0; j < first; j++) scores[j] = MASKED;
        for (int j = std::max(end, 0); j < KEYS; j++) scores[j] = MASKED;
        Floats high = load(scores);
        for (int j = LANES; j < KEYS; j += LANES) high = load(scores + j) > high ? load(scores + j) : high;
        float before = scratch.highest[row], highest = std::max(before, largest(high) * factor);
        // A row whose keys are all masked so far gets weights of 1 here; the first real score takes them to 0.
        float* sums = &scratch.sums[row * LANES];
        if (highest > before) {
            float keep = std::exp(before - highest);
            store(sums, load(sums) * keep);
            for (int64_t d = 0; d < width; d += LANES)
                store(&scratch.totals[row * width + d], load(&scratch.totals[row * width + d]) * keep);
            scratch.highest[row] = highest;
        }
        Floats weights = load(sums);
        for (int j = 0; j < KEYS; j += LANES) {
            Floats weight = exponential(load(scores + j) * factor - highest);
            store(scores + j, weight);
            weights += weight;
        }
        store(sums, weights);
    }

    void finish(const Unit& unit, const Scratch<T>& scratch) const {
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

    void save(const Unit& unit, const Scratch<T>& scratch, float* partial) const {
        int64_t rows = num_rows(unit);
        partial = std::copy_n(scratch.highest.begin(), rows, partial);
        partial = std::copy_n(scratch.weights.begin(), rows, partial);
        std::copy_n(scratch.totals.begin(), rows * width, partial);
    }

    void merge(const Merge& merge, const float* partials, Scratch<T>& scratch) const {
        for (int64_t row = 0; row < num_rows(merge.unit); row++) {
            float highest = MASKED, weight = 0;
            for (const Merge::Part& part : merge.parts)
                highest = std::max(highest, partials[units[part.unit].partial + part.row + row]);
            float* total = &scratch.totals[row * width];
            std::fill_n(total, width, 0.0f);
            for (const Merge::Part& part : merge.parts) {
                int64_t rows = num_rows(units[part.unit]), own = part.row + row;
                const float *from = partials + units[part.unit].partial, *values = from + 2 * rows + own * width;
                float keep = std::exp(from[own] - highest);
                weight += from[rows + own] * keep;
                for (int64_t d = 0; d < width; d += LANES) store(total + d, load(total + d) + load(values + d) * keep);
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
