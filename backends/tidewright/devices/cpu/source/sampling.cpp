// From a row of logits to its token, without a sort: the tokens that sampling/sampler.py draws in torch, and what they
// mean is written there.
//
// Rows are cut into blocks of 64 tokens, as for sampling/truncation.py's race. The highest logit of each block tells
// which blocks min_p and top_k may leave anything of, and only those are looked at further. top_p needs the mass of all.
// Weights are exp((logit - highest) / temperature): probabilities up to a factor.
#include "sampling.h"

#include <algorithm>
#include <functional>
#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 64;
constexpr int VECTORS = BLOCK / LANES;
constexpr float GREEDY_BELOW = 1e-5f;  // temperature, as in step/sampling.py
constexpr float NOTHING = -INFINITY;

// By row, as step/sampling.py has them.
struct Columns {
    const float* temperature;
    const int64_t* top_k;
    const double* top_p;
    const float* min_p;
    const double *repetition_penalty, *presence_penalty, *frequency_penalty;
    const int64_t *seed, *position;
};

struct Draw {
    float temperature, min_p;
    int64_t top_k;
    double top_p;
    uint64_t seed, position;

    Draw(const Columns& columns, int64_t row)
        : temperature(columns.temperature[row]),
          min_p(columns.min_p[row]),
          top_k(columns.top_k[row]),
          top_p(columns.top_p[row]),
          seed(columns.seed[row]),
          position(columns.position[row]) {}
};

// A thread's, for one row.
struct Scratch {
    std::vector<float> row, maxima, weights, masses, candidates, lots;
    std::vector<int64_t> blocks, racing;  // whose weights are there; those that can win
    std::vector<uint64_t> words;

    void reserve(int64_t num_blocks) {
        if ((int64_t)maxima.size() >= num_blocks) return;
        for (auto* values : {&maxima, &masses}) values->resize(num_blocks);
        for (auto* values : {&row, &weights, &candidates}) values->resize(num_blocks * BLOCK);
        blocks.resize(num_blocks);
        int64_t racers = std::max(num_blocks, BLOCK);
        racing.resize(racers), words.resize(racers), lots.resize(racers);
    }
};

INLINE Floats only(Floats x, Ints where) { return (Floats)((Ints)x & where); }

