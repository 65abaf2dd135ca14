// The parts of sampling whose roundings are defined (sampling_exact.cpp), for sampling.cpp.
#pragma once
#include <cstdint>
#include <cstring>

// The tokens of a sequence's history, each once, and how often it is in the output.
struct Counts {
    const int64_t *tokens, *counts;
    int64_t size;
};

struct Penalties {
    double repetition, presence, frequency;
};

extern "C" {
// False, with `logits` changed in part: a token is outside of the vocabulary.
bool penalise(float* logits, int64_t vocab, const Counts* history, const Penalties* penalties);

// lots.of_words.
void lots_of(const uint64_t* words, float* lots, int64_t count);
}

// The words of numpy's Philox4x64-10 (Salmon et al., 2011) as sampling/lots.py uses it; cheapest in order.
class PhiloxWords {
  public:
    PhiloxWords(uint64_t seed, uint64_t position) : position(position) {
        for (int round = 0; round < ROUNDS; round++)
            keys[round][0] = seed + round * 0x9E3779B97F4A7C15u, keys[round][1] = round * 0xBB67AE8584CAA73Bu;
    }

    uint64_t at(int64_t number) {
        if (number / 8 != pair) compute(pair = number / 8);
        return words[number % 8];
    }

  private:
    static constexpr int ROUNDS = 10;
    uint64_t position, keys[ROUNDS][2], words[8];
    int64_t pair = -1;

    // Two of Philox's blocks: one alone would keep the multiplier waiting for its own results.
    void compute(uint64_t pair) {
        uint64_t state[2][4] = {{2 * pair + 1, position}, {2 * pair + 2, position}};  // numpy counts up, then draws
        for (const auto& key : keys)
            for (auto& [a, b, c, d] : state) {
                unsigned __int128 of_a = (unsigned __int128)a * 0xD2E7470EE14C6C93u;
                unsigned __int128 of_c = (unsigned __int128)c * 0xCA5A826395121157u;
                a = (uint64_t)(of_c >> 64) ^ b ^ key[0], b = (uint64_t)of_c;
                c = (uint64_t)(of_a >> 64) ^ d ^ key[1], d = (uint64_t)of_a;
            }
        std::memcpy(words, state, sizeof words);
    }
};
