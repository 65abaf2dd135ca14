// y = x w^T + bias by integers: w in 8 or 4 bits, x quantized to 8 as it comes, in groups of as many inputs as share a scale
// of w, or the whole row. A group's products are summed up exactly, as integers, then the groups as floats, in order. So a
// row's result does not depend on the others.
//
// Blocks, tiles and panels as in linear.cpp; a step here is four inputs, a word of 8-bit codes of each feature. Codes of 4 bits
// lie in words of two steps, the first in the lower halves of their bytes.
#include <algorithm>
#include <vector>

#include "integers.h"
#include "kernels.h"

// Some features of a linear layer, as devices/cpu/quantized.py lays it out; `next` are others, in another format.
//
// w = factor * (scale * (code - zero) + offset), with codes from 0 to 2^bits - 1. They lie in blocks of features, a block as
// groups of inputs, a group as its features' scales and offsets (float16, if it has such) and then its codes.
struct QuantizedWeight {
    const uint8_t* blocks;
    const float* factors;  // of each feature; as many as whole blocks have
    const QuantizedWeight* next;
    int64_t depth, features;
    int64_t group;  // inputs; of the activations, too, which are quantized to match
    int32_t bits, zero, has_scales, has_offsets;
    int64_t first, width;  // of the layer's outputs: where these begin, and how many there are
    int64_t inputs;  // of the layer
    const int32_t* order;  // the input of each of `depth` columns, -1 for none; null: the columns are the inputs
};

namespace {

constexpr int LINE = 64;  // bytes that memory hands out at once
constexpr int VECTORS = 2, BLOCK = VECTORS * LANES, UNIT = BLOCK * 4, UNIT_LINES = UNIT / LINE;  // a unit: a word a feature
// Of x, at once. The sums of more rows, which are there as integers and as floats, find no room in the registers.
constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;
constexpr int MOST_STEPS = 384;
constexpr int PANEL_ROWS = 16 * TILE_ROWS;
constexpr int AHEAD = 2048;  // bytes

constexpr int unit_steps(int bits) { return 8 / bits; }

// A weight's measures, in steps and bytes.
struct Layout {
    int64_t steps, group_steps, groups, unit_steps, header;

