// Causal grouped-query attention over the blocks of the cache, read in place, with an online softmax (Milakov and
// Gimelshein, 2018). What is computed together, and in which order, attention_units.h says: a sequence's result is the same
// with any number of threads and, in float32, in any batch. In bfloat16 many rows may be summed in another order than few,
// and where there is AMX, by that.
#pragma once
#include <atomic>
#include <memory>

#include "attention_amx.h"
#include "attention_units.h"

// Defines a kernel of kernels.h: `RUN` gets what it is called with.
#define DEFINE_ATTENTION(name, T, RUN)                                                                                \
    extern "C" void ATTENTION(name, T) {                                                                              \
        RUN(q, q_stride, cache, out, spans, tables, num_spans, heads, kv_heads, size, block_size, window, scale,      \
            softcap);                                                                                                 \
    }

namespace {

constexpr float MASKED = -1e30f;  // finite, so that masked minus masked is not NaN

template <typename T, typename C>
constexpr bool BY_AMX = Amx<T>::EXISTS && std::is_same_v<T, C>;

// The tile that is read: where its vectors lie, and their scales; of one head, these scales.
struct Place {
    int64_t values[KEYS], scales[KEYS];
    bool aligned;  // scales lie side by side, LANES at a time
    float key_scales[KEYS], value_scales[KEYS];
};

template <typename T, typename C>
struct Scratch {
    std::vector<float> queries, scores, totals, highest, weights;
    std::vector<float> units, value_units;  // what a row's scores, and sums of values, have to be multiplied by
    std::vector<float> sums;          // of each row's weights, a vector of them
    std::vector<float> keys, values, added;  // a tile, and what it adds to totals: for many rows only
    std::unique_ptr<Amx<T>> amx;      // instead, where it exists
    std::unique_ptr<TileRegisters> registers;

    // Of up to `rows` rows; `by_tile`: some units have many, then it's whole tiles of them.
    Scratch(int64_t rows, int64_t width, int64_t query_words, bool by_tile)
        : queries(rows * query_words), scores(rows * KEYS), totals(rows * width), highest(rows), weights(rows),
          units(rows), value_units(rows), sums(rows * LANES) {
        if (!by_tile) return;
        if constexpr (BY_AMX<T, C>)
            if (Amx<T>::permitted()) {
                amx.reset(new Amx<T>(rows, width));
                registers.reset(new TileRegisters());
                return;
            }
        keys.resize(query_words * KEYS), values.resize(width * KEYS);
        if (Pairs<T, C>::EXIST) added.resize(rows * width);
    }
};

// T is computed with; C is what the cache holds.
template <typename T, typename C>
struct Attention : Units {
    using S = Scores<T, C>;
    using P = Pairs<T, C>;
    const T* q;
    const C *k_cache, *v_cache;
    const float *k_scales, *v_scales;
    T* out;
    int64_t q_stride, size;
    float scale, softcap;
    int64_t width, query_words;  // `size` in whole vectors, as values and as words of a query
    int64_t max_rows;            // of the largest unit
    bool by_tile;                // there are units of many rows

    void run() {
        int64_t step = Values<C>::WIDTH;
        if constexpr (P::EXIST) step = P::WIDTH;
        width = (size + step - 1) / step * step;
        query_words = (size + Wide<C>::WIDTH - 1) / Wide<C>::WIDTH * LANES * S::PARTS;
        list_units();
        int64_t num_partials = 0;
        for (Unit& unit : units) {
            max_rows = std::max(max_rows, all_rows(unit));
            by_tile |= num_rows(unit) > TILE_ROWS;
            if (unit.partial < 0) continue;
            unit.partial = num_partials;
            num_partials += all_rows(unit) * (width + 2);
        }
        std::unique_ptr<float[]> partials(new float[num_partials]);
        std::atomic<size_t> free = 0;
#pragma omp parallel
        {
            Scratch<T, C> scratch((max_rows + 15) / 16 * 16, width, query_words, by_tile);
            for (size_t i = free++, next; i < units.size(); i = next) {
                const Unit& unit = units[i];
                // The end of a unit of few rows prefetches the start of the next. With many rows, that matters less than
                // that no unit waits for a thread at work.
                bool few = num_rows(unit) <= TILE_ROWS;
                if (few) next = free++;
                attend(unit, few && next < units.size() ? units[next] : unit, scratch);
                if (unit.partial >= 0) save(unit, scratch, partials.get() + unit.partial);
                else finish(unit, scratch);
                if (!few) next = free++;
            }
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (size_t i = 0; i < merges.size(); i++) {
                merge(merges[i], partials.get(), scratch);
                finish(merges[i].unit, scratch);
            }
        }
    }

