// What the forward and the backward pass share: shapes of the work, keys and queries in scratch, scores of a block.
//
// A task is one head of one window. Its keys lie in scratch as rows; queries come in blocks of at most kBlock, and the
// scores of a block are kept transposed, [keys][queries]: reductions over keys are then sums of whole vectors, and both
// products with the scores read them with unit stride.
#pragma once

#include <type_traits>

#include "common/checks.h"
#include "common/parallel.h"
#include "window_attention/gemm.h"
#include "window_attention/geometry.h"
#include "window_attention/rows.h"

namespace walt::WALT_ISA::window_attention {

// Queries of a block, at most: whole vectors. 48 is also a multiple of the micro-kernel's rows, and in float32 makes
// rows of scores an odd number of cache lines long, so that a column of scores spreads over all cache sets.
constexpr int64_t kBlock = kVectorBytes == 64 ? 64 : 48;

// Units for products of tensors of T.
template <class T>
struct UnitsOf {
  using type = PlainUnits<accumulate_t<T>>;
};
#ifdef WALT_HAS_BF16_DOT
template <>
struct UnitsOf<bfloat16> {
  using type = Bf16Pairs;
};
#endif

// Hands out parts of one thread's scratch; without memory it only counts. Every part starts on a cache line.
class Arena {
 public:
  explicit Arena(char* memory) : memory_(memory) {}
  template <class X>
  X* take(int64_t count) {
    char* part = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return reinterpret_cast<X*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

template <class T>
struct Attention {
  using Element = T;
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  using U = typename UnitsOf<T>::type;
  using Unit = typename U::Unit;
  static constexpr int lanes = kLanes<A>;
  static constexpr bool kPaired = U::kStep == 2;

  const WindowAttentionParams& p;
  Grid grid;
  BiasGeometry bias;
  RowShape<A> shape;
  RowNorm<A> q_norm, k_norm;
  int64_t heads, context, max_keys, units;  // units of a row that products along it read
  Scratch<A> table;                         // all heads, with room to read a vector beyond either end

  explicit Attention(const WindowAttentionParams& params)
      : p(params),
        grid(params),
        bias(params),
        shape(params.q.shape[5]),
        q_norm(params.q_norm, params.norm_eps, shape),
        k_norm(params.k_norm, params.norm_eps, shape),
        heads(params.q.shape[4]),
        context(params.context_k.defined() ? params.context_k.shape[1] : 0),
        max_keys(grid.max_tokens() + context),
        units((shape.dim + U::kStep - 1) / U::kStep),
        table(params.bias_table.defined() ? heads * bias.size + 2 * lanes : 0) {
    if (!p.bias_table.defined()) return;
    std::memcpy(table.data() + lanes, p.bias_table.data, static_cast<size_t>(heads * bias.size) * sizeof(A));
    store(table.data(), V{});
    store(table.data() + lanes + heads * bias.size, V{});
  }

  // What the position of a query less that of a key is an index of.
  const A* table_of(int64_t head) const { return table.data() + lanes + head * bias.size + bias.center; }

  // Queries in a block: equal blocks, whole vectors each.
  int64_t block_size(int64_t tokens) const {
    const int64_t blocks = (tokens + kBlock - 1) / kBlock;
    return round_up((tokens + blocks - 1) / blocks, lanes);
  }

  // ---- rows of tensors ------------------------------------------------------------------------------------------

  static const T* data(const TensorView& x) { return static_cast<const T*>(x.data); }
  static T* mutable_data(const TensorView& x) { return static_cast<T*>(x.data); }

  // f(row index, address) for the visible context rows of a sample; returns their number.
  template <class F>
  int64_t each_context_row(const TensorView& x, int64_t sample, int64_t head, F&& f) const {
    int64_t n = 0;
    for (int64_t l = 0; l < context; ++l) {
      if (p.context_mask.defined() &&
          !static_cast<const bool*>(
              p.context_mask.data)[sample * p.context_mask.stride[0] + l * p.context_mask.stride[1]]) {
        continue;
      }
      f(n++, mutable_data(x) + sample * x.stride[0] + l * x.stride[1] + head * x.stride[2], l);
    }
    return n;
  }

  // f(n, address, stride) for all keys (or values): window tokens, then visible context; returns their number.
  template <class F>
  int64_t each_key(const Window& window, int64_t head, const TensorView& x, const TensorView& context_x, F&& f) const {
    const int64_t tokens = window.tokens();
    window.each_token(0, tokens, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const T* from = data(x) + window.offset(x, head, frame, row, column);
      prefetch_row(from + x.stride[2], shape.dim);
      f(n, from, x.stride[5]);
    });
    return tokens + each_context_row(context_x, window.sample, head, [&](int64_t n, const T* from, int64_t) {
             f(tokens + n, from, context_x.stride[3]);
           });
  }

  // The same as rows of `out`.
  int64_t load_keys(const Window& window, int64_t head, const TensorView& x, const TensorView& context_x,
                    const RowNorm<A>* norm, A* stats, A* out) const {
    return each_key(window, head, x, context_x, [&](int64_t n, const T* from, int64_t stride) {
      A* to = out + n * shape.ld;
      load_row(from, stride, shape, to);
      if (norm != nullptr) norm->forward(to, stats + 2 * n);
    });
  }

  // Queries [begin, end) as rows, normalised and scaled, zeros up to `padded` rows.
  void load_queries(const Window& window, int64_t head, int64_t begin, int64_t end, int64_t padded, A* stats,
                    A* out) const {
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      A* to = out + n * shape.ld;
      const T* from = data(p.q) + window.offset(p.q, head, frame, row, column);
      prefetch_row(from + p.q.stride[2], shape.dim);
      load_row(from, p.q.stride[5], shape, to);
      q_norm.forward(to, stats + 2 * n);
      scale_row(to, static_cast<A>(p.scale), shape.vectors);
    });
    clear_rows(out, end - begin, padded);
  }

