// Products of small integers, and what comes before and after them: activations become codes, half-precision scales floats.
#pragma once
#include "vectors.h"
#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int QUAD = 4;  // values of 8 bits in a word

// sum += the sum of four products in each word: of unsigned codes of the weight by signed codes of the activations, which are
// -127 to 127. Exact.
// A Factor is what a vector of words of the weight becomes, to be multiplied by many rows; an Element, what a word of the
// activations becomes, to be multiplied by many features. A Sum holds STEPS of these, and any number if STEPS is 0.
struct OfWords {
    typedef uint32_t Element;
    static INLINE Element element(uint32_t codes) { return codes; }
};
struct Summed : OfWords {
    typedef Ints Sum;
    static constexpr int STEPS = 0;
};
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
template <int BITS>
struct Dot : Summed {
    typedef Words Factor;
    static INLINE Factor factor(Words codes) { return codes; }
    static INLINE void add(Ints& total, Factor w, uint32_t x) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        total = (Ints)_mm512_dpbusd_epi32((__m512i)total, (__m512i)w, _mm512_set1_epi32((int)x));
#else
        total = (Ints)_mm256_dpbusd_avx_epi32((__m256i)total, (__m256i)w, _mm256_set1_epi32((int)x));
#endif
    }
};
#elif defined(__AVX2__)
#ifdef __AVX512F__
#define SIMD(name) _mm512_##name
#define Simd __m512i
#else
#define SIMD(name) _mm256_##name
#define Simd __m256i
#endif
// Sums of two products in 16 bits, at most 2 * 15 * 127, so nothing saturates. Eight of them fit as well, at most 30,480, which
// saves widening seven.
template <int BITS>
struct Dot : OfWords {
    typedef Words Factor;
    typedef Shorts Sum;
    static constexpr int STEPS = 8;
    static INLINE Factor factor(Words codes) { return codes; }
    static INLINE void add(Sum& sum, Factor w, uint32_t x) {
        sum += (Shorts)SIMD(maddubs_epi16)((Simd)w, SIMD(set1_epi32)((int)x));
    }
    static INLINE Ints total(Sum sum) { return (Ints)SIMD(madd_epi16)((Simd)sum, SIMD(set1_epi16)(1)); }
};
// Codes of 8 bits would saturate there: they are widened, the first and third of a word, and the second and fourth. Those of
// the activations are widened once, not for each block of features: that was a quarter of all operations.
template <>
struct Dot<8> {
    typedef Ints Sum;
    static constexpr int STEPS = 0;
    struct Factor {
        Simd odd, even;
    };
    struct Element {
        int16_t odd[2], even[2];
    };
    static INLINE Factor factor(Words codes) {
        Simd w = (Simd)codes;
        return {(Simd)(codes & 0x00ff00ffu), SIMD(srli_epi16)(w, 8)};
    }
    static INLINE Element element(uint32_t codes) {
        return {{(int8_t)codes, (int8_t)(codes >> 16)}, {(int8_t)(codes >> 8), (int8_t)(codes >> 24)}};
    }
    static INLINE void add(Sum& sum, const Factor& w, const Element& x) {
        sum += (Ints)SIMD(madd_epi16)(w.odd, spread(x.odd));
        sum += (Ints)SIMD(madd_epi16)(w.even, spread(x.even));
    }
    static INLINE Simd spread(const int16_t* two) {
        int word;
        std::memcpy(&word, two, sizeof word);
        return SIMD(set1_epi32)(word);
    }
};
#else
template <int BITS>
struct Dot : Summed {
    struct Factor {
        Ints parts[QUAD];
    };
    static INLINE Factor factor(Words codes) {
        Factor w;
        for (int i = 0; i < QUAD; i++) w.parts[i] = (Ints)((codes >> (8 * i)) & 0xffu);
        return w;
    }
    static INLINE void add(Ints& total, const Factor& w, uint32_t x) {
        for (int i = 0; i < QUAD; i++) total += w.parts[i] * (int32_t)(int8_t)(x >> (8 * i));
    }
};
#endif

INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// Of float16.
INLINE Floats load_halves(const uint16_t* from) {
    Halves bits;
    std::memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps((__m128i)bits);
#else
    Words wide = __builtin_convertvector(bits, Words);
    Floats size = (Floats)((wide & 0x7fffu) << 13) * 0x1p112f;
    return (Floats)((Words)size | (wide & 0x8000u) << 16);
#endif
}

INLINE float half_to_float(uint16_t half) {
    uint32_t bits = (half & 0x7fffu) << 13;
    float size;
    std::memcpy(&size, &bits, sizeof size);
    size *= 0x1p112f;
    return half & 0x8000u ? -size : size;
}

// To the nearest whole number, ties to even.
INLINE Ints round_to_ints(Floats x) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX__)
    return (Ints)_mm256_cvtps_epi32((__m256)x);
#else
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    return __builtin_convertvector((x + shift) - shift, Ints);
#endif
}

INLINE void store_codes(int8_t* to, Ints codes, int64_t count) {
    int8_t buffer[LANES];
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)buffer, _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
    __m256i all = (__m256i)codes;
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64((__m128i*)buffer, _mm_packs_epi16(halves, halves));
#else
    for (int i = 0; i < LANES; i++) buffer[i] = (int8_t)codes[i];
#endif
    if (count >= LANES) std::memcpy(to, buffer, LANES);
    else std::memcpy(to, buffer, count);
}

// Values become codes from -127 to 127 times what is returned; `total` is the sum of the codes. A value that is no number,
// or infinite, makes the scale so.
template <typename T>
INLINE float quantize(const T* x, int64_t count, int8_t* codes, int32_t& total) {
    float amount = largest_magnitude(x, count);
    float factor = amount > 1e-30f ? 127 / amount : 0;  // also 0 for NaN
    Ints sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        Ints rounded = factor > 0 ? round_to_ints(load(x + i, count - i) * factor) : Ints{};
        sums += rounded;
        store_codes(codes + i, rounded, count - i);
    }
    total = sum(sums);
    return factor > 0 ? amount / 127 : amount;
}

}  // namespace
