// The formats of the KV cache: values as they are computed, or codes of one byte with a scale for each vector, as
// kv_cache/quantized.py defines them.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "vectors.h"

// One layer's keys and values, as kernels.py lays it out. Vectors of `size` values lie one after the other, those of a slot's
// heads side by side. Of the scales, those of a head's slots in a block do.
struct Cache {
    void *keys, *values;
    float *key_scales, *value_scales;  // null unless quantized
    int64_t format;                    // AS_COMPUTED, INT8 or FP8
    int64_t block_size;

    int64_t scale_at(int64_t slot, int64_t head, int64_t kv_heads) const {
        return (slot / block_size * kv_heads + head) * block_size + slot % block_size;
    }
};

namespace {

enum { AS_COMPUTED, INT8, FP8 };

struct Int8 {
    static constexpr float LARGEST = 127;
    int8_t code;
};

struct Fp8 {  // e4m3
    static constexpr float LARGEST = 448;
    uint8_t code;
};

template <typename C>
constexpr bool QUANTIZED = std::is_same_v<C, Int8> || std::is_same_v<C, Fp8>;

// Calls `work` with a value of the type that the cache holds where T is computed with.
template <typename T, typename Work>
INLINE void with_format(const Cache& cache, Work work) {
    if (cache.format == INT8) work(Int8());
    else if (cache.format == FP8) work(Fp8());
    else work(T());
}

// Codes are bytes in words: value i of a vector is byte i % 4 of word i / 4.
template <>
struct Wide<Int8> {
    static constexpr int WIDTH = 4 * LANES;
};

template <>
struct Wide<Fp8> {
    static constexpr int WIDTH = 4 * LANES;
};

typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// LANES codes in their order, with their signs.
template <typename C>
INLINE Ints load_codes(const C* from) {
    static_assert(sizeof(C) == 1);
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
#ifdef __AVX512F__
    return (Ints)_mm512_cvtepi8_epi32((__m128i)bytes);
#else
    return __builtin_convertvector(bytes, Ints);
#endif
}

// A code of e4m3 that stands in the upper byte of each word, and nothing below: as a float it is 2^-120 times its value, exactly.
// Codes of subnormal values would be subnormal floats, which are slow on some processors: `quantize` writes none.
INLINE Floats fp8_above(Words words) { return (Floats)((Words)((Ints)words >> 4) & 0x87f00000u); }

// Likewise codes in the upper bytes of halves of words, as bfloat16.
INLINE Floats fp8_pairs(Shorts halves) { return (Floats)((Shorts)(halves >> 4) & (int16_t)0x87f0); }

// A value of a cache of C is a code times a power of two, applied where it costs least: half of it to the other factor,
// half to the sum, so that neither overflows.
template <typename C>
constexpr float HALF_UNIT = std::is_same_v<C, Fp8> ? 0x1p60f : 1.0f;

// Reads WIDTH values into vectors of floats, as the sum of weighted values needs them.
template <typename C>
struct Values {
    static constexpr int PARTS = Wide<C>::PARTS, WIDTH = Wide<C>::WIDTH;
    static INLINE void read(const C* from, int64_t left, Floats* parts) { Wide<C>::split(read_words(from, left), parts); }
};

template <typename C>
struct CodedValues {
    static constexpr int PARTS = 1, WIDTH = LANES;
    static INLINE void read(const C* from, int64_t left, Floats* parts) {
        Ints codes;
        if (left >= LANES) {
            codes = load_codes(from);
        } else {
            C buffer[LANES] = {};
            std::memcpy(buffer, from, left);
            codes = load_codes(buffer);
        }
        if constexpr (std::is_same_v<C, Fp8>) parts[0] = (Floats)((Words)(codes << 20) & 0x87f00000u);
        else parts[0] = __builtin_convertvector(codes, Floats);
    }
};

template <>
struct Values<Int8> : CodedValues<Int8> {};
template <>
struct Values<Fp8> : CodedValues<Fp8> {};

constexpr float NEGLIGIBLE = 0x1p-100f;  // vectors of smaller numbers count as zeros

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// From LANES values in the lower halves of words, words of two: of the first and third of four, then of the second and fourth.
INLINE void store_pairs(float* words, Ints halves) {
    Ints third, together;
    for (int j = 0; j < LANES; j++) third[j] = j ^ 2, together[j] = (j / 2 * 4 + j % 2) % LANES;
    Ints pairs = (halves & 0xffff) | (__builtin_shuffle(halves, third) << 16);
    pairs = __builtin_shuffle(pairs, together);
    std::memcpy(words, &pairs, sizeof pairs / 2);
}

// Likewise words of two neighbours.
INLINE void store_neighbours(float* words, Ints halves) {
    Ints other, together;
    for (int j = 0; j < LANES; j++) other[j] = j ^ 1, together[j] = j * 2 % LANES;
    Ints pairs = (halves & 0xffff) | (__builtin_shuffle(halves, other) << 16);
    pairs = __builtin_shuffle(pairs, together);
    std::memcpy(words, &pairs, sizeof pairs / 2);
}

// The nearest integer to values up to 2^22.
INLINE Ints nearest(Floats x) {
    return (Ints)(x + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23 leaves the whole number in the lower bits
}

// Sums of products of pairs of integers of 16 bits.
struct OfShorts {
    static INLINE void add(Floats& total, float a, Floats y) {
        int32_t word = bits_of(a);
#if defined(__AVX512VNNI__)
        total = (Floats)_mm512_dpwssd_epi32((__m512i)total, (__m512i)y, _mm512_set1_epi32(word));
#elif defined(__AVX512BW__)
        __m512i products = _mm512_madd_epi16((__m512i)y, _mm512_set1_epi32(word));
        total = (Floats)_mm512_add_epi32((__m512i)total, products);
#elif defined(__AVX2__)
        __m256i products = _mm256_madd_epi16((__m256i)y, _mm256_set1_epi32(word));
        total = (Floats)_mm256_add_epi32((__m256i)total, products);
#else
        Ints pairs = (Ints)y;
        total = (Floats)((Ints)total + (pairs << 16 >> 16) * (int16_t)word + (pairs >> 16) * (word >> 16));
#endif
    }
    static INLINE void combine(Floats& total, Floats other) { total = (Floats)((Ints)total + (Ints)other); }
    static INLINE Floats finish(Floats total) { return __builtin_convertvector((Ints)total, Floats); }
};

// Sums of products of floats.
struct OfFloats {
    static INLINE void add(Floats& total, float a, Floats y) { total += a * y; }
    static INLINE void combine(Floats& total, Floats other) { total += other; }
    static INLINE Floats finish(Floats total) { return total; }
};

// Sums of products of pairs of T, which is bfloat16 where the processor is fast at that.
template <typename T>
struct OfPairs : OfFloats {
    static INLINE void add(Floats& total, float a, Floats y) {
        if constexpr (Product<T>::OF_WORDS) Product<T>::add(total, Words{} + bits_of(a), (Words)y);
    }
};

template <typename T>
constexpr bool BY_PAIRS = std::is_same_v<T, BF16> && Product<BF16>::OF_WORDS;

// What products of queries and keys are made of. PARTS words of a query meet each word of a key, in SUMS sums; `add` takes
// such a word and a part of LANES keys; `finish` makes scores of sums.
template <typename T, typename C>
struct Scores : std::conditional_t<BY_PAIRS<T>, OfPairs<T>, OfFloats> {
    static_assert(std::is_same_v<T, C>);
    static constexpr int PARTS = BY_PAIRS<T> ? 1 : Wide<T>::PARTS, SUMS = PARTS;
    static INLINE void split(Words words, Floats* parts) {
        if constexpr (BY_PAIRS<T>) parts[0] = (Floats)words;
        else Wide<T>::split(words, parts);
    }
    // Returns what scores have to be multiplied by.
    static INLINE float read_query(const T* from, int64_t size, float* words) {
        if constexpr (BY_PAIRS<T>)
            for (int64_t d = 0; d < size; d += Wide<T>::WIDTH, words += LANES)
                store(words, (Floats)read_words(from + d, size - d));
        else
            for (int64_t d = 0; d < size; d += LANES) store(words + d, load(from + d, size - d));
        return 1;
    }
};

// Integers: the query becomes 16 bits a value, of which the smallest is a 65th of a bfloat16's rounding. Sums are exact.
template <typename T>
struct Scores<T, Int8> : OfShorts {
    static constexpr int PARTS = 2, SUMS = 2;
    static INLINE void split(Words words, Floats* parts) {
        parts[0] = (Floats)((Shorts)((Shorts)words << 8) >> 8);  // bytes 0 and 2
        parts[1] = (Floats)((Shorts)words >> 8);                 // 1 and 3
    }
    static INLINE float read_query(const T* from, int64_t size, float* words) {
        float most = largest_magnitude(from, size);
        // As large as sums over all values of the head allow.
        float factor = std::min(32767.0f, 32767.0f * 512 / size) / most;
        if (!(most >= NEGLIGIBLE && factor > 0)) factor = 0;
        for (int64_t d = 0; d < size; d += LANES, words += LANES / 2)
            store_pairs(words, nearest(load(from + d, size - d) * factor));
        // The integers of NaN or infinity mean nothing; so must the scores.
        return factor ? 1 / factor : most < NEGLIGIBLE ? 0 : std::numeric_limits<float>::quiet_NaN();
    }
};

// Sums are not split, so that few rows add up in the order in which many do.
template <typename T>
struct Scores<T, Fp8> : std::conditional_t<BY_PAIRS<T>, OfPairs<T>, OfFloats> {
    static constexpr int PARTS = BY_PAIRS<T> ? 2 : 4, SUMS = 1;
    static INLINE void split(Words words, Floats* parts) {
        if constexpr (BY_PAIRS<T>) {
            parts[0] = fp8_pairs((Shorts)words << 8), parts[1] = fp8_pairs((Shorts)words);
        } else {
            parts[0] = fp8_above(words << 24), parts[1] = fp8_above(words << 16);
            parts[2] = fp8_above(words << 8), parts[3] = fp8_above(words);
        }
    }
    static INLINE float read_query(const T* from, int64_t size, float* words) {
        for (int64_t d = 0; d < size; d += LANES) {
            Floats x = load(from + d, size - d) * HALF_UNIT<Fp8>;
            if constexpr (BY_PAIRS<T>) store_pairs(words, (Ints)((Words)x >> 16)), words += LANES / 2;
            else store(words + d, x);
        }
        return HALF_UNIT<Fp8>;
    }
};

// Sums of weighted values by pairs of positions: `store_weights` makes words of two weights each and returns what sums have to be
// multiplied by; `read` makes PARTS vectors of pairs of WIDTH values at two positions, of which `left` exist.
template <typename T, typename C>
struct Pairs {
    static constexpr bool EXIST = false;
};

// The order in which __builtin_shuffle interleaves pairs fastest: 4 of each 8 values to the first vector, 4 to the second.
INLINE void interleave(Shorts a, Shorts b, Floats* parts) {
    Shorts low, high;
    for (int i = 0; i < 2 * LANES; i++) {
        low[i] = i / 8 * 8 + i % 8 / 2 + i % 2 * 2 * LANES;
        high[i] = low[i] + 4;
    }
    parts[0] = (Floats)__builtin_shuffle(a, b, low);
    parts[1] = (Floats)__builtin_shuffle(a, b, high);
}

// Back to the order of the values.
INLINE void deinterleave(Floats* parts) {
    Ints low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i / 8 * 4 + i % 4 + i % 8 / 4 * LANES;
        high[i] = low[i] + LANES / 2;
    }
    Floats first = __builtin_shuffle(parts[0], parts[1], low), second = __builtin_shuffle(parts[0], parts[1], high);
    parts[0] = first, parts[1] = second;
}

// 2 * LANES codes with their signs.
template <typename C>
INLINE Shorts load_shorts(const C* from, int64_t left) {
    typedef int8_t Codes __attribute__((vector_size(2 * LANES)));
    Codes codes = {};
    std::memcpy(&codes, from, std::min<int64_t>(left, sizeof codes));
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16((__m256i)codes);
#else
    return __builtin_convertvector(codes, Shorts);
#endif
}

template <typename T>
struct Pairs<T, Int8> : OfShorts {
    static constexpr bool EXIST = true;
    static constexpr int WIDTH = 2 * LANES;
    static INLINE float store_weights(const float* weights, int count, float* words) {
        float most = largest_magnitude(weights, count), factor = most >= NEGLIGIBLE ? 32767 / most : 0;
        for (int j = 0; j < count; j += LANES) store_neighbours(words + j / 2, nearest(load(weights + j) * factor));
        return factor ? most / 32767 : most < NEGLIGIBLE ? 0 : std::numeric_limits<float>::quiet_NaN();
    }
    static INLINE void read(const Int8* a, const Int8* b, int64_t left, Floats* parts) {
        interleave(load_shorts(a, left), load_shorts(b, left), parts);
    }
};

// Weights are rounded to bfloat16, which is nothing beside the rounding of the values.
template <>
struct Pairs<BF16, Fp8> : OfPairs<BF16> {
    static constexpr bool EXIST = BY_PAIRS<BF16>;
    static constexpr int WIDTH = 2 * LANES;
    static INLINE float store_weights(const float* weights, int count, float* words) {
        for (int j = 0; j < count; j += LANES)
            store_neighbours(words + j / 2, (Ints)(round_words(load(weights + j)) >> 16));
        return HALF_UNIT<Fp8>;
    }
    static INLINE void read(const Fp8* a, const Fp8* b, int64_t left, Floats* parts) {
        interleave(load_shorts(a, left) << 8, load_shorts(b, left) << 8, parts);
        parts[0] = fp8_pairs((Shorts)parts[0]), parts[1] = fp8_pairs((Shorts)parts[1]);
    }
};

// The magnitude of LANES scaled values as codes.
template <typename C>
INLINE Words magnitudes(Words bits) {
    Floats x = (Floats)bits;
    if constexpr (std::is_same_v<C, Int8>) {
        const float whole = 8388608.0f;  // 2^23: adding it rounds to a whole number
        return (Words)(x + whole) - 0x4b000000u;
    } else {
        Words code = ((bits + 0x7ffff + ((bits >> 20) & 1)) >> 20) - (120 << 3);
        // Below the smallest normal one, 2^-6, there are that and zero.
        Words small = x > Floats{} + 0x1p-7f ? Words{} + 8 : Words{};
        return x < Floats{} + 0x1p-6f ? small : code;
    }
}

// Writes the codes of `size` values; returns their scale.
template <typename X, typename C>
INLINE float quantize(const X* x, C* codes, int64_t size) {
    float absmax = largest_magnitude(x, size);
    bool finite = absmax <= std::numeric_limits<float>::max();
    if (!finite || absmax < NEGLIGIBLE) {
        std::memset((void*)codes, 0, size);
        return finite ? 0 : std::numeric_limits<float>::quiet_NaN();
    }
    float factor = C::LARGEST / absmax;
    for (int64_t d = 0; d < size; d += LANES) {
        Words bits = (Words)(load(x + d, size - d) * factor), sign = bits & 0x80000000u;
        Words code = magnitudes<C>(bits & 0x7fffffffu);
        if constexpr (std::is_same_v<C, Int8>) code = sign ? -code : code;
        else code |= sign >> 24;
        Bytes bytes = __builtin_convertvector((Ints)code, Bytes);
        std::memcpy(codes + d, &bytes, std::min<int64_t>(LANES, size - d));
    }
    return absmax / C::LARGEST;
}

}  // namespace
