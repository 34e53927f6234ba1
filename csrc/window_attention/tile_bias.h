// The bias on tiles of scores: that of a vector of queries with a key is read out of the table when it is added.
#pragma once

#include "window_attention/tile_rows.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

// A vector of queries consists of runs: neighbours in a row of the window, and so in the table. Each run is read as a
// whole vector, of which the lanes from its first one on count.
struct TileRuns {
  int count;
  int32_t lane[kTile];      // its first one, or kTile
  int64_t position[kTile];  // of lane 0, had the run begun there

  // f(run, its first lane, the first lane of the next run)
  template <class F>
  void each(F&& f) const {
    for (int i = 0; i < count; ++i) f(i, lane[i], i + 1 < count ? lane[i + 1] : static_cast<int32_t>(kTile));
  }
};

constexpr vint kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The queries of a block, and the keys of a window.
class TileBias {
 public:
  static constexpr int kManyRuns = 3;

  TileBias(const TileAttention& at, const Window& window, int64_t head, int64_t* positions)
      : keys_(at.p.bias_table.defined() ? window.tokens() : 0),
        size_(table_size(at)),
        center_(kTile + at.bias.center),
        table_(keys_ > 0 ? at.table_of(head) : nullptr),
        positions_(positions) {
    window.each_token(0, keys_, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      positions[n] = at.bias.position(frame, row, column);
    });
  }

  void load_queries(const TileAttention& at, const Window& window, int64_t begin, int64_t end) {
    if (keys_ == 0) return;
    for (TileRuns& runs : runs_) runs.count = 0;
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const int64_t lane = n % kTile;
      TileRuns& runs = runs_[n / kTile];
      if (lane != 0 && column != window.columns.begin) return;
      runs.position[runs.count] = at.bias.position(frame, row, column) - lane;
      runs.lane[runs.count++] = static_cast<int32_t>(lane);
    });
    most_ = 1;
    for (TileRuns& runs : runs_) {
      if (runs.count == 0) runs.position[0] = runs_[0].position[0];  // beyond the last query: anything finite
      if (runs.count <= 1) runs.position[1] = runs.position[0];
      if (runs.count <= 1) runs.lane[1] = kTile;
      most_ = std::max(most_, runs.count);
    }
  }

  // f(a constant: of how many runs the vectors are at most; 0 without a table, kManyRuns for more than 2).
  template <class F>
  void with_runs(F&& f) const {
    switch (keys_ == 0 ? 0 : std::min(most_, kManyRuns)) {
      case 0: return f(std::integral_constant<int, 0>{});
      case 1: return f(std::integral_constant<int, 1>{});
      case 2: return f(std::integral_constant<int, 2>{});
      default: f(std::integral_constant<int, kManyRuns>{});
    }
  }

  // What is added to the scores of vector v with key n: a function of n.
  template <int kRuns>
  auto of(int v) const {
    if constexpr (kRuns == 0) {
      return [](int64_t) { return vfloat{}; };
    } else {
      const TileRuns& runs = runs_[v];
      const float *first = table_ + runs.position[0], *second = table_ + runs.position[1];
      const vint in_second = kLaneNumbers >= runs.lane[1];
      return [=, &runs, table = table_, positions = positions_, keys = keys_](int64_t n) {
        if (n >= keys) return vfloat{};  // the context has none
        vfloat value = load(first - positions[n]);
        if constexpr (kRuns == 2) value = in_second ? load(second - positions[n]) : value;
        for (int i = 1; kRuns == kManyRuns && i < runs.count; ++i) {
          value = kLaneNumbers >= runs.lane[i] ? load(table + runs.position[i] - positions[n]) : value;
        }
        return value;
      };
    }
  }

  // The gradient of the table is summed up in several, in turns: runs and keys that follow one another add to places
  // that overlap, and a processor waits until it has stored what it is to load in part. Each has a vector before and
  // behind.
  static constexpr int64_t kTables = 16;
  static int64_t table_size(const TileAttention& at) { return round_up(at.bias.size, kTile) + 2 * kTile; }

  void add_gradient(int64_t n, int v, vfloat grad, float* tables) const {
    if (n >= keys_) return;
    float* to = tables + n % (kTables / 2) * 2 * size_ + center_ - positions_[n];
    runs_[v].each([&](int i, int32_t begin, int32_t end) {
      float* place = to + i % 2 * size_ + runs_[v].position[i];
      store(place, load(place) + ((kLaneNumbers >= begin) & (kLaneNumbers < end) ? grad : vfloat{}));
    });
  }

  static void sum_tables(const TileAttention& at, const float* tables, float* sum) {
    const int64_t size = table_size(at);
    for (int64_t i = kTile; i < size - kTile; i += kTile) {
      vfloat total = load(sum + i - kTile);
      for (int64_t table = 0; table < kTables; ++table) total += load(tables + table * size + i);
      store(sum + i - kTile, total);
    }
  }

 private:
  int64_t keys_, size_, center_;
  const float* table_;
  const int64_t* positions_;
  int most_ = 1;
  TileRuns runs_[kBlock / kTile];
};

}  // namespace walt::WALT_ISA::window_attention
#endif
