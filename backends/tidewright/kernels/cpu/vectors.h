// Vectors of floats, and how they are read from and written to float32 and bfloat16 memory. They are GCC's portable
// vectors: where the processor has none of that width, the compiler splits them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

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
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

INLINE void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to nearest, ties to even, as torch does.
INLINE void store(BF16* to, Floats x) {
    Words bits = (Words)x;
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = x == x ? bits : Words{} + 0x7fc0;
    Halves halves = __builtin_convertvector(bits, Halves);
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

INLINE float sum(Floats x) {
    float part[LANES];
    store(part, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

INLINE float largest(Floats x) {
    float part[LANES];
    store(part, x);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

// e^x to an ulp or two; 0 below -87.7, finite above 88. x = n ln 2 + r, then the Taylor series of e^r, |r| < 0.35.
INLINE Floats exponential(Floats x) {
    const Floats zero = {};
    x = x < -88.0f ? zero - 88.0f : x;
    x = x > 88.0f ? zero + 88.0f : x;
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Floats n = (x * 1.44269504f + shift) - shift;
    Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats y = zero + 1.0f / 5040;
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float coefficient : coefficients) y = y * r + coefficient;
    return y * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

}  // namespace
