// What the kernels on AMX tiles share. All eight tiles are 16 rows of 64 bytes.
#pragma once

#include "simd.h"

namespace memos_engine {
namespace ME_LEVEL {

#if defined(__AMX_BF16__)
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr TileConfig kConfig;

// GCC's tile loads do not tell the compiler that they read memory.
ME_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

}  // namespace
#endif

}  // namespace ME_LEVEL
}  // namespace memos_engine