    explicit Layout(const QuantizedWeight& w) {
        unit_steps = ::unit_steps(w.bits);
        steps = (w.depth + QUAD * unit_steps - 1) / (QUAD * unit_steps) * unit_steps;
        group_steps = std::min(w.group / QUAD, steps);
        groups = (steps + group_steps - 1) / group_steps;
        header = (w.has_scales + w.has_offsets) * BLOCK * sizeof(uint16_t);
    }
    int64_t group_bytes(int64_t count) const { return header + count / unit_steps * UNIT; }
    int64_t block_bytes() const { return groups * header + steps / unit_steps * UNIT; }
};

// Of a row and a group of inputs.
struct GroupInfo {
    float scale, scaled_sum;  // scale times the sum of the codes
    int32_t start;  // of the sum of products: takes the weight's zero back
};

template <int BITS>
struct Problem {
    const QuantizedWeight& w;
    Layout layout;
    const typename Dot<BITS>::Element* x;  // [rows, steps]
    const GroupInfo* info;  // [rows, groups]
    int64_t rows;
};

// M rows of x times `units` of a block, added to `sums`. Each unit prefetches LINES lines that are `ahead` of it.
//
// Not unrolled, and row by row: otherwise GCC computes products long before it adds them, and 16 registers don't hold them.
template <int BITS, int M, int LINES>
INLINE void add_units(
    typename Dot<BITS>::Sum (&sums)[M][VECTORS], const typename Dot<BITS>::Element* x, int64_t x_stride, const uint8_t* w,
    int64_t units, int64_t ahead) {
    constexpr int STEPS = unit_steps(BITS);
#pragma GCC unroll 1
    for (int64_t unit = 0; unit < units; unit++, w += UNIT, x += STEPS) {
#pragma GCC unroll 2
        for (int i = 0; i < LINES; i++) __builtin_prefetch(w + ahead + i * LINE, 0, 2);
        typename Dot<BITS>::Factor factors[STEPS][VECTORS];
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) {
            Words words;
            std::memcpy(&words, w + n * sizeof words, sizeof words);
            if constexpr (BITS == 8) factors[0][n] = Dot<BITS>::factor(words);
            else {
                factors[0][n] = Dot<BITS>::factor(words & 0x0f0f0f0fu);
                factors[1][n] = Dot<BITS>::factor((words >> 4) & 0x0f0f0f0fu);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int s = 0; s < STEPS; s++)
#pragma GCC unroll 2
                for (int n = 0; n < VECTORS; n++) Dot<BITS>::add(sums[m][n], factors[s][n], x[m * x_stride + s]);
    }
}

// M rows of x times steps up to `end` of a block, added to `sums`, unless they are the first. LINES and `ahead` as above.
// No part of its caller, or compilation would take minutes.
template <int BITS, bool SCALES, bool OFFSETS, int M, int LINES>
__attribute__((noinline)) void tile(
    const Problem<BITS>& p, const typename Dot<BITS>::Element* x, const GroupInfo* info, const uint8_t* w, int64_t step,
    int64_t end, float* sums, int64_t ahead) {
    constexpr int STEPS = unit_steps(BITS), HEADER = (SCALES + OFFSETS) * BLOCK * sizeof(uint16_t);
    const int64_t x_stride = p.layout.steps, info_stride = p.layout.groups, group_steps = p.layout.group_steps;
    Floats total[M][VECTORS];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) total[m][n] = step ? load(sums + m * BLOCK + n * LANES) : Floats{};
    for (; step < end; step += group_steps, info++) {
        Floats scales[VECTORS], offsets[VECTORS];
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) {
            if (SCALES) scales[n] = load_halves((const uint16_t*)w + n * LANES);
            if (OFFSETS) offsets[n] = load_halves((const uint16_t*)w + BLOCK + n * LANES);
        }
        if (LINES > 1)
            for (int i = 0; i < HEADER; i += LINE) __builtin_prefetch(w + ahead + i, 0, 2);
        w += HEADER;
        Ints part[M][VECTORS];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int n = 0; n < VECTORS; n++) part[m][n] = Ints{} + info[m * info_stride].start;
        int64_t units = std::min(group_steps, end - step) / STEPS;
        if constexpr (Dot<BITS>::STEPS == 0) {
            add_units<BITS, M, LINES>(part, x, x_stride, w, units, ahead);
            w += units * UNIT, x += units * STEPS;
        } else
            for (int64_t count; units; units -= count) {
                count = std::min<int64_t>(units, Dot<BITS>::STEPS / STEPS);
                typename Dot<BITS>::Sum few[M][VECTORS] = {};
                add_units<BITS, M, LINES>(few, x, x_stride, w, count, ahead);
                w += count * UNIT, x += count * STEPS;
#pragma GCC unroll 16
                for (int m = 0; m < M; m++)
#pragma GCC unroll 2
                    for (int n = 0; n < VECTORS; n++) part[m][n] += Dot<BITS>::total(few[m][n]);
            }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const GroupInfo& of = info[m * info_stride];
#pragma GCC unroll 2
            for (int n = 0; n < VECTORS; n++) {
                Floats value = to_floats(part[m][n]);
                if (SCALES) value *= scales[n];
                total[m][n] += value * of.scale;
                if (OFFSETS) total[m][n] += offsets[n] * of.scaled_sum;
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int n = 0; n < VECTORS; n++) store(sums + m * BLOCK + n * LANES, total[m][n]);
}

template <int BITS, bool SCALES, bool OFFSETS, int LINES, int LEAST, int M = TILE_ROWS, typename... Arguments>
INLINE void tile_of(int64_t rows, Arguments... arguments) {
    if (rows == M) tile<BITS, SCALES, OFFSETS, M, LINES>(arguments...);
    else if constexpr (M > LEAST) tile_of<BITS, SCALES, OFFSETS, LINES, LEAST, M - 1>(rows, arguments...);
}

struct Output {
    const void* bias;
    void* out;
    void (*finish)(const QuantizedWeight& w, const float* sums, int64_t row, int64_t rows, int64_t feature, const Output&);
};

// The sums of some rows and a block, from `row` and `feature` on, go to `out`.
template <typename T>
void finish(
    const QuantizedWeight& w, const float* sums, int64_t row, int64_t rows, int64_t feature, const Output& output) {
    const T* bias = (const T*)output.bias;
    T* out = (T*)output.out;
    for (int64_t end = row + rows; row < end; row++, sums += BLOCK)
        for (int n = 0; n < BLOCK && feature + n < w.features; n += LANES) {
            int64_t count = w.features - feature - n, at = w.first + feature + n;
            Floats y = load(sums + n) * load(w.factors + feature + n);
            if (bias) y += load(bias + at, count);
            store(out + row * w.width + at, y, count);
        }
}

