// The forward pass of bfloat16 on tiles. Queries lie across in every product: scores and weights are [keys][queries], so
// that a weight is made where the next product reads it, and out = values^T weights is turned when it is stored.
#pragma once

#include "window_attention/tile_rows.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

// One thread's working memory for one head of one window.
struct TileForwardScratch {
  TileSizes sizes;
  float *stats, *queries, *scores, *out, *rows, *lse, *sum;
  int64_t* positions;
  int32_t *keys, *values, *values_across, *query_units, *query_columns, *weights;

  TileForwardScratch(const TileAttention& at, Arena& arena) : sizes(at) {
    stats = arena.take<float>(2 * std::max(sizes.max_keys, kTileQueries));
    for (float** part : {&queries, &rows}) *part = arena.take<float>(kTileQueries * at.shape.ld);
    scores = arena.take<float>(kTileKeys * kTileQueries);
    out = arena.take<float>(sizes.columns * kTile * kTileQueries);
    for (float** part : {&lse, &sum}) *part = arena.take<float>(kTileQueries);
    positions = arena.take<int64_t>(sizes.max_keys);
    for (int32_t** part : {&keys, &values}) *part = arena.take<int32_t>(sizes.max_keys * sizes.ld);
    values_across = arena.take<int32_t>(sizes.steps * kTileNumbers * sizes.max_pairs);
    query_units = arena.take<int32_t>(kTileQueries * at.shape.ld);
    query_columns = arena.take<int32_t>(sizes.steps * kTile * kTileQueries);
    weights = arena.take<int32_t>(sizes.max_keys / 2 * kTileQueries);
  }
};

// Weights of a block of queries: exp(score - reference) in units of two keys; also their sums, and lse.
//
// The scores of few keys at a time, which never leave the first cache. So the largest is not known when the first weight
// is made; but any reference will do that lets no weight overflow, and none that counts vanish. It is the largest score
// of the first keys, unless a later one is far above it: then all is done again.
template <int vectors>
void softmax(int64_t keys, const TileBias& bias, const TileForwardScratch& s) {
  constexpr float kFar = 40, kLog2E = 1.44269504f;
  vfloat reference[vectors], largest[vectors], sum[vectors];
  bool again = false;
  do {
    for (int64_t begin = 0; begin < keys; begin += kTileKeys) {
      const int64_t end = std::min(begin + kTileKeys, keys);
      tile_gemm<false>(2, vectors, s.sizes.steps, s.keys + begin * s.sizes.ld, s.sizes.ld, s.query_columns,
                       kTileQueries, s.scores, kTileQueries);
      const auto score = [&](int64_t n, int v) {
        return load(s.scores + (n - begin) * kTileQueries + v * kTile) + bias(n, v);
      };
      for (int v = 0; v < vectors && begin == 0; ++v) {
        if (!again) largest[v] = score(0, v);
        for (int64_t n = 1; n < end && !again; ++n) largest[v] = maximum(largest[v], score(n, v));
        reference[v] = largest[v];
        sum[v] = vfloat{};
      }
      for (int64_t n = begin; n < end; n += 2) {
        for (int v = 0; v < vectors; ++v) {
          const auto weight = [&](int64_t key) {
            const vfloat x = score(key, v);
            largest[v] = maximum(largest[v], x);
            return exp2_coarse((x - reference[v]) * kLog2E);
          };
          const vfloat even = weight(n), odd = n + 1 < end ? weight(n + 1) : vfloat{};
          sum[v] += even + odd;
          store(s.weights + n / 2 * kTileQueries + v * kTile, pair_bf16(even, odd));
        }
      }
    }
    vint far{};
    for (int v = 0; v < vectors; ++v) far |= largest[v] - reference[v] > kFar;
    again = any(far);
  } while (again);
  for (int v = 0; v < vectors; ++v) {
    store(s.lse + v * kTile, reference[v]);
    store(s.sum + v * kTile, sum[v]);
  }
  for (int64_t i = 0; i < vectors * kTile; ++i) s.lse[i] += std::log(s.sum[i]);
}

inline void attend(const TileAttention& at, const Window& window, int64_t head, std::vector<Run>&,
                   const TileForwardScratch& s) {
  const Tiles tiles;
  const auto& p = at.p;
  const int64_t tokens = window.tokens(), units = s.sizes.steps * kTile;
  const int64_t keys =
      load_units(at, s.sizes, window, head, p.k, p.context_k, &at.k_norm, s.stats, s.queries, s.keys);
  load_units(at, s.sizes, window, head, p.v, p.context_v, nullptr, nullptr, nullptr, s.values);
  const int64_t padded = round_up(keys, kTileKeys), ld = odd_lines(padded / 2);
  transpose_numbers(s.values, s.sizes.ld, padded, units, s.values_across, ld);
  clear_units(s.weights + (keys + 1) / 2 * kTileQueries, (padded - keys) / 2 * kTileQueries);
  TileBias bias;
  bias.load_window(at, window, head, s.positions);

  for (int64_t begin = 0; begin < tokens; begin += kTileQueries) {
    const int64_t end = std::min(begin + kTileQueries, tokens), queries = round_up(end - begin, kTile);
    at.load_queries(window, head, begin, end, queries, s.stats, s.queries);
    const int32_t* query_units = at.along(s.queries, queries, s.query_units);
    transpose_units(query_units, at.shape.ld, s.query_columns, kTileQueries, queries, units);
    bias.load_queries(at, window, begin, end);
    queries > kTile ? softmax<2>(keys, bias, s) : softmax<1>(keys, bias, s);
    tile_gemm<false>(s.sizes.columns, queries / kTile, padded / kTileKeys, s.values_across, ld, s.weights, kTileQueries,
                     s.out, kTileQueries);
    transpose_units(s.out, kTileQueries, s.rows, at.shape.ld, s.sizes.columns * kTile, queries);
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      float* out = s.rows + n * at.shape.ld;
      scale_row(out, 1 / s.sum[n], at.shape.vectors);
      store_row(at.mutable_data(p.out) + window.offset(p.out, head, frame, row, column), 1, at.shape.dim, out);
      static_cast<float*>(p.lse.data)[lse_offset(p.lse, window, head, frame, row, column)] = s.lse[n];
    });
  }
}

}  // namespace walt::WALT_ISA::window_attention
#endif
