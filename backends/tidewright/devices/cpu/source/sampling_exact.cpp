// What a seed draws and what a penalty takes is the same to the bit on every device: here each product and each sum is
// rounded on its own. So the pragma stands before all code.
#pragma GCC optimize("fp-contract=off")
#include "sampling.h"

namespace {

constexpr int WIDE = 4;
typedef double Doubles __attribute__((vector_size(8 * WIDE)));
typedef int64_t Longs __attribute__((vector_size(8 * WIDE)));

// Below 2^52, for which few processors have an instruction.
inline Doubles doubles_of(Longs x) {
    constexpr double SHIFT = 0x1p52;
    Longs bits = (Longs)(Doubles{} + SHIFT);
    return (Doubles)(x | bits) - SHIFT;
}

}  // namespace

// As sampling/logits.py.
bool penalise(float* logits, int64_t vocab, const Counts* history, const Penalties* penalties) {
    for (int64_t i = 0; i < history->size; i += WIDE) {
        int64_t size = history->size - i < WIDE ? history->size - i : WIDE;
        Doubles x = {};
        Longs counts = {};
        for (int64_t j = 0; j < size; j++) {
            int64_t token = history->tokens[i + j];
            if (token < 0 || token >= vocab) return false;
            x[j] = logits[token];
            counts[j] = history->counts[i + j];
        }
        x = x > 0 ? x / penalties->repetition : x * penalties->repetition;
        x -= penalties->frequency * doubles_of(counts);
        x -= counts > 0 ? Doubles{} + penalties->presence : Doubles{};
        for (int64_t j = 0; j < size; j++) logits[history->tokens[i + j]] = (float)x[j];
    }
    return true;
}

void lots_of(const uint64_t* words, float* lots, int64_t count) {
    constexpr float LN2 = 0.6931471824645996f;
    constexpr float POLYNOMIAL[] = {
        0.4999999403953552f,    0.12500804662704468f,  0.04150085523724556f,   0.016904814168810844f,
        0.0015111892716959119f, 0.011790444143116474f, -0.008094054646790028f, 0.0045258360914886f,
    };
    for (int64_t i = 0; i < count; i++) {
        uint32_t low = (uint32_t)words[i], high = (uint32_t)(words[i] >> 32);
        float v = (float)(int32_t)(low >> 1);
        v = (v > 0.5f ? v : 0.5f) * 0x1p-31f;
        float x = v * POLYNOMIAL[7];
        for (int j = 6; j >= 0; j--) x = (x + POLYNOMIAL[j]) * v;
        float leading = (float)(int32_t)(high >> 8 | 1);
        int32_t bits;
        std::memcpy(&bits, &leading, sizeof bits);
        lots[i] = x + (float)(127 + 23 - (bits >> 23)) * LN2;
    }
}
