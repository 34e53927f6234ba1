// Gradients of window attention. A task walks over the windows of its group; for each it computes the scores of a block
// of queries again, and with the lse of the forward pass the weights.
#include "window_attention/backward.h"

#include "window_attention/tile_backward.h"

namespace walt::WALT_ISA::window_attention {
namespace {

// One thread's working memory.
template <class T>
struct BackwardScratch : BackwardRows<T> {
  using A = accumulate_t<T>;
  using Unit = typename Attention<T>::Unit;
  A *keys, *values, *scores, *grad_scores;
  Unit *key_along, *key_across, *value_along, *query_along, *query_across, *query_columns, *grad_along, *grad_across,
      *grad_columns, *weight_along, *grad_score_along, *grad_score_across;

  BackwardScratch(const Attention<T>& at, Arena& arena) : BackwardRows<T>(at, arena, round_up(at.max_keys, 2)) {
    const bool paired = Attention<T>::kPaired;
    const int64_t ld = at.shape.ld, rows = round_up(at.max_keys, 2), size = rows * ld, block = kBlock * ld;
    for (A** part : {&keys, &values}) *part = arena.take<A>(size);
    for (A** part : {&scores, &grad_scores}) *part = arena.take<A>(rows * kBlock + at.lanes);
    for (Unit** part : {&query_columns, &grad_columns}) *part = arena.take<Unit>(at.units * kBlock);
    for (Unit** part : {&key_along, &value_along}) *part = arena.take<Unit>(paired ? size : 0);
    key_across = arena.take<Unit>(paired ? size / 2 : 0);
    for (Unit** part : {&query_along, &grad_along}) *part = arena.take<Unit>(paired ? block : 0);
    for (Unit** part : {&query_across, &grad_across}) *part = arena.take<Unit>(paired ? block / 2 : 0);
    for (Unit** part : {&weight_along, &grad_score_along, &grad_score_across}) {
      *part = arena.take<Unit>(paired ? rows * kBlock / 2 : 0);
    }
  }
};

// Scores and their gradients as units: themselves, or their packed pairs.
template <class T>
const typename Attention<T>::Unit* pick([[maybe_unused]] const accumulate_t<T>* plain,
                                        [[maybe_unused]] const typename Attention<T>::Unit* packed) {
  if constexpr (Attention<T>::kPaired) {
    return packed;
  } else {
    return plain;
  }
}

template <class T>
void pack_pairs([[maybe_unused]] int64_t keys, [[maybe_unused]] int64_t i,
                [[maybe_unused]] const BackwardScratch<T>& s) {
#ifdef WALT_HAS_BF16_DOT
  if constexpr (Attention<T>::kPaired) {
    using Unit = typename Attention<T>::Unit;
    const auto along = [&](const float* from, Unit* to) {  // half a vector of units
      const vhalf half = half_bf16(load(from));
      std::memcpy(to, &half, sizeof half);
    };
    for (int64_t n = 0; n < keys; ++n) {
      along(s.scores + n * kBlock + i, s.weight_along + (n * kBlock + i) / 2);
      along(s.grad_scores + n * kBlock + i, s.grad_score_along + (n * kBlock + i) / 2);
    }
    for (int64_t n = 0; n < keys; n += 2) {
      const vfloat odd = n + 1 < keys ? load(s.grad_scores + (n + 1) * kBlock + i) : vfloat{};
      store(s.grad_score_across + n / 2 * kBlock + i, pair_bf16(load(s.grad_scores + n * kBlock + i), odd));
    }
  }
#endif
}

// For `Vectors` vectors of queries: scores become weights P = exp(score - lse), their gradients dP become
// dS = P (dP - sum_j P dP). Weights are normalised again: the rounding of a large lse would scale a whole row.
template <class T, int Vectors>
void softmax_backward(int64_t keys, int64_t i, const BackwardScratch<T>& s) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  constexpr int lanes = kLanes<A>;
  A *scores = s.scores + i, *grad_scores = s.grad_scores + i;
  V lse[Vectors], sum[Vectors], product[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    lse[v] = load(s.lse + i + v * lanes);
    sum[v] = product[v] = V{};
  }
  for (int64_t n = 0; n < keys; ++n) {
    for (int v = 0; v < Vectors; ++v) {
      const int64_t cell = n * kBlock + v * lanes;
      const V weight = exp(load(scores + cell) - lse[v]);
      sum[v] += weight;
      product[v] += weight * load(grad_scores + cell);
      store(scores + cell, weight);
    }
  }
  V factor[Vectors], delta[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    factor[v] = broadcast(A{1}) / (sum[v] > V{} ? sum[v] : broadcast(A{1}));  // no weights beyond the last query
    delta[v] = product[v] * factor[v];
  }
  for (int64_t n = 0; n < keys; ++n) {
    for (int v = 0; v < Vectors; ++v) {
      const int64_t cell = n * kBlock + v * lanes;
      const V weight = load(scores + cell) * factor[v];
      store(scores + cell, weight);
      store(grad_scores + cell, weight * (load(grad_scores + cell) - delta[v]));
    }
  }
  if constexpr (Attention<T>::kPaired) {
    for (int v = 0; v < Vectors; ++v) pack_pairs<T>(keys, i + v * lanes, s);
  }
}

template <class T>
void add_to_table(const Attention<T>& at, const Window& window, const std::vector<Run>& runs,
                  const accumulate_t<T>* grad_scores, accumulate_t<T>* table) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  constexpr int lanes = kLanes<A>;
  V index{};
  for (int i = 0; i < lanes; ++i) index[i] = static_cast<A>(i);
  window.each_token(0, window.tokens(), [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
    A* to = table + at.bias.center - at.bias.position(frame, row, column);
    const A* from = grad_scores + n * kBlock;
    for (const Run& run : runs) {
      const V grad = load(from + run.offset);
      const V inside = index < broadcast(static_cast<A>(run.length)) ? grad : V{};
      store(to + run.position, load(to + run.position) + inside);
    }
  });
}

