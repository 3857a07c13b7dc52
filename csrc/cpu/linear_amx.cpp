// x @ weight^T for a few dozen rows on AMX tiles, for bfloat16. Compiled at every level, empty except at
// `amx`.
//
// 16 outputs of 32 inputs are a tile (A) as they lie, and x^T is packed into pairs of inputs (B) beforehand.
// So y^T comes out, and is transposed when it is stored.
#include "amx.h"
#include "linear_tiles.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AMX_BF16__)
namespace {

// P (1 or 2) tiles of tokens against B (1 or 2) tiles of outputs. Tiles 0-3 are sums, 4-5 weights, 6-7 x.
template <int B, int P>
ME_INLINE void block(const Linear& a, const uint32_t* packed, int64_t tile, int64_t output) {
    alignas(64) float y[4][16 * 16];
    const uint16_t* w = (const uint16_t*)a.weight + output * a.weight_row;
    const int64_t stride = a.weight_row * 2, x_tile = a.inputs / 2 * kTokens;
    const uint32_t* x = packed + tile * x_tile;
    finish_stores();
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (B > 1) _tile_zero(2);
    if constexpr (B > 1 && P > 1) _tile_zero(3);
    for (int64_t i = 0; i < a.inputs; i += kInputs) {
        if (tile == 0) {  // the next outputs are on their way while these are multiplied
            const char* next = (const char*)(w + i) + B * kOutputs * stride;
            for (int row = 0; row < B * kOutputs; ++row) __builtin_prefetch(next + row * stride);
        }
        _tile_loadd(4, w + i, stride);
        if constexpr (B > 1) _tile_loadd(5, w + i + kOutputs * a.weight_row, stride);
        _tile_loadd(6, x + i / 2 * kTokens, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (B > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (P > 1) {
            _tile_loadd(7, x + x_tile + i / 2 * kTokens, 64);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (B > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y[0], 64);
    if constexpr (P > 1) _tile_stored(1, y[1], 64);
    if constexpr (B > 1) _tile_stored(2, y[2], 64);
    if constexpr (B > 1 && P > 1) _tile_stored(3, y[3], 64);
    for (int b = 0; b < B; ++b)
        for (int p = 0; p < P; ++p)
            store_outputs(a, y[2 * b + p], (tile + p) * kTokens, output + b * kOutputs);
}

template <int B>
ME_INLINE void outputs(const Linear& a, const uint32_t* packed, int64_t output) {
    int64_t tile = 0;
    for (; tile + 2 <= token_tiles(a); tile += 2) block<B, 2>(a, packed, tile, output);
    if (tile < token_tiles(a)) block<B, 1>(a, packed, tile, output);
}

}  // namespace

bool linear_tiles_fits(const Linear& a) { return a.tokens > 1 && whole_tiles(a); }

void linear_tiles(const Linear& a, const void* packed, int64_t output, int64_t output_end) {
    _tile_loadconfig(&kConfig);
    const uint32_t* x = (const uint32_t*)packed;
    for (; output + 2 * kOutputs <= output_end; output += 2 * kOutputs) outputs<2>(a, x, output);
    if (output < output_end) outputs<1>(a, x, output);
    _tile_release();
}

#endif

}  // namespace ME_LEVEL
}  // namespace memos_engine
