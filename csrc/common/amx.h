// Products of bfloat16 matrices in the tile registers of AMX. A tile is up to 16 rows of 16 units of 32 bits: sums, or
// pairs of bfloat16 that are consecutive along the axis of the sum. WALT_EMULATE_AMX computes the same in plain code,
// so that what is built of tiles can be tested where the processor has none.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"

#if defined(WALT_HAS_AMX) && defined(WALT_HAS_BF16_DOT)
#define WALT_HAS_TILES 1

namespace walt {
bool tiles_in_use();  // module.cpp
}

namespace walt::WALT_ISA {

constexpr int64_t kTile = 16;  // rows of a tile, and units of a row

constexpr int kTiles = 8;

// The shapes of all tiles, in the layout of ldtilecfg.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64, "as the processor reads it");

#if defined(WALT_EMULATE_AMX)
struct EmulatedTiles {
  TileShapes shapes;
  int32_t units[kTiles][kTile][kTile];
};
inline thread_local EmulatedTiles tiles;

inline void configure_tiles(const TileShapes& shapes) {
  tiles.shapes = shapes;
  std::memset(tiles.units, 0, sizeof tiles.units);
}
inline void release_tiles() { configure_tiles({}); }

template <int tile>
inline void clear_tile() {
  std::memset(tiles.units[tile], 0, sizeof tiles.units[tile]);
}
template <int tile>
inline void load_tile(const void* from, int64_t stride) {  // in bytes
  for (int64_t row = 0; row < tiles.shapes.rows[tile]; ++row) {
    std::memcpy(tiles.units[tile][row], static_cast<const char*>(from) + row * stride, tiles.shapes.bytes[tile]);
  }
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  for (int64_t row = 0; row < tiles.shapes.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.units[tile][row], tiles.shapes.bytes[tile]);
  }
}

// sum[i][j] += a[i][k] . b[k][j], k over the units of a row of a.
template <int sum, int a, int b>
inline void multiply_tiles() {
  const int64_t depth = tiles.shapes.bytes[a] / 4;
  for (int64_t i = 0; i < tiles.shapes.rows[sum]; ++i) {
    vfloat row = load(reinterpret_cast<const float*>(tiles.units[sum][i]));
    for (int64_t k = 0; k < depth; ++k) row = dot_bf16(row, tiles.units[a][i][k] - vint{}, load(tiles.units[b][k]));
    store(reinterpret_cast<float*>(tiles.units[sum][i]), row);
  }
}
#else
// Not the compiler's intrinsics: before GCC 14 these do not tell it that they read and write memory.
inline void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes) : "memory"); }
inline void release_tiles() { asm volatile("tilerelease" : : : "memory"); }

template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
inline void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
inline void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
}
template <int sum, int a, int b>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}
#endif

// While one lives, this thread's tiles are there, all of full size.
class Tiles {
 public:
  Tiles() {
    TileShapes shapes;
    for (int tile = 0; tile < kTiles; ++tile) {
      shapes.rows[tile] = kTile;
      shapes.bytes[tile] = 4 * kTile;
    }
    configure_tiles(shapes);
  }
  ~Tiles() { release_tiles(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// The first numbers of the units of a, then those of b; and the second ones.
typedef uint16_t vnumbers __attribute__((vector_size(kVectorBytes)));
inline vint even_numbers(vint a, vint b) {
  return (vint)__builtin_shufflevector((vnumbers)a, (vnumbers)b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28,
                                       30, 32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62);
}
inline vint odd_numbers(vint a, vint b) {
  return (vint)__builtin_shufflevector((vnumbers)a, (vnumbers)b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                                       31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
}

inline bool any(vint lanes) {
  int32_t seen = 0;
  for (int i = 0; i < kLanes<float>; ++i) seen |= lanes[i];
  return seen != 0;
}

// 2^x for numbers that become bfloat16: off by less than 9e-5, a twentieth of what that rounding adds. 2^0 is
// 1 to the bit.
inline vfloat exp2_coarse(vfloat x) {
#if defined(__AVX512F__)
  const vfloat r = (vfloat)_mm512_reduce_ps((__m512)x, 9);  // x - floor(x)
  const vfloat p = ((0.07706705f * r + 0.22764498f) * r + 0.69511679f) * r + 1.0f;
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)x);  // p * 2^floor(x)
#else
  return exp(x * 0.69314718f);
#endif
}

}  // namespace walt::WALT_ISA
#endif
