// The backward pass of bfloat16 on tiles. Scores and their gradients are [keys][queries] and never leave the first cache;
// what they become, weights P = exp(score - lse) and dS = P (dP - delta), is rounded where the next products read it:
// along queries for the gradients of keys and values, across keys for those of queries.
#pragma once

#include "window_attention/backward.h"
#include "window_attention/tile_rows.h"

#ifdef WALT_HAS_TILES
namespace walt::WALT_ISA::window_attention {

// One thread's working memory.
struct TileBackwardScratch : BackwardRows<bfloat16> {
  TileSizes sizes;
  float *delta, *scores, *grad_weights, *out, *tables;
  int64_t* positions;
  int32_t *keys, *keys_across, *values, *query_units, *query_columns, *query_across, *grad_units, *grad_columns,
      *grad_across, *weights_along, *grad_scores_along, *grad_scores_across;

  TileBackwardScratch(const TileAttention& at, Arena& arena)
      : BackwardRows<bfloat16>(at, arena, round_up(at.max_keys, kTileKeys)), sizes(at) {
    const int64_t block = kBlock * at.shape.ld;
    delta = arena.take<float>(kBlock);
    for (float** part : {&scores, &grad_weights}) *part = arena.take<float>(kTileKeys * kTileQueries);
    out = arena.take<float>(sizes.columns * kTile * kTileQueries);
    tables = arena.take<float>(TileBias::kTables * TileBias::table_size(at));
    positions = arena.take<int64_t>(sizes.max_keys);
    for (int32_t** part : {&keys, &values}) *part = arena.take<int32_t>(sizes.max_keys * sizes.ld);
    keys_across = arena.take<int32_t>(sizes.steps * kTileNumbers * sizes.max_pairs);
    for (int32_t** part : {&query_units, &grad_units}) *part = arena.take<int32_t>(block);
    for (int32_t** part : {&query_across, &grad_across}) *part = arena.take<int32_t>(block / 2);
    for (int32_t** part : {&query_columns, &grad_columns}) *part = arena.take<int32_t>(sizes.steps * kTile * kBlock);
    for (int32_t** part : {&weights_along, &grad_scores_along}) *part = arena.take<int32_t>(sizes.max_keys * kBlock / 2);
    grad_scores_across = arena.take<int32_t>(sizes.max_keys / 2 * kTileQueries);
  }
};

// For the queries [first, first + kTileQueries) of a block: the scores of few keys at a time, their weights and gradients
// as units, and the gradient of the table.
inline void score_gradients(int64_t keys, int64_t first, bool wants_table, const TileBias& bias,
                            const TileBackwardScratch& s) {
  constexpr float kLog2E = 1.44269504f;
  constexpr int vectors = kTileQueries / kTile;
  vfloat lse[vectors], delta[vectors];
  for (int v = 0; v < vectors; ++v) {
    lse[v] = load(s.lse + first + v * kTile);
    delta[v] = load(s.delta + first + v * kTile);
  }
  for (int64_t begin = 0; begin < keys; begin += kTileKeys) {
    const auto product = [&](const int32_t* rows, const int32_t* columns, float* to) {
      tile_gemm<false>(2, vectors, s.sizes.steps, rows + begin * s.sizes.ld, s.sizes.ld, columns + first, kBlock, to,
                       kTileQueries);
    };
    product(s.keys, s.query_columns, s.scores);
    product(s.values, s.grad_columns, s.grad_weights);
    for (int64_t n = begin; n < std::min(begin + kTileKeys, keys); n += 2) {
      vfloat weight[2][vectors] = {}, grad[2][vectors] = {};
      for (int odd = 0; odd < 2 && n + odd < keys; ++odd) {
        const int64_t cell = (n + odd - begin) * kTileQueries;
        for (int v = 0; v < vectors; ++v) {
          const vfloat score = load(s.scores + cell + v * kTile) + bias(n + odd, first / kTile + v);
          weight[odd][v] = exp2_coarse((score - lse[v]) * kLog2E);
          if (keys == 1) continue;  // it has all the weight, whatever its score
          grad[odd][v] = weight[odd][v] * (load(s.grad_weights + cell + v * kTile) - delta[v]);
          if (wants_table) bias.add_gradient(n + odd, first / kTile + v, grad[odd][v], s.tables);
        }
      }
      for (int odd = 0; odd < 2; ++odd) {
        const int64_t to = ((n + odd) * kBlock + first) / 2;
        store(s.weights_along + to, round_bf16(weight[odd][0], weight[odd][1]));
        store(s.grad_scores_along + to, round_bf16(grad[odd][0], grad[odd][1]));
      }
      for (int v = 0; v < vectors; ++v) {
        store(s.grad_scores_across + n / 2 * kTileQueries + v * kTile, pair_bf16(grad[0][v], grad[1][v]));
      }
    }
  }
}

// delta = sum over dim of out and its gradient, which is the sum over keys of P dP.
inline void load_delta(const Backward<bfloat16>& pass, const Window& window, int64_t head, int64_t begin, int64_t end,
                       int64_t padded, const TileBackwardScratch& s) {
  const auto& at = pass.at;
  const TensorView& out = pass.p.out;
  window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
    load_row(at.data(out) + window.offset(out, head, frame, row, column), out.stride[5], at.shape, s.row);
    vfloat sum{};
    for (int64_t i = 0; i < at.shape.vectors * kTile; i += kTile) sum += load(s.row + i) * load(s.grads + n * at.shape.ld + i);
    s.delta[n] = reduce_add(sum);
  });
  for (int64_t n = end - begin; n < padded; ++n) s.delta[n] = 0;
}

