// Vectors of floats, and how they are read from and written to float32 and bfloat16 memory. They are GCC's portable
// vectors: where the processor has none of that width, the compiler splits them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BF16 {
    uint16_t bits;
};

INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

INLINE Floats load(const BF16* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)  // GCC 12 does not find the instruction that widens
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// The upper half of each word is the value in bfloat16: rounded to nearest, ties to even, as torch does.
INLINE Words round_words(Floats x) {
    Words bits = (Words)x;
    bits += 0x7fff + ((bits >> 16) & 1);
    return x == x ? bits : Words{} + 0x7fc00000;
}

INLINE void store(BF16* to, Floats x) {
#if defined(__AVX512F__)
    Halves halves = (Halves)_mm512_cvtepi32_epi16((__m512i)(round_words(x) >> 16));
#elif defined(__AVX2__)
    __m256i words = (__m256i)(round_words(x) >> 16);
    Halves halves = (Halves)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    Halves halves = __builtin_convertvector(round_words(x) >> 16, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

INLINE float widen(float x) { return x; }

INLINE float widen(BF16 x) {
    uint32_t word = (uint32_t)x.bits << 16;
    float wide;
    std::memcpy(&wide, &word, sizeof wide);
    return wide;
}

// The last, incomplete vector of a row; what is missing counts as zero.
template <typename T>
INLINE Floats load(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
    T buffer[LANES] = {};
    std::memcpy(buffer, from, count * sizeof(T));
    return load(buffer);
}

template <typename T>
INLINE void store(T* to, Floats x, int64_t count) {
    if (count >= LANES) return store(to, x);
    T buffer[LANES];
    store(buffer, x);
    std::memcpy(to, buffer, count * sizeof(T));
}

// As if x had been written to memory as a T.
template <typename T>
INLINE Floats rounded(Floats x) {
    T buffer[LANES];
    store(buffer, x);
    return load(buffer);
}

// Each lane with that of the lane STEP away.
template <int STEP>
INLINE Floats opposite(Floats x) {
    Ints from;
    for (int j = 0; j < LANES; j++) from[j] = j ^ STEP;
    return __builtin_shuffle(x, from);
}

// Of Floats or of Ints, as the next one.
template <int STEP = LANES / 2, typename V>
INLINE auto sum(V x) {
    x += (V)opposite<STEP>((Floats)x);
    if constexpr (STEP > 1) return sum<STEP / 2>(x);
    else return x[0];
}

template <int STEP = LANES / 2, typename V>
INLINE auto largest(V x) {
    V other = (V)opposite<STEP>((Floats)x);
    x = x > other ? x : other;
    if constexpr (STEP > 1) return largest<STEP / 2>(x);
    else return x[0];
}

// Of `size` values; NaN if there is one.
template <typename T>
INLINE float largest_magnitude(const T* x, int64_t size) {
    Ints most = {};  // as integers, NaN is above infinity, which is above all others
    for (int64_t d = 0; d < size; d += LANES) {
        Ints bits = (Ints)load(x + d, size - d) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    int32_t bits = largest(most);
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
}

// The fast way to widen: WIDTH values make a vector of words, which is split into PARTS vectors of floats; value i goes
// to part i % PARTS, lane i / PARTS.
template <typename T>
struct Wide;

template <>
struct Wide<float> {
    static constexpr int PARTS = 1, WIDTH = LANES;
    static INLINE void split(Words words, Floats* parts) { parts[0] = (Floats)words; }
    static INLINE Words join(const Floats* parts) { return (Words)parts[0]; }
};

// Shifting up a word's lower value and masking out the upper costs one operation each, half of what it takes to widen
// them in order.
template <>
struct Wide<BF16> {
    static constexpr int PARTS = 2, WIDTH = 2 * LANES;
    static INLINE void split(Words words, Floats* parts) {
        parts[0] = (Floats)(words << 16);
        parts[1] = (Floats)(words & 0xffff0000u);
    }
    static INLINE Words join(const Floats* parts) {
        return (round_words(parts[0]) >> 16) | (round_words(parts[1]) & 0xffff0000u);
    }
};

// Sums of products of WIDTH values each: what a vector of words becomes to be a factor, and the sum, lane by lane.
template <typename T>
struct Product {
    struct Factor {
        Floats parts[Wide<T>::PARTS];
    };
    static constexpr bool OF_WORDS = false;  // a factor is its words as they are
    static INLINE Factor factor(Words words) {
        Factor x;
        Wide<T>::split(words, x.parts);
        return x;
    }
    static INLINE void add(Floats& total, const Factor& a, const Factor& b) {
#pragma GCC unroll 2
        for (int p = 0; p < Wide<T>::PARTS; p++) total += a.parts[p] * b.parts[p];
    }
};

// The processor's own dot product of bfloat16. FAST_BF16_DOT says that it is as fast as a product of floats, of which it replaces
// two; Intel's is slower than what stands above (Sapphire Rapids).
#if defined(__AVX512BF16__) && defined(FAST_BF16_DOT)
template <>
struct Product<BF16> {
    typedef Words Factor;
    static constexpr bool OF_WORDS = true;
    static INLINE Factor factor(Words words) { return words; }
    static INLINE void add(Floats& total, Factor a, Factor b) {
        total = (Floats)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
    }
};
#endif

template <typename T>
INLINE Words read_words(const T* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
}

template <typename T>
INLINE Words read_words(const T* from, int64_t count) {
    if (count >= Wide<T>::WIDTH) return read_words(from);
    T buffer[Wide<T>::WIDTH] = {};
    std::memcpy(buffer, from, count * sizeof(T));
    return read_words(buffer);
}

// Of each two lanes that are STEP apart: `a` gets the lower ones of a and b, `b` the upper ones.
template <int STEP>
INLINE void exchange(Floats& a, Floats& b) {
    Ints low, high;
    for (int j = 0; j < LANES; j++) {
        low[j] = j & STEP ? LANES + j - STEP : j;
        high[j] = j & STEP ? LANES + j : j + STEP;
    }
    Floats first = __builtin_shuffle(a, b, low), second = __builtin_shuffle(a, b, high);
    a = first, b = second;
}

// e^x to an ulp or two; 0 below -87.7, infinite from 88.4 on. x = n ln 2 + r, then the Taylor series of e^r, |r| < 0.35.
INLINE Floats exponential(Floats x) {
    const Floats zero = {};
    x = x < -88.0f ? zero - 88.0f : x;
    x = x > 89.0f ? zero + 89.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Floats n = (x * 1.44269504f + shift) - shift;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats y = zero + 1.0f / 5040;
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float coefficient : coefficients) y = y * r + coefficient;
    return y * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

}  // namespace
