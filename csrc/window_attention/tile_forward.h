// The forward pass of bfloat16 on tiles. Queries lie across in every product: scores and weights are [keys][queries],
// so that a weight is made where the next product reads it, and out = values^T weights is turned when it is stored.
#pragma once

#include "window_attention/tile_bias.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

// One thread's working memory for one head of one window.
struct TileForwardScratch {
  TileSizes sizes;
  float *stats, *queries, *scores, *out, *rows, *reference, *largest, *sum;
  int64_t* positions;
  int32_t *keys, *values, *values_across, *query_units, *query_columns, *weights;

  TileForwardScratch(const TileAttention& at, Arena& arena) : sizes(at) {
    stats = arena.take<float>(2 * std::max(sizes.max_keys, kBlock));
    for (float** part : {&queries, &rows}) *part = arena.take<float>(kBlock * at.shape.ld);
    scores = arena.take<float>(kTileKeys * kBlock);
    out = arena.take<float>(sizes.columns * kTile * kBlock);
    for (float** part : {&reference, &largest, &sum}) *part = arena.take<float>(kBlock);
    positions = arena.take<int64_t>(sizes.max_keys);
    for (int32_t** part : {&keys, &values}) *part = arena.take<int32_t>(sizes.max_keys * sizes.ld);
    values_across = arena.take<int32_t>(sizes.steps * kTileNumbers * sizes.max_pairs);
    query_units = arena.take<int32_t>(kBlock * at.shape.ld);
    query_columns = arena.take<int32_t>(sizes.steps * kTile * kBlock);
    weights = arena.take<int32_t>(sizes.max_keys / 2 * kBlock);
  }
};

// exp(score - reference) of the keys [begin, end), at most kTileKeys, in units of two keys, for one vector of queries.
// Adds to their sums, and keeps the largest score.
template <int kRuns>
void weigh(int64_t begin, int64_t end, int v, const TileBias& bias, const TileForwardScratch& s) {
  const auto bias_of = bias.of<kRuns>(v);
  const float* scores = s.scores + v * kTile - begin * kBlock;
  const vfloat reference = load(s.reference + v * kTile);
  vfloat largest = load(s.largest + v * kTile), sum = load(s.sum + v * kTile);
  const auto weight = [&](int64_t n) {
    const vfloat score = load(scores + n * kBlock) + bias_of(n);
    largest = maximum(largest, score);
    return exp2_coarse((score - reference) * kLog2E);
  };
  for (int64_t n = begin; n < end; n += 2) {
    const vfloat even = weight(n), odd = n + 1 < end ? weight(n + 1) : vfloat{};
    sum += even + odd;
    store(s.weights + n / 2 * kBlock + v * kTile, pair_bf16(even, odd));
  }
  store(s.largest + v * kTile, largest);
  store(s.sum + v * kTile, sum);
}

// Weights of a block of queries and their sums, unnormalised.
//
// The scores of few keys at a time, which never leave the first cache. So the largest is not known when the first
// weight is made; but any reference will do that lets no weight overflow, and none that counts vanish. It is the
// largest score of the first keys, unless a later one is far above it: then all is done again.
template <int kRuns>
void softmax(int64_t keys, int64_t vectors, const TileBias& bias, const TileForwardScratch& s) {
  constexpr float kFar = 40;
  for (bool again = false;;) {
    for (int64_t begin = 0; begin < keys; begin += kTileKeys) {
      const int64_t end = std::min(begin + kTileKeys, keys);
      tile_gemm<false>(2, vectors, s.sizes.steps, s.keys + begin * s.sizes.ld, s.sizes.ld, s.query_columns, kBlock,
                       s.scores, kBlock);
      for (int v = 0; v < vectors; ++v) {
        if (begin == 0) {
          const auto bias_of = bias.of<kRuns>(v);
          vfloat largest = again ? load(s.largest + v * kTile) : load(s.scores + v * kTile) + bias_of(0);
          for (int64_t n = 1; n < end && !again; ++n) {
            largest = maximum(largest, load(s.scores + n * kBlock + v * kTile) + bias_of(n));
          }
          store(s.reference + v * kTile, largest);
          store(s.largest + v * kTile, largest);
          store(s.sum + v * kTile, vfloat{});
        }
        weigh<kRuns>(begin, end, v, bias, s);
      }
    }
    vint far{};
    for (int64_t i = 0; i < vectors * kTile; i += kTile) far |= load(s.largest + i) - load(s.reference + i) > kFar;
    if (!any(far)) return;
    again = true;
  }
}

inline void attend(const TileAttention& at, const Window& window, int64_t head, std::vector<Run>&,
                   const TileForwardScratch& s) {
  const Tiles tiles;
  const auto& p = at.p;
  const int64_t tokens = window.tokens(), units = s.sizes.steps * kTile;
  const int64_t keys = load_units(at, s.sizes, window, head, p.k, p.context_k, &at.k_norm, s.stats, s.queries, s.keys);
  load_units(at, s.sizes, window, head, p.v, p.context_v, nullptr, nullptr, nullptr, s.values);
  const int64_t padded = round_up(keys, kTileKeys), ld = odd_lines(padded / 2);
  transpose_numbers(s.values, s.sizes.ld, padded, units, s.values_across, ld);
  clear_units(s.weights + (keys + 1) / 2 * kBlock, (padded - keys) / 2 * kBlock);
  TileBias bias(at, window, head, s.positions);

  for (int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, tokens), queries = round_up(end - begin, kTile);
    at.load_queries(window, head, begin, end, queries, s.stats, s.queries);
    const int32_t* query_units = at.along(s.queries, queries, s.query_units);
    transpose_units(query_units, at.shape.ld, s.query_columns, kBlock, queries, units);
    bias.load_queries(at, window, begin, end);
    bias.with_runs([&](auto runs) { softmax<runs()>(keys, queries / kTile, bias, s); });
    tile_gemm<false>(s.sizes.columns, queries / kTile, padded / kTileKeys, s.values_across, ld, s.weights, kBlock,
                     s.out, kBlock);
    transpose_units(s.out, kBlock, s.rows, at.shape.ld, s.sizes.columns * kTile, queries);
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      float* out = s.rows + n * at.shape.ld;
      scale_row(out, 1 / s.sum[n], at.shape.vectors);
      store_row(at.mutable_data(p.out) + window.offset(p.out, head, frame, row, column), 1, at.shape.dim, out);
      static_cast<float*>(p.lse.data)[lse_offset(p.lse, window, head, frame, row, column)] =
          s.reference[n] + std::log(s.sum[n]);
    });
  }
}

}  // namespace walt::WALT_ISA::window_attention
#endif