    // Leaves in `scratch`, for each row: the sum of its weighted values, its weights' sum, its highest score.
    // Prefetches the start of `following`.
    void attend(const Unit& unit, const Unit& following, Scratch<T, C>& scratch) const {
        int64_t rows = num_rows(unit);
        for (int64_t row = 0; row < all_rows(unit); row++) {
            const T* from = q + token_of(unit, row) * q_stride + head_of(unit, row) * size;
            if constexpr (BY_AMX<T, C>)
                if (scratch.amx) scratch.amx->set_query(row, from, size);
            scratch.units[row] = S::read_query(from, size, &scratch.queries[row * query_words]);
        }
        std::fill_n(scratch.totals.begin(), all_rows(unit) * width, 0.0f);
        std::fill_n(scratch.sums.begin(), all_rows(unit) * LANES, 0.0f);
        std::fill_n(scratch.highest.begin(), all_rows(unit), MASKED);
        Place place, next;
        locate(unit, unit.first_key, next);
        for (int32_t key = unit.first_key; key < unit.end_key; key += KEYS) {
            int32_t count = std::min(KEYS, unit.end_key - key);
            place = next;
            bool last = key + KEYS >= unit.end_key;
            locate(last ? following : unit, last ? following.first_key : key + KEYS, next);
            float *scores = scratch.scores.data(), *totals = scratch.totals.data();
            if (rows <= TILE_ROWS) {
                int64_t called = (last ? following : unit).heads * size;
                Ahead<C> next_keys = {k_cache, next.values, called}, next_values = {v_cache, next.values, called};
                for (int32_t head = 0; head < unit.heads; head++)
                    with_rows(rows, [&](auto few) {
                        constexpr int R = decltype(few)::value, V = QUANTIZED<C> ? 4 : 2, WIDTH = Values<C>::WIDTH;
                        int64_t row = head * R, d = 0;
                        const C *keys = k_cache + head * size, *values = v_cache + head * size;
                        float *own_scores = scores + row * KEYS, *own_totals = totals + row * width;
                        few_scores<S, R>(
                            &scratch.queries[row * query_words], keys, place.values, next_keys, count, own_scores, size,
                            query_words);
                        read_scales(place, head, count);
                        weigh_rows(unit, row, key, count, place, scratch);
                        if constexpr (P::EXIST) {
                            const float* units = &scratch.value_units[row];
                            for (; d + 2 * P::WIDTH <= size; d += 2 * P::WIDTH)
                                few_pairs<P, R, 2>(
                                    own_scores, units, values + d, place.values, next_values, count, own_totals + d,
                                    2 * P::WIDTH, width);
                            for (; d < size; d += P::WIDTH)
                                few_pairs<P, R, 1>(
                                    own_scores, units, values + d, place.values, next_values, count, own_totals + d,
                                    size - d, width);
                            return;
                        }
                        for (; d + V * WIDTH <= size; d += V * WIDTH)
                            few_values<R, V>(
                                own_scores, values + d, place.values, next_values, count, own_totals + d, V * WIDTH,
                                width);
                        for (; d < size; d += WIDTH)
                            few_values<R, 1>(
                                own_scores, values + d, place.values, next_values, count, own_totals + d, size - d,
                                width);
                    });
                continue;
            }
            if (scratch.amx) {
                attend_by_amx(unit, key, place, next, scratch);
                continue;
            }
            float *keys = scratch.keys.data(), *values = scratch.values.data();
            read_tile<S, P>(k_cache, v_cache, place.values, next.values, count, keys, values, size, width);
            read_scales(place, 0, count);
            constexpr int PER_WORD = Wide<C>::WIDTH / LANES;  // values of a key
            int64_t words = (size + PER_WORD - 1) / PER_WORD * S::PARTS;
            product<S, false>(scratch.queries.data(), query_words, keys, KEYS, scores, KEYS, rows, KEYS, words);
            weigh_rows(unit, 0, key, count, place, scratch);
            if constexpr (P::EXIST) {
                float* added = scratch.added.data();
                product<P, false>(scores, KEYS, values, width, added, width, rows, width, (count + 1) / 2);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t d = row * width; d < (row + 1) * width; d += LANES)
                        store(totals + d, load(totals + d) + P::finish(load(added + d)) * scratch.value_units[row]);
                continue;
            }
            product<OfFloats, true>(scores, KEYS, values, width, totals, width, rows, width, count);
        }
        for (int64_t row = 0; row < all_rows(unit); row++) scratch.weights[row] = sum(load(&scratch.sums[row * LANES]));
    }

