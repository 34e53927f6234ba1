// Gradients of window attention. A task walks over the windows of its group; for each it computes the scores of a block
// of queries again, and with the lse of the forward pass the weights.
#include <limits>
#include <utility>

#include "window_attention/attention.h"
#include "window_attention/params.h"

namespace walt::WALT_ISA::window_attention {
namespace {

// Windows are cut into groups; one task is one head of one group, and sums over its windows in order. The number of
// groups depends on the problem alone, so results do not depend on the number of threads. With a context a group is one
// sample, whose context gradients are then the sum of one task.
struct Groups {
  int64_t windows, count;  // of all samples; groups per head

  Groups(const WindowAttentionParams& p, const Grid& grid) : windows(p.q.shape[0] * grid.windows()) {
    constexpr int64_t kTasks = 128;
    const int64_t heads = p.q.shape[4];
    count = p.context_k.defined() ? p.q.shape[0] : std::min(windows, (kTasks + heads - 1) / heads);
  }
  Range range(int64_t group) const {
    return {part_begin(windows, count, group), part_begin(windows, count, group + 1)};
  }
};

// One thread's working memory.
template <class T>
struct BackwardScratch {
  using A = accumulate_t<T>;
  using Unit = typename Attention<T>::Unit;
  A *keys, *values, *grad_keys, *grad_values, *key_stats, *context_keys, *context_values;
  A *queries, *grads, *grad_queries, *query_stats, *scores, *grad_scores, *lse, *row;
  Unit *key_along, *key_across, *value_along, *query_along, *query_across, *query_columns, *grad_along, *grad_across,
      *grad_columns, *weight_along, *grad_score_along, *grad_score_across;

  BackwardScratch(const Attention<T>& at, Arena& arena) {
    const bool paired = Attention<T>::kPaired;
    const int64_t ld = at.shape.ld, rows = round_up(at.max_keys, 2), size = rows * ld, block = kBlock * ld;
    for (A** part : {&keys, &values, &grad_keys, &grad_values}) *part = arena.take<A>(size);
    key_stats = arena.take<A>(2 * rows);
    for (A** part : {&context_keys, &context_values}) *part = arena.take<A>(at.context * ld);
    for (A** part : {&queries, &grads, &grad_queries}) *part = arena.take<A>(block);
    query_stats = arena.take<A>(2 * kBlock);
    for (A** part : {&scores, &grad_scores}) *part = arena.take<A>(rows * kBlock + at.lanes);
    lse = arena.take<A>(kBlock);
    row = arena.take<A>(ld);
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

// Partial sums of one task.
template <class A>
struct Partial {
  A *table, *q_norm, *k_norm;
};

template <class T>
class Backward {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  using U = typename Attention<T>::U;
  using Unit = typename U::Unit;
  static constexpr int lanes = kLanes<A>;

 public:
  Backward(const WindowAttentionBackwardParams& params, const Attention<T>& attention)
      : b(params),
        p(params),
        at(attention),
        groups(p, attention.grid),
        table_size(round_up(attention.bias.size + lanes, lanes)),
        wants_q(b.grad_q.defined() || b.grad_q_norm.defined()),
        wants_k(b.grad_k.defined() || b.grad_k_norm.defined() || b.grad_context_k.defined()),
        wants_v(b.grad_v.defined() || b.grad_context_v.defined()),
        wants_table(b.grad_bias_table.defined()) {}

  void run() {
    Arena counter(nullptr);
    BackwardScratch<T>{at, counter};
    const int threads = std::max(p.threads, 1);
    Scratch<char> memory(counter.used() * threads);
    const int64_t norm_size = at.shape.padded, tasks = groups.count * at.heads;
    Scratch<A> tables(wants_table ? tasks * table_size : 0), norms(2 * tasks * norm_size);
    std::vector<Window> windows(static_cast<size_t>(threads));
    std::vector<std::vector<Run>> runs(static_cast<size_t>(threads));
    for (auto& r : runs) r.reserve(kBlock);
    for (auto& w : windows) w.reserve(at.grid);

    parallel_for(tasks, threads, [&](int64_t task, int thread) {
      Arena arena(memory.data() + thread * counter.used());
      const BackwardScratch<T> scratch(at, arena);
      A* norm = norms.data() + 2 * task * norm_size;
      const Partial<A> partial{wants_table ? tables.data() + task * table_size : nullptr, norm, norm + norm_size};
      one_task(task % at.heads, task / at.heads, windows[static_cast<size_t>(thread)],
               runs[static_cast<size_t>(thread)], scratch, partial);
    });

    if (wants_table) {
      parallel_for(at.heads, threads, [&](int64_t head, int) {
        A* grad = static_cast<A*>(b.grad_bias_table.data) + head * at.bias.size;
        sum_partials(tables.data() + head * table_size, at.heads * table_size, groups.count, at.bias.size, grad);
      });
    }
    for (const auto& [view, first] :
         {std::pair(b.grad_q_norm, norms.data()), std::pair(b.grad_k_norm, norms.data() + norm_size)}) {
      if (view.defined()) sum_partials(first, 2 * norm_size, tasks, at.shape.dim, static_cast<A*>(view.data));
    }
  }

 private:
  static void clear(A* x, int64_t count) {
    if (count > 0) std::memset(x, 0, static_cast<size_t>(count) * sizeof(A));
  }

  static void sum_partials(const A* first, int64_t stride, int64_t count, int64_t size, A* result) {
    clear(result, size);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < size; ++d) result[d] += first[i * stride + d];
    }
  }

