// Small matrix products on tiles: four tiles of sums at a time, which stay in registers while the axis of the sum is
// walked. All sizes are whole tiles; what scratch holds beyond the numbers of a problem is zero.
#pragma once

#include <type_traits>

#include "common/amx.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

// Tiles 0 to 3 hold sums, 4 and 5 rows of a, 6 and 7 columns of b.
template <int rows, int columns, bool kAdd>
void multiply_block(int64_t steps, const int32_t* a, int64_t lda, const int32_t* b, int64_t ldb, float* c,
                    int64_t ldc) {
  const auto start = [&](auto tile, float* from) {
    if constexpr (kAdd) {
      load_tile<tile()>(from, 4 * ldc);
    } else {
      clear_tile<tile()>();
    }
  };
  using Zero = std::integral_constant<int, 0>;
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Three = std::integral_constant<int, 3>;
  start(Zero{}, c);
  if constexpr (columns == 2) start(One{}, c + kTile);
  if constexpr (rows == 2) start(Two{}, c + kTile * ldc);
  if constexpr (rows == 2 && columns == 2) start(Three{}, c + kTile * ldc + kTile);
  for (int64_t s = 0; s < steps; ++s, a += kTile, b += kTile * ldb) {
    load_tile<4>(a, 4 * lda);
    load_tile<6>(b, 4 * ldb);
    multiply_tiles<0, 4, 6>();
    if constexpr (columns == 2) {
      load_tile<7>(b + kTile, 4 * ldb);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (rows == 2) {
      load_tile<5>(a + kTile * lda, 4 * lda);
      multiply_tiles<2, 5, 6>();
      if constexpr (columns == 2) multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, 4 * ldc);
  if constexpr (columns == 2) store_tile<1>(c + kTile, 4 * ldc);
  if constexpr (rows == 2) store_tile<2>(c + kTile * ldc, 4 * ldc);
  if constexpr (rows == 2 && columns == 2) store_tile<3>(c + kTile * ldc + kTile, 4 * ldc);
}

// C = A B, or C += A B, for m x k tiles of A, whose rows are units along the axis of the sum, and k x n tiles of B,
// whose rows are units of numbers of two rows.
template <bool kAdd>
void tile_gemm(int64_t m, int64_t n, int64_t k, const int32_t* a, int64_t lda, const int32_t* b, int64_t ldb, float* c,
               int64_t ldc) {
  for (int64_t i = 0; i < m; i += 2, a += 2 * kTile * lda, c += 2 * kTile * ldc) {
    for (int64_t j = 0; j < n; j += 2) {
      const bool rows = m - i > 1, columns = n - j > 1;
      const auto block = rows      ? columns ? multiply_block<2, 2, kAdd> : multiply_block<2, 1, kAdd>
                         : columns ? multiply_block<1, 2, kAdd>
                                   : multiply_block<1, 1, kAdd>;
      block(k, a, lda, b + j * kTile, ldb, c + j * kTile, ldc);
    }
  }
}

}  // namespace walt::WALT_ISA::window_attention
#endif