    void attend_by_amx(
        const Unit& unit, int32_t key, const Place& place, const Place& next, Scratch<T, C>& scratch) const {
        if constexpr (BY_AMX<T, C>) {
            Amx<T>& amx = *scratch.amx;
            int64_t rows = num_rows(unit);
            int32_t count = std::min(KEYS, unit.end_key - key);
            float* scores = scratch.scores.data();
            amx.read(k_cache, v_cache, place.values, next.values, count, size);
            amx.score(rows, scores);
            weigh_rows(unit, 0, key, count, place, scratch);
            for (int64_t row = 0; row < rows; row++) amx.set_weights(row, scores + row * KEYS);
            amx.add_values(rows, scratch.totals.data(), width);
        }
    }

    // Where the keys and values of KEYS positions from `first` on lie. What is beyond the end is masked later, so it only
    // has to lie somewhere.
    void locate(const Unit& unit, int32_t first, Place& place) const {
        const int32_t* table = tables + spans[unit.span].table;
        int32_t block = first / block_size, offset = first % block_size;
        for (int j = 0; j < KEYS; j++) {
            bool exists = first + j < unit.end_key;
            int64_t in_table = exists ? table[block] : 0, at = exists ? offset : 0;
            place.values[j] = ((in_table * block_size + at) * kv_heads + unit.head) * size;
            if (QUANTIZED<C>) place.scales[j] = (in_table * kv_heads + unit.head) * block_size + at;
            if (++offset == block_size) offset = 0, block++;
        }
        if constexpr (QUANTIZED<C>) {
            place.aligned = block_size % LANES == 0 && first % LANES == 0;
            for (int j = 0; j < KEYS; j += LANES)
                for (int32_t head = 0; head < unit.heads; head++) {
                    __builtin_prefetch(k_scales + place.scales[j] + head * block_size, 0, 2);
                    __builtin_prefetch(v_scales + place.scales[j] + head * block_size, 0, 2);
                }
        }
    }

    // Of the unit's head number `head`. Behind `count` they are 0: what is multiplied there must be finite.
    void read_scales(Place& place, int32_t head, int32_t count) const {
        if constexpr (QUANTIZED<C>) {
            int64_t from = head * block_size;
            int j = 0;
            if (place.aligned)
                for (; j + LANES <= count; j += LANES) {
                    store(place.key_scales + j, load(k_scales + place.scales[j] + from));
                    store(place.value_scales + j, load(v_scales + place.scales[j] + from));
                }
            for (; j < count; j++) {
                place.key_scales[j] = k_scales[place.scales[j] + from];
                place.value_scales[j] = v_scales[place.scales[j] + from];
            }
            for (; j < KEYS; j++) place.key_scales[j] = place.value_scales[j] = 0;
        }
    }

    // Of one head, from `first` on.
    void weigh_rows(
        const Unit& unit, int64_t first, int32_t key, int32_t count, const Place& place, Scratch<T, C>& scratch) const {
        for (int64_t row = 0; row < num_rows(unit); row++) {
            int32_t position = spans[unit.span].start + unit.token + row / group;
            int32_t end = std::min(position - key + 1, count);
            // The window of a later token may begin behind this tile.
            int32_t begin = window ? std::min(position - int32_t(window) + 1 - key, KEYS) : 0;
            weigh(first + row, begin, end, place, scratch);
        }
    }