  void one_task(int64_t head, int64_t group, Window& window, std::vector<Run>& runs, const BackwardScratch<T>& s,
                const Partial<A>& partial) const {
    clear(partial.table, wants_table ? table_size : 0);
    clear(partial.q_norm, at.shape.padded);
    clear(partial.k_norm, at.shape.padded);
    clear(s.context_keys, at.context * at.shape.ld);
    clear(s.context_values, at.context * at.shape.ld);
    const Range range = groups.range(group);
    for (int64_t index = range.begin; index < range.end; ++index) {
      window.load(at.grid, p.image, index / at.grid.windows(), index % at.grid.windows());
      images(window, head);
      if (!window.video.empty()) one_window(window, head, runs, s, partial);
    }
    for (const auto& [view, sums] :
         {std::pair(b.grad_context_k, s.context_keys), std::pair(b.grad_context_v, s.context_values)}) {
      if (!view.defined()) continue;
      for (int64_t l = 0; l < at.context; ++l) {
        T* to = at.mutable_data(view) + group * view.stride[0] + l * view.stride[1] + head * view.stride[2];
        store_row(to, view.stride[3], at.shape.dim, sums + l * at.shape.ld);
      }
    }
  }

  // An image token is its own value: its gradient passes to v alone.
  void images(const Window& window, int64_t head) const {
    window.each_image_token([&](int64_t frame, int64_t row, int64_t column) {
      const auto at_token = [&](const TensorView& x) {
        return at.mutable_data(x) + window.offset(x, head, frame, row, column);
      };
      if (b.grad_v.defined()) {
        copy_row<T>(at_token(b.grad_out), b.grad_out.stride[5], at_token(b.grad_v), b.grad_v.stride[5], at.shape.dim);
      }
      for (const TensorView* view : {&b.grad_q, &b.grad_k}) {
        if (!view->defined()) continue;
        for (int64_t d = 0; d < at.shape.dim; ++d) at_token(*view)[d * view->stride[5]] = T{};
      }
    });
  }

