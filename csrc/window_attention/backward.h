// What every way of computing the backward pass shares: the tasks, what gradients are summed up in, rows that are read
// and gradients that are stored.
#pragma once

#include <limits>
#include <utility>

#include "window_attention/attention.h"
#include "window_attention/params.h"

namespace walt::WALT_ISA::window_attention {

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

// The rows of a head of one window, as part of one thread's working memory: `keys` and kBlock queries.
template <class T>
struct BackwardRows {
  using A = accumulate_t<T>;
  A *grad_keys, *grad_values, *key_stats, *context_keys, *context_values;
  A *queries, *grads, *grad_queries, *query_stats, *lse, *row;

  BackwardRows(const Attention<T>& at, Arena& arena, int64_t keys) {
    const int64_t ld = at.shape.ld;
    for (A** part : {&grad_keys, &grad_values}) *part = arena.take<A>(keys * ld);
    key_stats = arena.take<A>(2 * keys);
    for (A** part : {&context_keys, &context_values}) *part = arena.take<A>(at.context * ld);
    for (A** part : {&queries, &grads, &grad_queries}) *part = arena.take<A>(kBlock * ld);
    query_stats = arena.take<A>(2 * kBlock);
    lse = arena.take<A>(kBlock);
    row = arena.take<A>(ld);
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
  static constexpr int lanes = kLanes<A>;

 public:
  Backward(const WindowAttentionBackwardParams& params, const Attention<T>& attention)
      : b(params),
        p(params),
        at(attention),
        groups(p, attention.grid),
        table_size(round_up(attention.bias.size, lanes) + 2 * lanes),
        wants_q(b.grad_q.defined() || b.grad_q_norm.defined()),
        wants_k(b.grad_k.defined() || b.grad_k_norm.defined() || b.grad_context_k.defined()),
        wants_v(b.grad_v.defined() || b.grad_context_v.defined()),
        wants_table(b.grad_bias_table.defined()) {}

  // S: the scratch of a thread. one_window(window, head, runs, scratch, partial) computes the gradients of the rows of
  // one window's head, and passes them on through load_grads and finish_....
  template <class S, class F>
  void run(F&& one_window) {
    Arena counter(nullptr);
    S{at, counter};
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
      const S scratch(at, arena);
      A* norm = norms.data() + 2 * task * norm_size;
      const Partial<A> partial{wants_table ? tables.data() + task * table_size + lanes : nullptr, norm,
                               norm + norm_size};
      one_task(task % at.heads, task / at.heads, windows[static_cast<size_t>(thread)], scratch, partial,
               [&](const Window& window, int64_t head) {
                 one_window(window, head, runs[static_cast<size_t>(thread)], scratch, partial);
               });
    });

    if (wants_table) {
      parallel_for(at.heads, threads, [&](int64_t head, int) {
        A* grad = static_cast<A*>(b.grad_bias_table.data) + head * at.bias.size;
        sum_partials(tables.data() + head * table_size + lanes, at.heads * table_size, groups.count, at.bias.size,
                     grad);
      });
    }
    for (const auto& [view, first] :
         {std::pair(b.grad_q_norm, norms.data()), std::pair(b.grad_k_norm, norms.data() + norm_size)}) {
      if (view.defined()) sum_partials(first, 2 * norm_size, tasks, at.shape.dim, static_cast<A*>(view.data));
    }
  }

  static void clear(A* x, int64_t count) {
    if (count > 0) std::memset(x, 0, static_cast<size_t>(count) * sizeof(A));
  }

  // Rows of grad_out, and lse: infinite beyond the last query, so that weights there are zero.
  void load_grads(const Window& window, int64_t head, int64_t begin, int64_t end, int64_t padded,
                  const BackwardRows<T>& s) const {
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const T* from = at.data(b.grad_out) + window.offset(b.grad_out, head, frame, row, column);
      prefetch_row(from + b.grad_out.stride[2], at.shape.dim);
      load_row(from, b.grad_out.stride[5], at.shape, s.grads + n * at.shape.ld);
      s.lse[n] = static_cast<const A*>(p.lse.data)[lse_offset(p.lse, window, head, frame, row, column)];
    });
    at.clear_rows(s.grads, end - begin, padded);
    for (int64_t n = end - begin; n < padded; ++n) s.lse[n] = std::numeric_limits<A>::infinity();
  }

  void finish_queries(const Window& window, int64_t head, int64_t begin, int64_t end, const BackwardRows<T>& s,
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

  void finish_keys(const Window& window, int64_t head, const BackwardRows<T>& s, const Partial<A>& partial) const {
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

  void finish_values(const Window& window, int64_t head, const BackwardRows<T>& s) const {
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

  const WindowAttentionBackwardParams& b;
  const WindowAttentionParams& p;
  const Attention<T>& at;
  const Groups groups;
  const int64_t table_size;  // with a vector before and behind
  const bool wants_q, wants_k, wants_v, wants_table;

 private:
  static void sum_partials(const A* first, int64_t stride, int64_t count, int64_t size, A* result) {
    clear(result, size);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < size; ++d) result[d] += first[i * stride + d];
    }
  }

  template <class F>
  void one_task(int64_t head, int64_t group, Window& window, const BackwardRows<T>& s, const Partial<A>& partial,
                F&& one_window) const {
    if (wants_table) clear(partial.table - lanes, table_size);
    clear(partial.q_norm, at.shape.padded);
    clear(partial.k_norm, at.shape.padded);
    clear(s.context_keys, at.context * at.shape.ld);
    clear(s.context_values, at.context * at.shape.ld);
    const Range range = groups.range(group);
    for (int64_t index = range.begin; index < range.end; ++index) {
      window.load(at.grid, p.image, index / at.grid.windows(), index % at.grid.windows());
      images(window, head);
      if (!window.video.empty()) one_window(window, head);
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

  void add_row(A* to, const A* from) const {
    for (int64_t i = 0; i < at.shape.vectors * lanes; i += lanes) store(to + i, load(to + i) + load(from + i));
  }
};

}  // namespace walt::WALT_ISA::window_attention
