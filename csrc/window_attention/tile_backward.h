// The backward pass of bfloat16 on tiles. Scores and their gradients are [keys][queries] and never leave the first
// cache; what they become, weights P = exp(score - lse) and dS = P (dP - delta), is rounded where the next products
// read it: along queries for the gradients of keys and values, across keys for those of queries.
#pragma once

#include "window_attention/backward.h"
#include "window_attention/tile_bias.h"

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
    for (float** part : {&scores, &grad_weights}) *part = arena.take<float>(kTileKeys * kBlock);
    out = arena.take<float>(sizes.columns * kTile * kBlock);
    tables = arena.take<float>(TileBias::kTables * TileBias::table_size(at));
    positions = arena.take<int64_t>(sizes.max_keys);
    for (int32_t** part : {&keys, &values}) *part = arena.take<int32_t>(sizes.max_keys * sizes.ld);
    keys_across = arena.take<int32_t>(sizes.steps * kTileNumbers * sizes.max_pairs);
    for (int32_t** part : {&query_units, &grad_units}) *part = arena.take<int32_t>(block);
    for (int32_t** part : {&query_across, &grad_across}) *part = arena.take<int32_t>(block / 2);
    for (int32_t** part : {&query_columns, &grad_columns}) *part = arena.take<int32_t>(sizes.steps * kTile * kBlock);
    for (int32_t** part : {&weights_along, &grad_scores_along})
      *part = arena.take<int32_t>(sizes.max_keys * kBlock / 2);
    grad_scores_across = arena.take<int32_t>(sizes.max_keys / 2 * kBlock);
  }
};

// Weights and their gradients of the keys [begin, end), at most kTileKeys, as units, and the gradient of the table, for
// two vectors of queries.
template <int kRuns>
void score_gradients(int64_t begin, int64_t end, int v, bool wants_table, const TileBias& bias,
                     const TileBackwardScratch& s) {
  struct Vector {
    vfloat weight, grad;
  };
  const auto vector = [&](int i) {
    const int64_t at = (v + i) * kTile;
    return [&, bias_of = bias.of<kRuns>(v + i), lse = load(s.lse + at), delta = load(s.delta + at), i, at](int64_t n) {
      const int64_t cell = (n - begin) * kBlock + at;
      const vfloat weight = exp2_coarse((load(s.scores + cell) + bias_of(n) - lse) * kLog2E);
      // A single key has all the weight, whatever its score.
      const vfloat grad = end > 1 ? weight * (load(s.grad_weights + cell) - delta) : vfloat{};
      if (kRuns > 0 && wants_table) bias.add_gradient(n, v + i, grad, s.tables);
      return Vector{weight, grad};
    };
  };
  const auto left = vector(0), right = vector(1);
  const auto along = [&](int64_t n, const Vector& a, const Vector& b) {
    store(s.weights_along + (n * kBlock + v * kTile) / 2, round_bf16(a.weight, b.weight));
    store(s.grad_scores_along + (n * kBlock + v * kTile) / 2, round_bf16(a.grad, b.grad));
  };
  for (int64_t n = begin; n < end; n += 2) {
    const Vector a = left(n), b = right(n);
    along(n, a, b);
    Vector c{}, d{};
    if (n + 1 < end) {
      c = left(n + 1);
      d = right(n + 1);
      along(n + 1, c, d);
    }
    int32_t* across = s.grad_scores_across + n / 2 * kBlock + v * kTile;
    store(across, pair_bf16(a.grad, c.grad));
    store(across + kTile, pair_bf16(b.grad, d.grad));
  }
}

// delta = sum over dim of out and its gradient, which is the sum over keys of P dP.
inline void load_delta(const Backward<bfloat16>& pass, const Window& window, int64_t head, int64_t begin, int64_t end,
                       int64_t padded, const TileBackwardScratch& s) {
  const auto& at = pass.at;
  const TensorView& out = pass.p.out;
  window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
    const bfloat16* from = at.data(out) + window.offset(out, head, frame, row, column);
    prefetch_row(from + out.stride[2], at.shape.dim);
    load_row(from, out.stride[5], at.shape, s.row);
    vfloat sum{};
    for (int64_t i = 0; i < at.shape.vectors * kTile; i += kTile)
      sum += load(s.row + i) * load(s.grads + n * at.shape.ld + i);
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
  // Beyond the last key all is zero.
  for (int32_t* x : {s.weights_along, s.grad_scores_along}) {
    clear_units(x + keys * kBlock / 2, (padded - keys) * kBlock / 2);
  }
  clear_units(s.grad_scores_across + (keys + 1) / 2 * kBlock, (padded - keys) / 2 * kBlock);
  TileBias bias(at, window, head, s.positions);
  if (pass.wants_table) pass.clear(s.tables, TileBias::kTables * TileBias::table_size(at));

  for (int64_t begin = 0; begin < tokens; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, tokens), queries = round_up(end - begin, kTileNumbers);
    at.load_queries(window, head, begin, end, queries, s.query_stats, s.queries);
    pass.load_grads(window, head, begin, end, queries, s);
    load_delta(pass, window, head, begin, end, queries, s);
    transpose_units(at.along(s.queries, queries, s.query_units), ld, s.query_columns, kBlock, queries, units);
    transpose_units(at.along(s.grads, queries, s.grad_units), ld, s.grad_columns, kBlock, queries, units);
    bias.load_queries(at, window, begin, end);
    for (int64_t first = 0; first < keys; first += kTileKeys) {
      const auto product = [&](const int32_t* rows, const int32_t* columns, float* to) {
        tile_gemm<false>(2, queries / kTile, sizes.steps, rows + first * sizes.ld, sizes.ld, columns, kBlock, to,
                         kBlock);
      };
      product(s.keys, s.query_columns, s.scores);
      product(s.values, s.grad_columns, s.grad_weights);
      bias.with_runs([&](auto runs) {
        for (int v = 0; v < queries / kTile; v += 2) {
          score_gradients<runs()>(first, std::min(first + kTileKeys, keys), v, pass.wants_table, bias, s);
        }
      });
    }
    const auto sum_over_queries = [&](const int32_t* along, float* rows, int32_t* across, float* sums) {
      const auto product = begin == 0 ? tile_gemm<false> : tile_gemm<true>;
      product(padded / kTile, sizes.columns, queries / kTileNumbers, along, kBlock / 2,
              at.across(rows, queries, across), ld, sums, ld);
    };
    if (pass.wants_v) sum_over_queries(s.weights_along, s.grads, s.grad_across, s.grad_values);
    if (pass.wants_k) sum_over_queries(s.grad_scores_along, s.queries, s.query_across, s.grad_keys);
    if (pass.wants_q) {
      tile_gemm<false>(sizes.columns, queries / kTile, padded / kTileKeys, s.keys_across, pairs, s.grad_scores_across,
                       kBlock, s.out, kBlock);
      transpose_units(s.out, kBlock, s.grad_queries, ld, sizes.columns * kTile, queries);
      pass.finish_queries(window, head, begin, end, s, partial);
    }
  }
  if (pass.wants_table) TileBias::sum_tables(at, s.tables, partial.table);
  if (pass.wants_k) pass.finish_keys(window, head, s, partial);
  if (pass.wants_v) pass.finish_values(window, head, s);
}

}  // namespace walt::WALT_ISA::window_attention
#endif