  void one_window(const Window& window, int64_t head, std::vector<Run>& runs, const BackwardScratch<T>& s,
                  const Partial<A>& partial) const {
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
      load_grads(window, head, begin, end, queries, s);
      transpose_units(at.along(s.queries, queries, s.query_along), ld, s.query_columns, kBlock, queries, at.units);
      transpose_units(at.along(s.grads, queries, s.grad_along), ld, s.grad_columns, kBlock, queries, at.units);
      at.bias.runs(window, begin, end, lanes, runs);
      at.start_scores(window, head, runs, keys, count, s.scores);
      gemm<U, false>(keys, vectors, at.units, key_along, ld, s.query_columns, kBlock, s.scores, kBlock);
      clear(s.grad_scores, keys * kBlock);
      gemm<U, false>(keys, vectors, at.units, value_along, ld, s.grad_columns, kBlock, s.grad_scores, kBlock);
      int64_t i = 0;
      for (; i + 2 * lanes <= queries; i += 2 * lanes) softmax_backward<2>(keys, i, s);
      for (; i < queries; i += lanes) softmax_backward<1>(keys, i, s);
      if (wants_table) add_to_table(window, runs, s.grad_scores, partial.table);
      if (wants_v) {
        const Unit* grad_across = at.across(s.grads, count, s.grad_across);
        gemm<U, false>(keys, at.shape.vectors, at.unit_rows(count), pick(s.scores, s.weight_along), kBlock / U::kStep,
                       grad_across, ld, s.grad_values, ld);
      }
      if (wants_k) {
        const Unit* query_across = at.across(s.queries, count, s.query_across);
        gemm<U, false>(keys, at.shape.vectors, at.unit_rows(count), pick(s.grad_scores, s.grad_score_along),
                       kBlock / U::kStep, query_across, ld, s.grad_keys, ld);
      }
      if (wants_q) {
        at.clear_rows(s.grad_queries, 0, count);
        gemm<U, true>(count, at.shape.vectors, at.unit_rows(keys), pick(s.grad_scores, s.grad_score_across), kBlock,
                      key_across, ld, s.grad_queries, ld);
        finish_queries(window, head, begin, end, s, partial);
      }
    }
    if (wants_k) finish_keys(window, head, s, partial);
    if (wants_v) finish_values(window, head, s);
  }

  // Scores and their gradients as units: themselves, or their packed pairs.
  static const Unit* pick([[maybe_unused]] const A* plain, [[maybe_unused]] const Unit* packed) {
    if constexpr (Attention<T>::kPaired) {
      return packed;
    } else {
      return plain;
    }
  }