    // From a row's products of a tile to weights, with the scales of the values they are for; only the keys [first, end) count.
    void weigh(int64_t row, int32_t first, int32_t end, const Place& place, Scratch<T, C>& scratch) const {
        float* scores = &scratch.scores[row * KEYS];
        if constexpr (QUANTIZED<C>)
            for (int j = 0; j < KEYS; j += LANES)
                store(scores + j, S::finish(load(scores + j)) * scratch.units[row] * load(place.key_scales + j));
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
            if constexpr (QUANTIZED<C>) store(scores + j, weight * (load(place.value_scales + j) * HALF_UNIT<C>));
            else store(scores + j, weight);
            weights += weight;
        }
        store(sums, weights);
        if constexpr (P::EXIST) scratch.value_units[row] = P::store_weights(scores, KEYS, scores);
    }

    void finish(const Unit& unit, const Scratch<T, C>& scratch) const {
        for (int64_t row = 0; row < all_rows(unit); row++) {
            T* to = out + (token_of(unit, row) * heads + head_of(unit, row)) * size;
            if constexpr (P::EXIST) {
                for (int64_t d = 0; d < size; d += P::WIDTH) {
                    Floats parts[2];
                    std::memcpy(parts, &scratch.totals[row * width + d], sizeof parts);
                    deinterleave(parts);
                    for (int p = 0; p < 2 && d + p * LANES < size; p++)
                        store(to + d + p * LANES, parts[p] / scratch.weights[row], size - d - p * LANES);
                }
                continue;
            }
            if constexpr (QUANTIZED<C>) {
                for (int64_t d = 0; d < size; d += LANES) {
                    Floats total = load(&scratch.totals[row * width + d]) * HALF_UNIT<C>;
                    store(to + d, total / scratch.weights[row], size - d);
                }
                continue;
            }
            for (int64_t d = 0; d < size; d += Wide<T>::WIDTH) {
                Floats parts[Wide<T>::PARTS];
                std::memcpy(parts, &scratch.totals[row * width + d], sizeof parts);
                for (Floats& part : parts) part /= scratch.weights[row];
                Words words = Wide<T>::join(parts);
                std::memcpy(to + d, &words, std::min<int64_t>(sizeof words, (size - d) * sizeof(T)));
            }
        }
    }

    void save(const Unit& unit, const Scratch<T, C>& scratch, float* partial) const {
        int64_t rows = all_rows(unit);
        partial = std::copy_n(scratch.highest.begin(), rows, partial);
        partial = std::copy_n(scratch.weights.begin(), rows, partial);
        std::copy_n(scratch.totals.begin(), rows * width, partial);
    }

    void merge(const Merge& merge, const float* partials, Scratch<T, C>& scratch) const {
        for (int64_t row = 0; row < num_rows(merge.unit); row++) {
            float highest = MASKED, weight = 0;
            for (const Merge::Part& part : merge.parts)
                highest = std::max(highest, partials[units[part.unit].partial + part.row + row]);
            float* total = &scratch.totals[row * width];
            std::fill_n(total, width, 0.0f);
            for (const Merge::Part& part : merge.parts) {
                int64_t rows = all_rows(units[part.unit]), own = part.row + row;
                const float *from = partials + units[part.unit].partial, *values = from + 2 * rows + own * width;
                float keep = std::exp(from[own] - highest);
                weight += from[rows + own] * keep;
                for (int64_t d = 0; d < width; d += LANES) store(total + d, load(total + d) + load(values + d) * keep);
            }
            scratch.weights[row] = weight;
        }
    }
};

template <typename T, typename C>
void run_attention(
    const T* q, int64_t q_stride, const Cache* cache, T* out, const Span* spans, const int32_t* tables,
    int64_t num_spans, int64_t heads, int64_t kv_heads, int64_t size, int64_t block_size, int64_t window, float scale,
    float softcap) {
    Attention<T, C> attention = {};
    attention.q = q, attention.q_stride = q_stride, attention.out = out;
    attention.k_cache = (const C*)cache->keys, attention.v_cache = (const C*)cache->values;
    attention.k_scales = cache->key_scales, attention.v_scales = cache->value_scales;
    attention.spans = spans, attention.tables = tables, attention.num_spans = num_spans;
    attention.heads = heads, attention.kv_heads = kv_heads, attention.size = size;
    attention.block_size = block_size, attention.window = window;
    attention.scale = scale, attention.softcap = softcap;
    attention.run();
}

}  // namespace
