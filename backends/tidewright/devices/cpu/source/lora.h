// What LoRA adapters add to a layer's products. As devices/cpu/lora.py lays it out.
#pragma once
#include <cstdint>

// Of one projection of a layer: scale * (x a^T) b. a and b lie as lora_layout
// says. Rank 0: nothing is added.
struct LoraUpdate {
    int64_t rank, first, features;  // first: of the projection's outputs among the layer's
    const void *a, *b;
    float scale;
};

struct Lora {
    int64_t depth, features, parts, most_rank, most_features;
    const LoraUpdate* updates;  // `parts` of each slot
};

struct LoraTile {
    int32_t slot, first, count;  // first: in `rows`
};

// Of a step: which rows have an adapter, those of a slot side by side.
struct LoraRows {
    const int32_t* rows;
    const LoraTile* tiles;
    int64_t num_rows, num_tiles;
};