  void clear_rows(A* rows, int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t d = 0; d < shape.padded; d += lanes) store(rows + n * shape.ld + d, V{});
    }
  }

  // ---- packing --------------------------------------------------------------------------------------------------

  // Units along each row, in rows of units `ld` apart.
  const Unit* along(const A* rows, int64_t count, Unit* out) const {
    if constexpr (!kPaired) {
      return rows;
    } else {
      for (int64_t n = 0; n < count; ++n) pack_along(U{}, rows + n * shape.ld, out + n * shape.ld, shape.padded);
      return out;
    }
  }

  // Units across rows; an odd last row is paired with zeros, which are written behind it.
  const Unit* across(A* rows, int64_t count, Unit* out) const {
    if constexpr (!kPaired) {
      return rows;
    } else {
      clear_rows(rows, count, round_up(count, 2));
      for (int64_t n = 0; n < count; n += 2) {
        pack_across(U{}, rows + n * shape.ld, shape.ld, out + n / 2 * shape.ld, shape.padded);
      }
      return out;
    }
  }

  static int64_t unit_rows(int64_t rows) { return (rows + U::kStep - 1) / U::kStep; }

  // ---- scores ---------------------------------------------------------------------------------------------------

  // scores[key][query] = bias for the queries of `runs`, zero for the context; the rest of a row is finite.
  void start_scores(const Window& window, int64_t head, const std::vector<Run>& runs, int64_t keys, int64_t queries,
                    A* scores) const {
    const int64_t width = round_up(queries, lanes), tokens = p.bias_table.defined() ? window.tokens() : 0;
    const A* head_table = table_of(head);
    window.each_token(0, tokens, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      A* to = scores + n * kBlock;
      const A* from = head_table - bias.position(frame, row, column);
      if (queries != width) store(to + width - lanes, V{});
      // Whole vectors: what is written beyond a run is overwritten by the next.
      for (const Run& run : runs) store(to + run.offset, load(from + run.position));
    });
    for (int64_t n = tokens; n < keys; ++n) {
      for (int64_t i = 0; i < width; i += lanes) store(scores + n * kBlock + i, V{});
    }
  }
};

inline int64_t lse_offset(const TensorView& lse, const Window& window, int64_t head, int64_t frame, int64_t row,
                          int64_t column) {
  return window.sample * lse.stride[0] + head * lse.stride[1] + frame * lse.stride[2] + row * lse.stride[3] +
         column * lse.stride[4];
}

inline void check_tokens(const TensorView& x, const char* name, const TensorView& q) {
  require_view(x, name, q.dtype, q.shape[0], q.shape[1], q.shape[2], q.shape[3], q.shape[4], q.shape[5]);
}

inline void check(const WindowAttentionParams& p) {
  const int64_t *n = p.q.shape, *w = p.window.data();
  const DType wide = p.q.dtype == DType::float64 ? DType::float64 : DType::float32;
  require(p.q.rank == 6, "q must have 6 dimensions");
  check_tokens(p.k, "k", p.q);
  check_tokens(p.v, "v", p.q);
  require_view(p.lse, "lse", wide, n[0], n[4], n[1], n[2], n[3]);
  require(w[0] > 0 && w[1] > 0 && w[2] > 0, "window must be positive");
  if (p.bias_table.defined()) {
    require_view(p.bias_table, "bias_table", wide, n[4], 2 * w[0] - 1, 2 * w[1] - 1, 2 * w[2] - 1);
    require(p.bias_table.contiguous(), "bias_table must be contiguous");
  }
  if (p.q_norm.defined()) require_view(p.q_norm, "q_norm", wide, n[5]);
  if (p.k_norm.defined()) require_view(p.k_norm, "k_norm", wide, n[5]);
  if (p.image.defined()) require_view(p.image, "image", DType::boolean, n[0], n[1]);
  if (!p.context_k.defined()) return;
  const int64_t length = p.context_k.shape[1];
  require_view(p.context_k, "context_k", p.q.dtype, n[0], -1, n[4], n[5]);
  require_view(p.context_v, "context_v", p.q.dtype, n[0], length, n[4], n[5]);
  if (p.context_mask.defined()) require_view(p.context_mask, "context_mask", DType::boolean, n[0], length);
}

// Runs f for the dtype of q with an Attention set up for it.
template <class F>
void with_attention(const WindowAttentionParams& p, F&& f) {
  dispatch_dtype(p.q.dtype, [&](auto tag) {
    using T = decltype(tag);
    const Attention<T> attention(p);
    f(attention);
  });
}

}  // namespace walt::WALT_ISA::window_attention