// Some rows times a block.
template <int BITS, bool SCALES, bool OFFSETS>
void product(const Problem<BITS>& p, const Output& output, int64_t first_row, int64_t rows, int64_t block) {
    static thread_local std::vector<float> memory;
    const Layout& layout = p.layout;
    // A part of the depth is whole groups, about as many as the caches hold.
    int64_t part = std::max<int64_t>(1, MOST_STEPS / layout.group_steps) * layout.group_steps;
    bool is_whole = part >= layout.steps;
    int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    memory.resize((is_whole ? TILE_ROWS : rows) * BLOCK);
    const uint8_t* w = p.w.blocks + block * layout.block_bytes();
    for (int64_t step = 0, group = 0; step < layout.steps; step += part) {
        int64_t end = std::min(step + part, layout.steps);
        int64_t groups = (end - step + layout.group_steps - 1) / layout.group_steps;
        int64_t bytes = groups * layout.header + (end - step) / layout.unit_steps * UNIT;
        for (int64_t number = 0; number < tiles; number++) {
            int64_t row = rows * number / tiles, count = rows * (number + 1) / tiles - row;
            const auto* x = p.x + (first_row + row) * layout.steps + step;
            const GroupInfo* info = p.info + (first_row + row) * layout.groups + group;
            float* sums = memory.data() + (is_whole ? 0 : row * BLOCK);
            // Each of the first tiles prefetches one line of each unit of the part that follows this one.
            int64_t ahead = tiles == 1 ? AHEAD : number < UNIT_LINES ? bytes + number * LINE : 0;
            if (tiles == 1) tile_of<BITS, SCALES, OFFSETS, UNIT_LINES, 1>(count, p, x, info, w, step, end, sums, ahead);
            else tile_of<BITS, SCALES, OFFSETS, 1, TILE_ROWS / 2>(count, p, x, info, w, step, end, sums, ahead);
            if (end == layout.steps) output.finish(p.w, sums, first_row + row, count, block * BLOCK, output);
        }
        w += bytes, group += groups;
    }
}

template <int BITS, bool SCALES, bool OFFSETS>
void products(const Problem<BITS>& p, const Output& output) {
    int64_t blocks = (p.w.features + BLOCK - 1) / BLOCK, panels = (p.rows + PANEL_ROWS - 1) / PANEL_ROWS;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t block = 0; block < blocks; block++) {
            int64_t row = p.rows * panel / panels, rows = p.rows * (panel + 1) / panels - row;
            product<BITS, SCALES, OFFSETS>(p, output, row, rows, block);
        }
}

template <int BITS, typename T>
void quantize_rows(
    const QuantizedWeight& w, const Layout& layout, const T* x, int64_t rows, typename Dot<BITS>::Element* elements,
    GroupInfo* info) {
#pragma omp parallel for schedule(static) if (rows > TILE_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        static thread_local std::vector<T> gathered;
        static thread_local std::vector<uint32_t> codes;
        const T* from = x + row * w.inputs;
        if (w.order) {
            gathered.resize(w.depth);
            for (int64_t k = 0; k < w.depth; k++) gathered[k] = w.order[k] < 0 ? T{} : from[w.order[k]];
            from = gathered.data();
        }
        codes.resize(layout.steps);
        codes[layout.steps - 1] = 0;
        if (layout.unit_steps == 2) codes[layout.steps - 2] = 0;
        for (int64_t group = 0; group < layout.groups; group++) {
            int64_t first = group * layout.group_steps * QUAD, count = std::min(layout.group_steps * QUAD, w.depth - first);
            GroupInfo& of = info[row * layout.groups + group];
            int32_t sum;
            of.scale = quantize(from + first, count, (int8_t*)codes.data() + first, sum);
            of.scaled_sum = of.scale * (float)sum;
            of.start = -w.zero * sum;
        }
        for (int64_t step = 0; step < layout.steps; step++)
            elements[row * layout.steps + step] = Dot<BITS>::element(codes[step]);
    }
}

// `again`: with x and groups as in the call before.
template <int BITS, typename T>
void multiply(const QuantizedWeight& w, const T* x, const T* bias, T* out, int64_t rows, bool again) {
    static thread_local std::vector<typename Dot<BITS>::Element> elements;
    static thread_local std::vector<GroupInfo> info;
    Layout layout(w);
    if (!again) {
        elements.resize(rows * layout.steps);
        info.resize(rows * layout.groups);
        quantize_rows<BITS>(w, layout, x, rows, elements.data(), info.data());
    }
    Output output = {bias, out, finish<T>};
    Problem<BITS> p = {w, layout, elements.data(), info.data(), rows};
    if (w.has_offsets) products<BITS, true, true>(p, output);
    else if (w.has_scales) products<BITS, true, false>(p, output);
    else if constexpr (BITS == 8) products<BITS, false, false>(p, output);
}