  // Rows of grad_out, and lse: infinite beyond the last query, so that weights there are zero.
  void load_grads(const Window& window, int64_t head, int64_t begin, int64_t end, int64_t padded,
                  const BackwardScratch<T>& s) const {
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const T* from = at.data(b.grad_out) + window.offset(b.grad_out, head, frame, row, column);
      prefetch_row(from + b.grad_out.stride[2], at.shape.dim);
      load_row(from, b.grad_out.stride[5], at.shape, s.grads + n * at.shape.ld);
      s.lse[n] = static_cast<const A*>(p.lse.data)[lse_offset(p.lse, window, head, frame, row, column)];
    });
    at.clear_rows(s.grads, end - begin, padded);
    for (int64_t n = end - begin; n < padded; ++n) s.lse[n] = std::numeric_limits<A>::infinity();
  }

  // For `Vectors` vectors of queries: scores become weights P = exp(score - lse), their gradients dP become
  // dS = P (dP - sum_j P dP). Weights are normalised again: the rounding of a large lse would scale a whole row.
  template <int Vectors>
  static void softmax_backward(int64_t keys, int64_t i, const BackwardScratch<T>& s) {
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
      for (int v = 0; v < Vectors; ++v) pack_pairs(keys, i + v * lanes, s);
    }
  }

  static void pack_pairs([[maybe_unused]] int64_t keys, [[maybe_unused]] int64_t i,
                         [[maybe_unused]] const BackwardScratch<T>& s) {
#ifdef WALT_HAS_BF16_DOT
    if constexpr (Attention<T>::kPaired) {
      const auto along = [&](const float* from, Unit* to) {  // half a vector of units
        const vhalf half = half_bf16(load(from));
        std::memcpy(to, &half, sizeof half);
      };
      for (int64_t n = 0; n < keys; ++n) {
        along(s.scores + n * kBlock + i, s.weight_along + (n * kBlock + i) / 2);
        along(s.grad_scores + n * kBlock + i, s.grad_score_along + (n * kBlock + i) / 2);
      }
      for (int64_t n = 0; n < keys; n += 2) {
        const V odd = n + 1 < keys ? load(s.grad_scores + (n + 1) * kBlock + i) : V{};
        store(s.grad_score_across + n / 2 * kBlock + i, pair_bf16(load(s.grad_scores + n * kBlock + i), odd));
      }
    }
#endif
  }

  void add_to_table(const Window& window, const std::vector<Run>& runs, const A* grad_scores, A* table) const {
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

  void finish_queries(const Window& window, int64_t head, int64_t begin, int64_t end, const BackwardScratch<T>& s,
                      const Partial<A>& partial) const {
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      A* grad = s.grad_queries + n * at.shape.ld;
      scale_row(grad, static_cast<A>(p.scale), at.shape.vectors);
      if (at.q_norm.defined()) {
        const T* x = at.data(p.q) + window.offset(p.q, head, frame, row, column);
        prefetch_row(x + p.q.stride[2], at.shape.dim);
        load_row(x, p.q.stride[5], at.shape, s.row);
        at.q_norm.backward(grad, s.row, s.query_stats + 2 * n, partial.q_norm);
      }
      if (b.grad_q.defined()) {
        store_row(at.mutable_data(b.grad_q) + window.offset(b.grad_q, head, frame, row, column), b.grad_q.stride[5],
                  at.shape.dim, grad);
      }
    });
  }

  void finish_keys(const Window& window, int64_t head, const BackwardScratch<T>& s, const Partial<A>& partial) const {
    const auto through_norm = [&](const T* x, int64_t stride, int64_t n) {
      A* grad = s.grad_keys + n * at.shape.ld;
      if (at.k_norm.defined()) {
        load_row(x, stride, at.shape, s.row);
        at.k_norm.backward(grad, s.row, s.key_stats + 2 * n, partial.k_norm);
      }
      return grad;
    };
    const int64_t tokens = window.tokens();
    window.each_token(0, tokens, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const T* x = at.data(p.k) + window.offset(p.k, head, frame, row, column);
      prefetch_row(x + p.k.stride[2], at.shape.dim);
      const A* grad = through_norm(x, p.k.stride[5], n);
      if (!b.grad_k.defined()) return;
      store_row(at.mutable_data(b.grad_k) + window.offset(b.grad_k, head, frame, row, column), b.grad_k.stride[5],
                at.shape.dim, grad);
    });
    at.each_context_row(p.context_k, window.sample, head, [&](int64_t n, const T* x, int64_t l) {
      add_row(s.context_keys + l * at.shape.ld, through_norm(x, p.context_k.stride[3], tokens + n));
    });
  }

  void finish_values(const Window& window, int64_t head, const BackwardScratch<T>& s) const {
    const int64_t tokens = window.tokens();
    if (b.grad_v.defined()) {
      window.each_token(0, tokens, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
        store_row(at.mutable_data(b.grad_v) + window.offset(b.grad_v, head, frame, row, column), b.grad_v.stride[5],
                  at.shape.dim, s.grad_values + n * at.shape.ld);
      });
    }
    at.each_context_row(p.context_v, window.sample, head, [&](int64_t n, const T*, int64_t l) {
      add_row(s.context_values + l * at.shape.ld, s.grad_values + (tokens + n) * at.shape.ld);
    });
  }

  void add_row(A* to, const A* from) const {
    for (int64_t i = 0; i < at.shape.vectors * lanes; i += lanes) store(to + i, load(to + i) + load(from + i));
  }

  const WindowAttentionBackwardParams& b;
  const WindowAttentionParams& p;
  const Attention<T>& at;
  const Groups groups;
  const int64_t table_size;
  const bool wants_q, wants_k, wants_v, wants_table;
};

}  // namespace

void backward(const WindowAttentionBackwardParams& p) {
  check(p);
  const TensorView& q = p.q;
  check_tokens(p.grad_out, "grad_out", q);
  for (const TensorView* view : {&p.grad_q, &p.grad_k, &p.grad_v}) {
    if (view->defined()) check_tokens(*view, "gradient", q);
  }
  with_attention(p, [&](const auto& attention) {
    using T = typename std::decay_t<decltype(attention)>::Element;
    Backward<T>(p, attention).run();
  });
}

}  // namespace walt::WALT_ISA::window_attention
