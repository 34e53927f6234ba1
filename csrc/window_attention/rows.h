// Rows of one head: loading from any strides, LayerNorm and its backward, and packing into units.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"
#include "window_attention/gemm.h"

namespace walt::WALT_ISA::window_attention {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Sizes of a head's rows in scratch: `padded` numbers are stored (zeros beyond dim), `vectors` of them are computed.
template <class A>
struct RowShape {
  int64_t dim, vectors, padded, ld;

  explicit RowShape(int64_t head_dim) : dim(head_dim) {
    constexpr int lanes = kLanes<A>;
    vectors = (dim + lanes - 1) / lanes;
    padded = round_up(dim, 2 * lanes);  // pairs of bfloat16 are packed two vectors at a time
    ld = padded + lanes;                // an odd number of vectors, so that a column spreads over all cache sets
  }
};

// Asks for the row that will be read next but a few: the same column of the next row of the window. Rows of one head
// lie far apart in memory, where the processor does not foresee them. An address outside of the tensor does no harm.
template <class T>
inline void prefetch_row(const T* x, int64_t dim) {
  const char* line = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(line + i);
}

template <class T>
inline void load_row(const T* x, int64_t stride, const RowShape<accumulate_t<T>>& shape, accumulate_t<T>* row) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>;
  const int64_t dim = shape.dim;
  for (int64_t d = dim / lanes * lanes; d < shape.padded; d += lanes) store(row + d, vector_t<A>{});
  if (stride != 1) {
    for (int64_t d = 0; d < dim; ++d) row[d] = to_float(x[d * stride]);
  } else if (dim < lanes) {
    store(row, load_partial(x, dim));
  } else {
    for (int64_t d = 0; d + lanes <= dim; d += lanes) store(row + d, load(x + d));
    store(row + dim - lanes, load(x + dim - lanes));  // the last vector overlaps the one before
  }
}

template <class T>
inline void store_row(T* x, int64_t stride, int64_t dim, const accumulate_t<T>* row) {
  constexpr int lanes = kLanes<accumulate_t<T>>;
  if (stride != 1) {
    for (int64_t d = 0; d < dim; ++d) x[d * stride] = from_float<T>(row[d]);
  } else if (dim < lanes) {
    store_partial(x, load(row), dim);
  } else {
    for (int64_t d = 0; d + lanes <= dim; d += lanes) store(x + d, load(row + d));
    store(x + dim - lanes, load(row + dim - lanes));
  }
}

// Copies a row bit by bit.
template <class T>
inline void copy_row(const T* from, int64_t from_stride, T* to, int64_t to_stride, int64_t dim) {
  if (from_stride == 1 && to_stride == 1) {
    std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(T));
  } else {
    for (int64_t d = 0; d < dim; ++d) to[d * to_stride] = from[d * from_stride];
  }
}

template <class A>
inline void scale_row(A* row, A factor, int64_t vectors) {
  for (int64_t i = 0; i < vectors * kLanes<A>; i += kLanes<A>) store(row + i, load(row + i) * broadcast(factor));
}

// LayerNorm over a row, without bias, times a weight; without a weight it does nothing.
template <class A>
class RowNorm {
  using V = vector_t<A>;
  static constexpr int lanes = kLanes<A>;

 public:
  RowNorm(const TensorView& weight, double eps, const RowShape<A>& shape)
      : defined_(weight.defined()), eps_(static_cast<A>(eps)), shape_(shape), weight_(2 * shape.padded) {
    for (int64_t d = 0; d < shape.padded; ++d) {
      const bool inside = d < shape.dim;
      weight_[d] = inside && defined_ ? static_cast<const A*>(weight.data)[d] : 0;
      weight_[shape.padded + d] = inside ? 1 : 0;
    }
  }

  bool defined() const { return defined_; }