template <typename T>
void multiply(const QuantizedWeight& weight, const T* x, const T* bias, T* out, int64_t rows) {
    if (!rows) return;
    const QuantizedWeight* before = nullptr;
    for (const QuantizedWeight* w = &weight; w; before = w, w = w->next) {
        bool again = before && before->group == w->group && before->bits == w->bits && before->zero == w->zero &&
                     before->order == w->order;
        if (w->bits == 8) multiply<8>(*w, x, bias, out, rows, again);
        else multiply<4>(*w, x, bias, out, rows, again);
    }
}

// Rows of the weight, as an embedding reads them; of a weight whose columns are the inputs.
template <typename T>
void embedding(const QuantizedWeight& weight, const int64_t* features, T* out, int64_t count) {
#pragma omp parallel for schedule(static) if (count > TILE_ROWS)
    for (int64_t i = 0; i < count; i++) {
        const QuantizedWeight* part = &weight;
        while (features[i] >= part->first + part->features) part = part->next;
        const QuantizedWeight& w = *part;
        Layout layout(w);
        int64_t feature = features[i] - w.first, lane = feature % BLOCK;
        const uint8_t* from = w.blocks + feature / BLOCK * layout.block_bytes();
        float factor = w.factors[feature], scale = 1, offset = 0, values[LANES];
        T* to = out + i * w.depth;
        for (int64_t k = 0, step = 0, filled = 0; k < w.depth; k++) {
            if (k % QUAD == 0) step = k / QUAD;
            if (k % (layout.group_steps * QUAD) == 0) {
                if (k) from += layout.group_bytes(layout.group_steps);
                const uint16_t* header = (const uint16_t*)from;
                if (w.has_scales) scale = half_to_float(header[lane]);
                if (w.has_offsets) offset = half_to_float(header[BLOCK + lane]);
            }
            int64_t local = step % layout.group_steps;
            uint8_t code = from[layout.header + local / layout.unit_steps * UNIT + lane * QUAD + k % QUAD];
            if (w.bits == 4) code = local % 2 ? code >> 4 : code & 15;
            values[filled++] = factor * (scale * (float)(code - w.zero) + offset);
            if (filled == LANES || k + 1 == w.depth) {
                store(to + k + 1 - filled, load(values), filled);
                filled = 0;
            }
        }
    }
}

}  // namespace

extern "C" {
int64_t quantized_bytes(const QuantizedWeight* w) {
    return (w->features + BLOCK - 1) / BLOCK * Layout(*w).block_bytes();
}

int64_t quantized_block() { return BLOCK; }

// `codes` [features, depth], one a byte, with `zero` as w has it still to be added; scales and offsets [features, groups].
void pack_quantized(
    const QuantizedWeight* w, uint8_t* to, const int8_t* codes, const uint16_t* scales, const uint16_t* offsets) {
    Layout layout(*w);
    int64_t blocks = (w->features + BLOCK - 1) / BLOCK;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        uint8_t* out = to + block * layout.block_bytes();
        std::fill_n(out, layout.block_bytes(), 0);
        for (int64_t group = 0; group < layout.groups; group++) {
            int64_t step = group * layout.group_steps, count = std::min(layout.group_steps, layout.steps - step);
            for (int64_t n = 0; n < BLOCK && block * BLOCK + n < w->features; n++) {
                int64_t feature = block * BLOCK + n;
                uint16_t* header = (uint16_t*)out;
                if (w->has_scales) header[n] = scales[feature * layout.groups + group];
                if (w->has_offsets) header[BLOCK + n] = offsets[feature * layout.groups + group];
                const int8_t* from = codes + feature * w->depth;
                for (int64_t k = step * QUAD; k < std::min((step + count) * QUAD, w->depth); k++) {
                    int64_t local = k / QUAD - step;
                    uint8_t& place = out[layout.header + local / layout.unit_steps * UNIT + n * QUAD + k % QUAD];
                    uint8_t code = (uint8_t)(from[k] + w->zero);
                    place |= w->bits == 4 ? (code & 15) << (local % 2 * 4) : code;
                }
            }
            out += layout.group_bytes(count);
        }
    }
}
}

#define EXPORT(T, suffix)                                                                                             \
    extern "C" {                                                                                                      \
    void multiply_quantized_##suffix(const QuantizedWeight* w, const T* x, const T* bias, T* out, int64_t rows) {     \
        multiply(*w, x, bias, out, rows);                                                                   \
    }                                                                                                                 \
    void quantized_embedding_##suffix(const QuantizedWeight* w, const int64_t* features, T* out, int64_t count) {     \
        embedding(*w, features, out, count);                                                                          \
    }                                                                                                                 \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
