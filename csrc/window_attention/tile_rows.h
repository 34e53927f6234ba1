// Rows of a head as tiles want them: units along dim, zeros beyond the last number and the last row; and transposed.
#pragma once

#include "window_attention/attention.h"
#include "window_attention/tile_gemm.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

using TileAttention = Attention<bfloat16>;

constexpr int64_t kTileNumbers = 2 * kTile;  // of bfloat16 in a row of a tile
constexpr int64_t kTileKeys = kTileNumbers, kTileQueries = 2 * kTile;  // whose scores are computed at a time

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
        for (int half = 0; half < 2; ++half) {
          store_flushed(reinterpret_cast<bfloat16*>(to) + half * kTile, (vfloat)(halves[half][i] << 16));
          store_flushed(reinterpret_cast<bfloat16*>(to + ldo) + half * kTile, (vfloat)(halves[half][i] & -65536));
        }
      }
    }
  }
}

// The bias of the queries of a block with any key, a vector of them at a time: of runs of queries that are neighbours in
// the table, each of which is read whole and seen from its first lane on.
class TileBias {
 public:
  // Without a table all is zero.
  void load_window(const TileAttention& at, const Window& window, int64_t head, int64_t* positions) {
    keys_ = 0;
    if (!at.p.bias_table.defined()) return;
    table_ = at.table_of(head);
    positions_ = positions;
    keys_ = window.tokens();
    size_ = table_size(at);
    center_ = kTile + at.bias.center;
    window.each_token(0, keys_, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      positions[n] = at.bias.position(frame, row, column);
    });
  }

  void load_queries(const TileAttention& at, const Window& window, int64_t begin, int64_t end) {
    if (keys_ == 0) return;
    for (Runs& runs : runs_) runs.count = 0;
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const int64_t lane = n % kTile;
      Runs& runs = runs_[n / kTile];
      if (lane != 0 && column != window.columns.begin) return;
      runs.position[runs.count] = at.bias.position(frame, row, column) - lane;
      runs.lane[runs.count++] = static_cast<int32_t>(lane);
    });
  }

  // The gradient of the table is summed up in several, in turns: consecutive keys add to places that overlap, and a
  // processor waits until it has stored what it is to load in part. Each has a vector before and behind.
  static constexpr int64_t kTables = 8;
  static int64_t table_size(const TileAttention& at) { return round_up(at.bias.size, kTile) + 2 * kTile; }

  void add_gradient(int64_t n, int v, vfloat grad, float* tables) const {
    if (n >= keys_) return;
    const Runs& runs = runs_[v];
    float* to = tables + n % kTables * size_ + center_ - positions_[n];
    for (int i = 0; i < runs.count; ++i) {
      const int32_t end = i + 1 < runs.count ? runs.lane[i + 1] : kTile;
      float* place = to + runs.position[i];
      store(place, load(place) + ((kLane >= runs.lane[i]) & (kLane < end) ? grad : vfloat{}));
    }
  }

  static void sum_tables(const TileAttention& at, const float* tables, float* sum) {
    const int64_t size = table_size(at);
    for (int64_t i = kTile; i < size - kTile; i += kTile) {
      vfloat total = load(sum + i - kTile);
      for (int64_t table = 0; table < kTables; ++table) total += load(tables + table * size + i);
      store(sum + i - kTile, total);
    }
  }

  // Of key n and the queries of vector v; zero for the context.
  vfloat operator()(int64_t n, int v) const {
    if (n >= keys_ || runs_[v].count == 0) return vfloat{};
    const Runs& runs = runs_[v];
    const float* from = table_ - positions_[n];
    vfloat value = load(from + runs.position[0]);
    for (int i = 1; i < runs.count; ++i) value = kLane >= runs.lane[i] ? load(from + runs.position[i]) : value;
    return value;
  }

 private:
  static constexpr vint kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  struct Runs {
    int count;
    int32_t lane[kTile];
    int64_t position[kTile];
  };
  const float* table_;
  const int64_t* positions_;
  int64_t keys_, size_, center_;
  Runs runs_[kBlock / kTile];
};

}  // namespace walt::WALT_ISA::window_attention
#endif
