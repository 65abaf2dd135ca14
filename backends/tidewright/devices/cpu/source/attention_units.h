// How the attention of a step is cut into units of work.
//
// A unit is a few tokens of one sequence, with the query heads of one KV head: up to ROWS rows of queries that read the
// same keys and values, KEYS at a time. Few tokens with a long context are cut into parts of SPLIT keys, whose results are
// merged at the end, as in Flash-Decoding (Dao et al., 2023); their units take all KV heads, as memory is faster in one run,
// if there are enough of them for all threads. Parts that neighbouring sequences share, block by block, are read once for
// all of them, as in Hydragen (Juravsky et al., 2024). The cuts of the keys depend on the sequence alone.
#pragma once
#include <omp.h>

#include <vector>

#include "attention_tiles.h"
#include "kernels.h"

namespace {

constexpr int ROWS = 96, SPLIT = 256;

struct Unit {
    int32_t span, token, head, heads, first_key, end_key;
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

struct Units {
    const Span* spans;
    const int32_t* tables;
    int64_t num_spans, heads, kv_heads, block_size, window;
    int64_t group;           // query heads a KV head
    int64_t unit_tokens;     // tokens a unit at most
    int32_t heads_together;  // in units of few rows
    std::vector<Unit> units;
    std::vector<Merge> merges;

    // Of each KV head; `all_rows` are those of one head after those of the other.
    int64_t num_rows(const Unit& unit) const {
        return std::min<int64_t>(unit_tokens, unit.spans > 1 ? unit.spans : spans[unit.span].count - unit.token) * group;
    }

    int64_t all_rows(const Unit& unit) const { return num_rows(unit) * unit.heads; }

    void list_units() {
        group = heads / kv_heads;
        unit_tokens = std::max<int64_t>(1, ROWS / group);
        // The keys of all heads lie side by side: it is best to read them so, unless threads would be without work.
        int64_t parts = 0;
        for (int64_t i = 0; i < num_spans; i++) parts += (spans[i].start + spans[i].count) / SPLIT + 1;
        heads_together = parts >= 4 * omp_get_max_threads() ? kv_heads : 1;
        for (int32_t first = 0; first < num_spans;) {
            int32_t shared;  // keys
            int32_t end = find_sharers(first, shared);
            int64_t shared_units = units.size();
            for (int32_t key = 0; key < shared; key += SPLIT)
                add_unit({first, 0, 0, 1, key, key + SPLIT, end - first, 0});
            for (int32_t span = first; span < end; span++)
                for (int32_t token = 0; token < spans[span].count; token += unit_tokens)
                    add_units(span, token, shared_units, shared / SPLIT, (span - first) * group);
            first = end;
        }
    }

    // For each KV head, or for those that go together.
    void add_unit(Unit unit) {
        unit.heads = together(unit);
        for (; unit.head < kv_heads; unit.head += unit.heads) units.push_back(unit);
    }

    int32_t together(const Unit& unit) const { return num_rows(unit) <= TILE_ROWS ? heads_together : 1; }

    // Of the keys of some tokens, the first parts are in units that were made before, in rows from `row` on.
    void add_units(int32_t span, int32_t token, int64_t shared_units, int32_t num_shared, int64_t row) {
        int32_t position = spans[span].start + token;
        int32_t first = window ? std::max<int32_t>(0, position - window + 1) : 0;
        int32_t end = std::min<int32_t>(position + unit_tokens, spans[span].start + spans[span].count);
        Unit unit = {span, token, 0, 1, first, end};
        // Many tokens are units enough.
        if (spans[span].count > unit_tokens || end - first <= SPLIT) {
            add_unit(unit);
            return;
        }
        int64_t own_units = units.size();
        unit.partial = 0;
        for (int32_t key = first + num_shared * SPLIT; key < end; key += SPLIT) {
            unit.first_key = key, unit.end_key = std::min(key + SPLIT, end);
            add_unit(unit);
        }
        for (unit.head = 0; unit.head < kv_heads; unit.head++) {
            Merge merge = {unit, {}};
            add_parts(merge, shared_units, num_shared, row);
            add_parts(merge, own_units, (end - first + SPLIT - 1) / SPLIT - num_shared, 0);
            merges.push_back(merge);
        }
    }

    // `count` parts, whose units are listed from `first_unit` on.
    void add_parts(Merge& merge, int64_t first_unit, int32_t count, int64_t row) const {
        if (!count) return;
        int32_t head = merge.unit.head, heads = units[first_unit].heads;
        row += head % heads * num_rows(units[first_unit]);
        for (int32_t part = 0; part < count; part++)
            merge.parts.push_back({first_unit + (part * kv_heads + head) / heads, row});
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

    // Where a row's query stands in q.
    int64_t token_of(const Unit& unit, int64_t row) const {
        return spans[unit.span].first_row + unit.token + row % num_rows(unit) / group;
    }
    int64_t head_of(const Unit& unit, int64_t row) const {
        return (unit.head + row / num_rows(unit)) * group + row % group;
    }
};

}  // namespace