inline void one_window(const Backward<bfloat16>& pass, const Window& window, int64_t head, std::vector<Run>&,
                       const TileBackwardScratch& s, const Partial<float>& partial) {
  const Tiles tiles;
  const auto& at = pass.at;
  const auto& p = pass.p;
  const TileSizes& sizes = s.sizes;
  const int64_t tokens = window.tokens(), ld = at.shape.ld, units = sizes.steps * kTile;
  const int64_t keys = load_units(at, sizes, window, head, p.k, p.context_k, &at.k_norm, s.key_stats, s.row, s.keys);
  load_units(at, sizes, window, head, p.v, p.context_v, nullptr, nullptr, nullptr, s.values);
  const int64_t padded = round_up(keys, kTileKeys), pairs = odd_lines(padded / 2);
  transpose_numbers(s.keys, sizes.ld, padded, units, s.keys_across, pairs);
  at.clear_rows(s.grad_keys, 0, padded);
  at.clear_rows(s.grad_values, 0, padded);
  // Beyond the last key all is zero.
  const int64_t rest = (padded - keys) / 2;
  for (int32_t* x : {s.weights_along, s.grad_scores_along}) {
    clear_units(x + (padded - 2 * rest) * kBlock / 2, rest * kBlock);
  }
  clear_units(s.grad_scores_across + (padded / 2 - rest) * kTileQueries, rest * kTileQueries);
  TileBias bias;
  bias.load_window(at, window, head, s.positions);
  if (pass.wants_table) pass.clear(s.tables, TileBias::kTables * TileBias::table_size(at));

  for (int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, tokens), queries = round_up(end - begin, kTileQueries);
    at.load_queries(window, head, begin, end, queries, s.query_stats, s.queries);
    pass.load_grads(window, head, begin, end, queries, s);
    load_delta(pass, window, head, begin, end, queries, s);
    transpose_units(at.along(s.queries, queries, s.query_units), ld, s.query_columns, kBlock, queries, units);
    transpose_units(at.along(s.grads, queries, s.grad_units), ld, s.grad_columns, kBlock, queries, units);
    bias.load_queries(at, window, begin, end);
    for (int64_t first = 0; first < queries; first += kTileQueries) {
      score_gradients(keys, first, pass.wants_table, bias, s);
      if (!pass.wants_q) continue;
      tile_gemm<false>(sizes.columns, 2, padded / kTileKeys, s.keys_across, pairs, s.grad_scores_across, kTileQueries,
                       s.out, kTileQueries);
      transpose_units(s.out, kTileQueries, s.grad_queries + first * ld, ld, sizes.columns * kTile, kTileQueries);
    }
    const auto sum_over_queries = [&](const int32_t* along, float* rows, int32_t* across, float* sums) {
      tile_gemm<true>(padded / kTile, sizes.columns, queries / kTileQueries, along, kBlock / 2,
                      at.across(rows, queries, across), ld, sums, ld);
    };
    if (pass.wants_v) sum_over_queries(s.weights_along, s.grads, s.grad_across, s.grad_values);
    if (pass.wants_k) sum_over_queries(s.grad_scores_along, s.queries, s.query_across, s.grad_keys);
    if (pass.wants_q) pass.finish_queries(window, head, begin, end, s, partial);
  }
  if (pass.wants_table) TileBias::sum_tables(at, s.tables, partial.table);
  if (pass.wants_k) pass.finish_keys(window, head, s, partial);
  if (pass.wants_v) pass.finish_values(window, head, s);
}

}  // namespace walt::WALT_ISA::window_attention
#endif