  // Normalises in place; mean and reciprocal standard deviation go to stats[0..1].
  void forward(A* row, A* stats) const {
    if (!defined()) return;
    V sum{};
    for (int64_t i = 0; i < shape_.vectors; ++i) sum += load(row + i * lanes);
    const A mean = reduce_add(sum) / static_cast<A>(shape_.dim);
    V squares{};
    for (int64_t i = 0; i < shape_.vectors; ++i) {
      const V centred = keep(load(row + i * lanes) - broadcast(mean), i);
      squares += centred * centred;
    }
    const A rstd = 1 / std::sqrt(reduce_add(squares) / static_cast<A>(shape_.dim) + eps_);
    for (int64_t i = 0; i < shape_.vectors; ++i) {
      store(row + i * lanes, (load(row + i * lanes) - broadcast(mean)) * broadcast(rstd) * weight(i));
    }
    stats[0] = mean;
    stats[1] = rstd;
  }

  // The gradient of the row, in place, from its gradient after the norm and x, the row before it; adds to grad_weight.
  void backward(A* grad, const A* x, const A* stats, A* grad_weight) const {
    if (!defined()) return;
    const V mean = broadcast(stats[0]), rstd = broadcast(stats[1]);
    V sum{}, product{};
    for (int64_t i = 0; i < shape_.vectors; ++i) {
      const V normal = (load(x + i * lanes) - mean) * rstd, d = load(grad + i * lanes);
      store(grad_weight + i * lanes, load(grad_weight + i * lanes) + d * normal);
      const V scaled = d * weight(i);
      sum += scaled;
      product += scaled * normal;
    }
    const V mean_sum = broadcast(reduce_add(sum) / static_cast<A>(shape_.dim));
    const V mean_product = broadcast(reduce_add(product) / static_cast<A>(shape_.dim));
    for (int64_t i = 0; i < shape_.vectors; ++i) {
      const V normal = (load(x + i * lanes) - mean) * rstd;
      store(grad + i * lanes, rstd * (load(grad + i * lanes) * weight(i) - mean_sum - normal * mean_product));
    }
  }

 private:
  V weight(int64_t i) const { return load(weight_.data() + i * lanes); }
  // Zero in the lanes beyond dim.
  V keep(V v, int64_t i) const { return v * load(weight_.data() + shape_.padded + i * lanes); }

  bool defined_;
  A eps_;
  RowShape<A> shape_;
  Scratch<A> weight_;  // then ones; both zero beyond dim
};

// ---- packing into units ---------------------------------------------------------------------------------------------

// Units along the row: row[0..n) -> n / kStep units; n is a multiple of 2 * lanes.
template <class A>
inline void pack_along(PlainUnits<A>, const A* row, A* units, int64_t n) {
  if (units == row) return;
  for (int64_t i = 0; i < n; i += kLanes<A>) store(units + i, load(row + i));
}
// Units across rows: kStep rows, `ld` apart -> one row of n units.
template <class A>
inline void pack_across(PlainUnits<A>, const A* rows, int64_t, A* units, int64_t n) {
  pack_along(PlainUnits<A>{}, rows, units, n);
}

#ifdef WALT_HAS_BF16_DOT
inline void pack_along(Bf16Pairs, const float* row, int32_t* units, int64_t n) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < n; i += 2 * lanes) {
    store(units + i / 2, round_bf16(load(row + i), load(row + i + lanes)));
  }
}
inline void pack_across(Bf16Pairs, const float* rows, int64_t ld, int32_t* units, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    store(units + i, pair_bf16(load(rows + i), load(rows + ld + i)));
  }
}
#endif

// out[c][r] = in[r][c] for `rows` (a multiple of the lanes of a Unit) and `columns`, whose rows may be read up to the
// next multiple of the lanes.
template <class Unit>
inline void transpose_units(const Unit* in, int64_t ldi, Unit* out, int64_t ldo, int64_t rows, int64_t columns) {
  using V = decltype(load(in));
  constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(Unit));
  for (int64_t c = 0; c < columns; c += lanes) {
    for (int64_t r = 0; r < rows; r += lanes) {
      V block[lanes];
      for (int i = 0; i < lanes; ++i) block[i] = load(in + (r + i) * ldi + c);
      transpose(block);
      const int count = static_cast<int>(columns - c < lanes ? columns - c : lanes);
      for (int i = 0; i < count; ++i) store(out + (c + i) * ldo + r, block[i]);
    }
  }
}

}  // namespace walt::WALT_ISA::window_attention