INLINE int32_t bits_of(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(int32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T>
struct Row {
    const T* logits;
    int64_t vocab;

    int64_t num_blocks() const { return (vocab + BLOCK - 1) / BLOCK; }

    // What the last block lacks is -infinity.
    INLINE void read(int64_t block, Floats* x) const {
        const T* from = logits + block * BLOCK;
        int64_t left = vocab - block * BLOCK;
        if (left >= BLOCK) {
            for (int v = 0; v < VECTORS; v++) x[v] = load(from + v * LANES);
            return;
        }
        float all[BLOCK];
        for (int64_t i = 0; i < BLOCK; i++) all[i] = i < left ? widen(from[i]) : NOTHING;
        for (int v = 0; v < VECTORS; v++) x[v] = load(all + v * LANES);
    }

    // The highest of each block; false if there is a NaN.
    bool maxima(float* of_blocks) const {
        Ints odd = {};
        for (int64_t block = 0; block < num_blocks(); block++) {
            Floats x[VECTORS];
            read(block, x);
            Floats most = x[0];
            for (int v = 0; v < VECTORS; v++) {
                odd |= x[v] != x[v];
                most = x[v] > most ? x[v] : most;
            }
            of_blocks[block] = largest(most);
        }
        return !sum(odd);
    }

    // The first of the highest; NaN counts as the highest.
    int64_t first_highest() const {
        int64_t best = 0;
        for (int64_t i = 0; i < vocab; i++) {
            float x = widen(logits[i]), most = widen(logits[best]);
            if (x != x) return i;
            if (x > most) best = i;
        }
        return best;
    }

    int64_t first_equal(int64_t block, float x) const {
        int64_t i = block * BLOCK;
        while (widen(logits[i]) != x) i++;
        return i;
    }
};

// The sum of the weights above x, or how many they are.
template <bool COUNTS>
double above(const float* weights, int64_t size, float x) {
    constexpr int64_t PART = 1024 * LANES;  // so that sums in float32 stay short
    double total = 0;
    for (int64_t first = 0; first < size; first += PART) {
        int64_t end = std::min(first + PART, size);
        Floats part[2] = {};
        for (int64_t i = first; i < end; i += LANES) {
            Floats weight = load(weights + i, end - i);
            part[i / LANES % 2] += only(COUNTS ? Floats{} + 1.0f : weight, weight > x);
        }
        total += sum(part[0] + part[1]);
    }
    return total;
}

// The lowest float32 x >= `low` with less than `target` in weights above it; 1 at most, which is the highest weight.
// Positive floats have the order of their bits, so this halves the bits; `weights`, of which those below `low` do not
// matter, shrink to those that are still in question. Rearranges them.
template <bool COUNTS>
float lowest_with_less_above(float* weights, int64_t size, float low, double target) {
    int32_t below = bits_of(low) - 1, top = bits_of(1.0f);
    double heavier = 0;  // above `top`
    while (top - below > 1) {
        int32_t middle = below + (top - below) / 2;
        float x = float_of(middle);
        double found = heavier + above<COUNTS>(weights, size, x);
        bool is_less = found < target;
        (is_less ? top : below) = middle;
        if (is_less) heavier = found;
        int64_t kept = 0;
        for (int64_t i = 0; i < size; i++) {
            float weight = weights[i];
            weights[kept] = weight;
            kept += (weight > x) != is_less;
        }
        size = kept;
    }
    return float_of(top);
}

template <typename T>
class Choice {
  public:
    Choice(const Row<T>& row, const Draw& draw, Scratch& scratch)
        : row(row), draw(draw), scratch(scratch), num_blocks(row.num_blocks()) {}

    int64_t token() {
        bool are_numbers = row.maxima(scratch.maxima.data());
        auto maxima = scratch.maxima.begin();
        auto best = std::max_element(maxima, maxima + num_blocks);
        highest = *best;
        if (!are_numbers) return row.first_highest();
        // Infinity, or nothing but bans: no distribution, but a token of the vocabulary all the same.
        if (draw.temperature < GREEDY_BELOW || std::isinf(highest)) return row.first_equal(best - maxima, highest);
        limits();
        weigh();
        return race(edge());
    }

  private:
    const Row<T>& row;
    const Draw& draw;
    Scratch& scratch;
    int64_t num_blocks, num_weighed = 0;
    float highest = 0;
    float lowest = NOTHING;  // logits below have no chance
    float kth = NOTHING;     // at least top_k logits are as high

    bool has_top_k() const { return draw.top_k > 0 && draw.top_k < row.vocab; }

    // Below it weights are less than `weight`, also with all errors of rounding.
    float logit_of(float weight) const { return highest + draw.temperature * (std::log(weight) - 0.01f); }

    float weight_of(float logit) const { return weight(Floats{} + logit)[0]; }

    // Divided as in torch, for the same rounding.
    INLINE Floats weight(Floats logits) const { return exponential((logits - highest) / draw.temperature); }

    void limits() {
        if (draw.min_p > 0) lowest = logit_of(draw.min_p);
        if (has_top_k() && draw.top_k <= num_blocks) {
            float* sorted = scratch.candidates.data();
            std::copy_n(scratch.maxima.data(), num_blocks, sorted);
            std::nth_element(sorted, sorted + draw.top_k - 1, sorted + num_blocks, std::greater<float>());
            kth = sorted[draw.top_k - 1];
            lowest = std::max(lowest, kth - 0.01f * draw.temperature);
        }
    }

    // The weights of the blocks that have a chance, side by side, and their sums.
    void weigh() {
        for (int64_t block = 0; block < num_blocks; block++) {
            if (scratch.maxima[block] < lowest) continue;
            Floats x[VECTORS], mass = {};
            row.read(block, x);
            float* to = scratch.weights.data() + num_weighed * BLOCK;
            for (int v = 0; v < VECTORS; v++) {
                x[v] = weight(x[v]);
                store(to + v * LANES, x[v]);
                mass += x[v];
            }
            scratch.masses[num_weighed] = sum(mass);
            scratch.blocks[num_weighed++] = block;
        }
    }

    // Calls `work` with each block's number among the weighed ones, if it may have weights from `edge` on.
    template <typename F>
    INLINE void each(float edge, F work) {
        float least = edge > 0 ? logit_of(edge) : NOTHING;
        for (int64_t i = 0; i < num_weighed; i++)
            if (scratch.maxima[scratch.blocks[i]] >= least) work(i);
    }

    // Copies those from `edge` on.
    int64_t gather(float edge) {
        int64_t size = 0;
        float* to = scratch.candidates.data();
        each(edge, [&](int64_t i) {
            const float* from = scratch.weights.data() + i * BLOCK;
            for (int64_t j = 0; j < BLOCK; j++) {
                to[size] = from[j];
                size += from[j] >= edge;
            }
        });
        return size;
    }

    // The lowest weight that stays.
    float edge() {
        float edge = draw.min_p;
        float* candidates = scratch.candidates.data();
        if (has_top_k()) {
            float low = std::max(edge, weight_of(kth));
            int64_t size = gather(low);
            edge = std::max(edge, lowest_with_less_above<true>(candidates, size, low, (double)draw.top_k));
        }
        if (draw.top_p < 1) {
            double total = 0;
            // Of everything, tokens as likely as this or less have together less than top_p drops.
            float low = edge;
            if (!(edge > 0)) {
                for (int64_t i = 0; i < num_weighed; i++) total += scratch.masses[i];
                low = (float)((1 - draw.top_p) * total / row.vocab * 0.99);
            }
            int64_t size = gather(low);
            if (edge > 0) total = above<false>(candidates, size, 0);
            edge = lowest_with_less_above<false>(candidates, size, low, draw.top_p * total);
        }
        return edge;
    }

    // truncation.race, of the weights from `edge` on: first among the blocks, then inside the one that won.
    int64_t race(float edge) {
        PhiloxWords drawn{draw.seed, draw.position};
        int64_t *racing = scratch.racing.data(), count = 0;
        each(edge, [&](int64_t i) {
            scratch.words[count] = drawn.at(scratch.blocks[i]);
            racing[count++] = i;
        });
        int64_t first = racing[winner_of(count, [&](int64_t n) { return mass(racing[n], edge); })];

        const float* weights = scratch.weights.data() + first * BLOCK;
        count = 0;
        for (int64_t j = 0; j < BLOCK; j++) {
            if (!(weights[j] >= edge)) continue;
            scratch.words[count] = drawn.at(num_blocks + j);
            racing[count++] = j;
        }
        return scratch.blocks[first] * BLOCK + racing[winner_of(count, [&](int64_t n) { return weights[racing[n]]; })];
    }

    // The first with the highest weight / lot.
    template <typename F>
    int64_t winner_of(int64_t count, F weight_of) {
        float *lots = scratch.lots.data(), best = -1;
        lots_of(scratch.words.data(), lots, count);
        int64_t winner = 0;
        for (int64_t n = 0; n < count; n++) {
            float score = weight_of(n) / lots[n];
            if (score > best) best = score, winner = n;
        }
        return winner;
    }

    float mass(int64_t i, float edge) const {
        if (!(edge > 0)) return scratch.masses[i];
        Floats mass = {};
        for (int v = 0; v < VECTORS; v++) {
            Floats x = load(scratch.weights.data() + i * BLOCK + v * LANES);
            mass += only(x, x >= edge);
        }
        return sum(mass);
    }
};

// -1: a token of its history is outside of the vocabulary.
template <typename T>
int64_t token_of(
    const T* logits, int64_t vocab, const Columns& columns, const Counts* history, int64_t row, Scratch& scratch) {
    Draw draw(columns, row);
    Row<T> plain{logits, vocab};
    scratch.reserve(plain.num_blocks());
    if (!history || !history[row].size) return Choice<T>(plain, draw, scratch).token();
    float* changed = scratch.row.data();
    for (int64_t i = 0; i < vocab; i += LANES) store(changed + i, load(logits + i, vocab - i), vocab - i);
    Penalties penalties{
        columns.repetition_penalty[row], columns.presence_penalty[row], columns.frequency_penalty[row]};
    if (!penalise(changed, vocab, history + row, &penalties)) return -1;
    return Choice<float>(Row<float>{changed, vocab}, draw, scratch).token();
}

// `stride`: from one row of logits to the next. `history`: by row, of size 0 where there are no penalties, or null.
template <typename T>
void sample(
    const T* logits, int64_t stride, const Columns& columns, const Counts* history, int64_t* tokens, int64_t rows,
    int64_t vocab) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        static thread_local Scratch scratch;
        tokens[row] = token_of(logits + row * stride, vocab, columns, history, row, scratch);
    }
}

}  // namespace

#define EXPORT(T, suffix)                                                                                             \
    extern "C" void sample_##suffix(                                                                                  \
        const T* logits, int64_t stride, const Columns* columns, const Counts* history, int64_t* tokens,              \
        int64_t rows, int64_t vocab) {                                                                                \
        sample(logits, stride, *columns, history, tokens, rows, vocab);                                               \
    }
EXPORT(float, f32)
EXPORT(BF16, bf16)