template <class T>
void one_window(const Backward<T>& pass, const Window& window, int64_t head, std::vector<Run>& runs,
                const BackwardScratch<T>& s, const Partial<accumulate_t<T>>& partial) {
  using U = typename Attention<T>::U;
  using Unit = typename U::Unit;
  constexpr int lanes = kLanes<accumulate_t<T>>;
  const auto& at = pass.at;
  const auto& p = pass.p;
  const int64_t tokens = window.tokens(), ld = at.shape.ld, block = at.block_size(tokens);
  const int64_t keys = at.load_keys(window, head, p.k, p.context_k, &at.k_norm, s.key_stats, s.keys);
  at.load_keys(window, head, p.v, p.context_v, nullptr, nullptr, s.values);
  const Unit* key_along = at.along(s.keys, keys, s.key_along);
  const Unit* key_across = at.across(s.keys, keys, s.key_across);
  const Unit* value_along = at.along(s.values, keys, s.value_along);
  at.clear_rows(s.grad_keys, 0, keys);
  at.clear_rows(s.grad_values, 0, keys);

  for (int64_t begin = 0; begin < tokens; begin += block) {
    const int64_t end = std::min(begin + block, tokens), count = end - begin, queries = round_up(count, lanes);
    const int64_t vectors = queries / lanes;
    at.load_queries(window, head, begin, end, queries, s.query_stats, s.queries);
    pass.load_grads(window, head, begin, end, queries, s);
    transpose_units(at.along(s.queries, queries, s.query_along), ld, s.query_columns, kBlock, queries, at.units);
    transpose_units(at.along(s.grads, queries, s.grad_along), ld, s.grad_columns, kBlock, queries, at.units);
    at.bias.runs(window, begin, end, lanes, runs);
    at.start_scores(window, head, runs, keys, count, s.scores);
    gemm<U, false>(keys, vectors, at.units, key_along, ld, s.query_columns, kBlock, s.scores, kBlock);
    pass.clear(s.grad_scores, keys * kBlock);
    gemm<U, false>(keys, vectors, at.units, value_along, ld, s.grad_columns, kBlock, s.grad_scores, kBlock);
    int64_t i = 0;
    for (; i + 2 * lanes <= queries; i += 2 * lanes) softmax_backward<T, 2>(keys, i, s);
    for (; i < queries; i += lanes) softmax_backward<T, 1>(keys, i, s);
    if (pass.wants_table) add_to_table(at, window, runs, s.grad_scores, partial.table);
    if (pass.wants_v) {
      const Unit* grad_across = at.across(s.grads, count, s.grad_across);
      gemm<U, false>(keys, at.shape.vectors, at.unit_rows(count), pick<T>(s.scores, s.weight_along), kBlock / U::kStep,
                     grad_across, ld, s.grad_values, ld);
    }
    if (pass.wants_k) {
      const Unit* query_across = at.across(s.queries, count, s.query_across);
      gemm<U, false>(keys, at.shape.vectors, at.unit_rows(count), pick<T>(s.grad_scores, s.grad_score_along),
                     kBlock / U::kStep, query_across, ld, s.grad_keys, ld);
    }
    if (pass.wants_q) {
      at.clear_rows(s.grad_queries, 0, count);
      gemm<U, true>(count, at.shape.vectors, at.unit_rows(keys), pick<T>(s.grad_scores, s.grad_score_across), kBlock,
                    key_across, ld, s.grad_queries, ld);
      pass.finish_queries(window, head, begin, end, s, partial);
    }
  }
  if (pass.wants_k) pass.finish_keys(window, head, s, partial);
  if (pass.wants_v) pass.finish_values(window, head, s);
}

}  // namespace

void backward(const WindowAttentionBackwardParams& p) {
  check(p);
  const TensorView& q = p.q;
  check_tokens(p.out, "out", q);
  check_tokens(p.grad_out, "grad_out", q);
  for (const TensorView* view : {&p.grad_q, &p.grad_k, &p.grad_v}) {
    if (view->defined()) check_tokens(*view, "gradient", q);
  }
  with_attention(p, [&](const auto& attention) {
    using T = typename std::decay_t<decltype(attention)>::Element;
    Backward<T> pass(p, attention);
    const auto each = [&](auto&&... arguments) { one_window(pass, arguments...); };
#ifdef WALT_HAS_TILES
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (tiles_in_use()) return pass.template run<TileBackwardScratch>(each);
    }
#endif
    pass.template run<BackwardScratch<T>>(each);
  });
}

}  // namespace walt::WALT_ISA::window_attention
