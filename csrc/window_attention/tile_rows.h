// Rows of a head as tiles want them: units along dim, zeros beyond the last number and the last row; and transposed.
#pragma once

#include "window_attention/attention.h"
#include "window_attention/tile_gemm.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

using TileAttention = Attention<bfloat16>;

constexpr int64_t kTileNumbers = 2 * kTile;  // of bfloat16 in a row of a tile
constexpr int64_t kTileKeys = kTileNumbers;  // whose scores with a block of queries are computed at a time

constexpr float kLog2E = 1.44269504f;

inline int64_t tiles_of(int64_t units) { return (units + kTile - 1) / kTile; }

// Units between rows of at least `units`: an odd number of cache lines, so that a tile spreads over all cache sets.
inline int64_t odd_lines(int64_t units) { return (tiles_of(units) | 1) * kTile; }

// Sizes of the operands of one head's products.
struct TileSizes {
  int64_t steps, ld;            // tiles along dim as units; units between such rows
  int64_t columns;              // tiles along dim as numbers
  int64_t max_keys, max_pairs;  // keys of a whole number of tiles; units between rows along keys

  explicit TileSizes(const TileAttention& at)
      : steps(at.shape.padded / kTileNumbers),
        ld(odd_lines(steps * kTile)),
        columns(at.shape.vectors),
        max_keys(round_up(at.max_keys, kTileNumbers)),
        max_pairs(odd_lines(max_keys / 2)) {}
};

inline void clear_units(int32_t* units, int64_t count) {
  std::memset(units, 0, static_cast<size_t>(std::max<int64_t>(count, 0)) * sizeof(int32_t));
}

// All keys (or values) of a window as rows of `out`, up to a whole number of tiles; returns how many there are. `row`
// is room for one of them.
inline int64_t load_units(const TileAttention& at, const TileSizes& sizes, const Window& window, int64_t head,
                          const TensorView& x, const TensorView& context_x, const RowNorm<float>* norm, float* stats,
                          float* row, int32_t* out) {
  const int64_t units = sizes.steps * kTile;
  const int64_t count = at.each_key(window, head, x, context_x, [&](int64_t n, const bfloat16* from, int64_t stride) {
    int32_t* to = out + n * sizes.ld;
    if (norm != nullptr && norm->defined()) {
      load_row(from, stride, at.shape, row);
      norm->forward(row, stats + 2 * n);
      pack_along(Bf16Pairs{}, row, to, at.shape.padded);
    } else {
      store(to + units - kTile, vint{});
      copy_row(from, stride, reinterpret_cast<bfloat16*>(to), 1, at.shape.dim);
    }
  });
  clear_units(out + count * sizes.ld, (round_up(count, kTileNumbers) - count) * sizes.ld);
  return count;
}

// out[number][pair of rows] from rows of units along numbers; `rows` is a multiple of kTileNumbers.
inline void transpose_numbers(const int32_t* in, int64_t ldi, int64_t rows, int64_t units, int32_t* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r += kTileNumbers) {
    for (int64_t u = 0; u < units; u += kTile) {
      vint halves[2][kTile];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < kTile; ++i) halves[half][i] = load(in + (r + half * kTile + i) * ldi + u);
        transpose(halves[half]);
      }
      for (int i = 0; i < kTile; ++i) {
        int32_t* to = out + 2 * (u + i) * ldo + r / 2;
        store(to, even_numbers(halves[0][i], halves[1][i]));
        store(to + ldo, odd_numbers(halves[0][i], halves[1][i]));
      }
    }
  }
}

}  // namespace walt::WALT_ISA::window_attention
#endif
