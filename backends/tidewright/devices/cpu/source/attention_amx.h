// The products of attention.cpp in bfloat16 by the matrix unit AMX (Intel's Software Developer's Manual, "TILE" chapter):
// a tile register holds 16 rows of 64 bytes; sums are kept in float32.
#pragma once

#include <vector>

#include "attention_tiles.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

template <typename T>
struct Amx {
    static constexpr bool EXISTS = false;
};

#ifndef __AMX_BF16__

struct TileRegisters {};

#else

// While it lives, the calling thread's tile registers have full size. Then it gives them back as they were set up: others
// (oneDNN) may rely on that.
class TileRegisters {
    struct alignas(64) Setup {
        uint8_t palette = 0, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } before;

public:
    TileRegisters() {
        _tile_storeconfig(&before);
        Setup setup;
        setup.palette = 1;
        for (int i = 0; i < 8; i++) setup.bytes[i] = 64, setup.rows[i] = 16;
        _tile_loadconfig(&setup);
    }
    ~TileRegisters() { _tile_loadconfig(&before); }
};

// To the compiler, a tile's load and store touch no memory: before and after them it must finish its own.
INLINE void finish_memory() { __asm__ volatile("" ::: "memory"); }

// One unit's operands. Rows are padded to whole tiles; what is padding stays zero.
template <>
struct Amx<BF16> {
    static constexpr bool EXISTS = true;
    static constexpr int TILE = 16, PAIR = 2 * TILE;  // rows; bfloat16s in a row

    // Linux gives the registers only to who asks.
    static bool permitted() {
        constexpr int REQUEST = 0x1023, TILE_DATA = 18;
        static const bool given = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
        return given;
    }

    int64_t words;  // of a row of queries, keys or values
    std::vector<Words> queries, keys, values, weights, remainders;

    Amx(int64_t rows, int64_t width)
        : words(width / 2), queries(rows * words / TILE), keys(KEYS * words / TILE), values(keys.size()),
          weights(rows * KEYS / PAIR), remainders(weights.size()) {}

    void set_query(int64_t row, const BF16* from, int64_t size) {
        for (int64_t d = 0; d < size; d += PAIR) queries[(row * words + d / 2) / TILE] = read_words(from + d, size - d);
    }

    // Tiles as the unit wants its second operand: a row holds two values each of 16 columns. For the scores, columns are keys
    // and rows pairs of neighbouring values; for the sums, rows are keys i and i + 16 of 32, and columns the even values of
    // 32, or the odd ones, as in Wide's parts.
    void read(
        const BF16* k_cache, const BF16* v_cache, const int64_t* places, const int64_t* next, int count, int64_t size) {
        for (int j = 0; j < count; j += TILE) {
            for (int i = j; i < j + TILE; i++) prefetch(k_cache + next[i], size);
            for (int64_t d = 0; d < size; d += PAIR)
                read_transposed(k_cache + d, places + j, size - d, (Floats*)&keys[(j * words + d / 2 * TILE) / TILE]);
        }
        for (int j = 0; j < KEYS; j += PAIR)
            for (int i = j; i < j + TILE; i++) {
                prefetch(v_cache + next[i], size);
                prefetch(v_cache + next[i + TILE], size);
                for (int64_t d = 0; d < size; d += PAIR) {
                    Words low = {}, high = {};
                    if (i < count) low = read_words(v_cache + places[i] + d, size - d);
                    if (i + TILE < count) high = read_words(v_cache + places[i + TILE] + d, size - d);
                    Words* tile = &values[d / PAIR * KEYS + j / PAIR * TILE + i - j];
                    tile[0] = (low & 0xffffu) | (high << 16);
                    tile[KEYS / 2] = (low >> 16) | (high & 0xffff0000u);
                }
            }
    }

    // scores[rows, KEYS] = queries keys
    void score(int64_t rows, float* scores) const {
        finish_memory();
        for (int64_t row = 0; row < rows; row += TILE) {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            for (int64_t d = 0; d < words; d += TILE) {
                const Words* tile = &keys[d];
                int64_t apart = words;  // vectors from the tile of 16 keys to that of the next
                _tile_loadd(4, &queries[(row * words + d) / TILE], words * 4);
                _tile_loadd(5, tile, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, tile + apart, 64);
                _tile_dpbf16ps(1, 4, 6);
                _tile_loadd(5, tile + 2 * apart, 64);
                _tile_dpbf16ps(2, 4, 5);
                _tile_loadd(6, tile + 3 * apart, 64);
                _tile_dpbf16ps(3, 4, 6);
            }
            float* to = scores + row * KEYS;
            _tile_stored(0, to, KEYS * 4); _tile_stored(1, to + TILE, KEYS * 4);
            _tile_stored(2, to + 2 * TILE, KEYS * 4); _tile_stored(3, to + 3 * TILE, KEYS * 4);
        }
        finish_memory();
    }

    // A weight becomes the sum of two bfloat16s, or its rounding would be seen in the result. Both are cut off, not rounded.
    void set_weights(int64_t row, const float* from) {
        constexpr uint32_t UPPER = 0xffff0000u;
        for (int j = 0; j < KEYS; j += PAIR) {
            Words low = (Words)load(from + j), high = (Words)load(from + j + TILE);
            weights[(row * KEYS + j) / PAIR] = (low >> 16) | (high & UPPER);
            low = (Words)((Floats)low - (Floats)(low & UPPER)), high = (Words)((Floats)high - (Floats)(high & UPPER));
            remainders[(row * KEYS + j) / PAIR] = (low >> 16) | (high & UPPER);
        }
    }

    // totals[rows, width] += weights values
    void add_values(int64_t rows, float* totals, int64_t width) const {
        finish_memory();
        for (int64_t row = 0; row < rows; row += TILE)
            for (int64_t d = 0; d < width; d += PAIR) {
                float* to = totals + row * width + d;
                _tile_loadd(0, to, width * 4); _tile_loadd(1, to + TILE, width * 4);
                for (int j = 0; j < KEYS; j += PAIR) {
                    const Words* tile = &values[d / PAIR * KEYS + j / PAIR * TILE];
                    _tile_loadd(4, &weights[(row * KEYS + j) / PAIR], KEYS * 2);
                    _tile_loadd(5, &remainders[(row * KEYS + j) / PAIR], KEYS * 2);
                    _tile_loadd(6, tile, 64); _tile_loadd(7, tile + KEYS / 2, 64);
                    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(0, 5, 6); _tile_dpbf16ps(1, 5, 7);
                }
                _tile_stored(0, to, width * 4); _tile_stored(1, to + TILE, width * 4);
            }
        finish_memory();
    }
};

#endif

}  // namespace
