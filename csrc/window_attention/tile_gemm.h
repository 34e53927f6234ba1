// gemm for pairs of bfloat16 on tiles: 16 rows by at most four tiles of columns at a time, whose sums stay in registers
// while the axis of the sum is walked, 16 units a step.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/amx.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

constexpr int kSumTiles = 4, kTileA = 4, kTileB = 5;  // tiles 0 to 3 hold sums; 5, 6 and 7 take turns for b

// c[rows][16 * columns] += a b over `steps` steps of `step` units. Steps of a lie `step_a` bytes apart, rows
// `stride_a`.
template <int columns>
void tile_columns(int64_t steps, int64_t step, const char* a, int64_t step_a, int64_t stride_a, const int32_t* b,
                  int64_t ldb, float* c, int64_t ldc) {
  const auto sums = [&](auto&& each) {
    each(std::integral_constant<int, 0>{});
    if constexpr (columns > 1) each(std::integral_constant<int, 1>{});
    if constexpr (columns > 2) each(std::integral_constant<int, 2>{});
    if constexpr (columns > 3) each(std::integral_constant<int, 3>{});
  };
  sums([&](auto i) { load_tile<i()>(c + i() * kTile, 4 * ldc); });
  for (int64_t s = 0; s < steps; ++s, a += step_a, b += step * ldb) {
    load_tile<kTileA>(a, stride_a);
    sums([&](auto i) {
      load_tile<kTileB + i() % 3>(b + i() * kTile, 4 * ldb);
      multiply_tiles<i(), kTileA, kTileB + i() % 3>();
    });
  }
  sums([&](auto i) { store_tile<i()>(c + i() * kTile, 4 * ldc); });
}

// out[row][unit] = a[row + unit * lda] for 16 rows and `units` <= 16 units: a tile of a that is read with unit stride
// along its rows.
inline void pack_tile(const int32_t* a, int64_t lda, int64_t units, int32_t* out) {
  vint block[kTile] = {};
  for (int64_t i = 0; i < units; ++i) block[i] = load(a + i * lda);
  transpose(block);
  for (int64_t i = 0; i < kTile; ++i) store(out + i * kTile, block[i]);
}

// As gemm: C[m][vectors * 16] += A B.
template <bool kUnitRow>
void tile_gemm(int64_t m, int64_t vectors, int64_t k, const int32_t* a, int64_t lda, const int32_t* b, int64_t ldb,
               float* c, int64_t ldc) {
  constexpr int64_t kSteps = kUnitRow ? 16 : INT64_MAX, kTileUnits = kTile * kTile;
  alignas(64) int32_t packed[kUnitRow ? kSteps * kTileUnits : 1];
  int64_t rows = 0, units = 0;  // that tiles are configured for
  const auto configure = [&](int64_t new_rows, int64_t new_units) {
    if (rows == new_rows && units == new_units) return;
    rows = new_rows;
    units = new_units;
    TileShapes shapes;
    for (int i = 0; i < kSumTiles; ++i) shapes.set(i, rows, kTile);
    shapes.set(kTileA, rows, units);
    for (int i = kTileB; i < kTileB + 3; ++i) shapes.set(i, units, kTile);
    configure_tiles(shapes);
  };
  for (int64_t begin = 0; begin < k;) {
    const int64_t step = std::min(k - begin, kTile), steps = std::min((k - begin) / step, kSteps);
    for (int64_t i = 0; i < m; i += kTile) {
      configure(std::min(m - i, kTile), step);
      const int32_t* from = a + i * lda + begin;
      int64_t step_a = 4 * step, stride_a = 4 * lda;
      if constexpr (kUnitRow) {
        for (int64_t s = 0; s < steps; ++s) {
          pack_tile(a + i + (begin + s * step) * lda, lda, step, packed + s * kTileUnits);
        }
        from = packed;
        step_a = 4 * kTileUnits;
        stride_a = 4 * kTile;
      }
      for (int64_t v = 0; v < vectors; v += kSumTiles) {
        const auto multiply = [&](auto columns) {
          tile_columns<columns()>(steps, step, reinterpret_cast<const char*>(from), step_a, stride_a,
                                  b + begin * ldb + v * kTile, ldb, c + i * ldc + v * kTile, ldc);
        };
        switch (vectors - v) {
          case 1: multiply(std::integral_constant<int, 1>{}); break;
          case 2: multiply(std::integral_constant<int, 2>{}); break;
          case 3: multiply(std::integral_constant<int, 3>{}); break;
          default: multiply(std::integral_constant<int, 4>{});
        }
      }
    }
    begin += steps * step;
  }
  release_tiles();
}

}  // namespace walt::WALT_ISA::window_attention
#endif
