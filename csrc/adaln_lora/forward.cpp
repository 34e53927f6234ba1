// Residual + gate, LayerNorm, scale and shift: one pass over memory, a row at a time.
#include "adaln_lora/params.h"
#include "adaln_lora/rows.h"
#include "common/parallel.h"

namespace walt::WALT_ISA::adaln_lora {
namespace {

template <bool kStream, class T, class M>
void residual_row(const T* x, const T* branch, const M* gate, T* x_new, int64_t D) {
  sweep<accumulate_t<T>, kStream>(D, [&](int64_t d, auto piece, int) __attribute__((always_inline)) {
    piece.store(x_new + d, piece.load(x + d) + piece.load(gate + d) * piece.load(branch + d));
  });
}

template <class A>
struct Statistics {
  A mean, rstd;
};

// `row` is scratch for D elements, padded: the unrounded x_new stays there between the passes over it.
template <bool kResidual, bool kStream, class T, class M, class A>
Statistics<A> norm_row(const T* x, const T* branch, const M* gate, const M* shift, const M* scale, T* x_new, T* h,
                       A* row, int64_t D, A eps) {
  using V = vector_t<A>;
  V sums[kSlots] = {};
  sweep<A, kStream>(D, [&](int64_t d, auto piece, int slot) __attribute__((always_inline)) {
    V v = piece.load(x + d);
    if constexpr (kResidual) {
      v = v + piece.load(gate + d) * piece.load(branch + d);
      piece.store(x_new + d, v);
    }
    store(row + d, v);
    sums[slot] += v;
  });
  const A mean = sum_slots(sums) / static_cast<A>(D);

  V squares[kSlots] = {};
  sweep<A>(D, [&](int64_t d, auto piece, int slot) __attribute__((always_inline)) {
    const V centred = piece.keep(load(row + d) - mean);
    squares[slot] += centred * centred;
  });
  const A rstd = 1 / std::sqrt(sum_slots(squares) / static_cast<A>(D) + eps);

  sweep<A, kStream>(D, [&](int64_t d, auto piece, int) __attribute__((always_inline)) {
    const V normal = (load(row + d) - mean) * rstd;
    piece.store(h + d, normal * (1 + piece.load(scale + d)) + piece.load(shift + d));
  });
  return {mean, rstd};
}

template <bool kResidual, bool kNorm, bool kStream, class T, class M>
void forward(const AdalnForwardParams& p) {
  using A = accumulate_t<T>;
  const int64_t B = p.x.shape[0], N = p.x.shape[1], D = p.x.shape[2];
  const Tokens<const T> x(p.x), branch(p.branch);
  const Tokens<T> x_new(p.x_new), h(p.h);
  const Modulation<M> gate(p.gate, N), shift(p.shift, N), scale(p.scale, N);
  A* const mean = static_cast<A*>(p.mean.data);
  A* const rstd = static_cast<A*>(p.rstd.data);

  const int64_t rows = B * N, rows_per_task = kGrain / D + 1;
  const int64_t width = padded<A>(D);
  const Scratch<A> scratch(kNorm ? p.threads * width : 0);
  parallel_for((rows + rows_per_task - 1) / rows_per_task, p.threads, [&](int64_t task, int thread) {
    const int64_t end = (task + 1) * rows_per_task < rows ? (task + 1) * rows_per_task : rows;
    for (int64_t i = task * rows_per_task; i < end; ++i) {
      const int64_t b = i / N, n = i % N;
      if constexpr (kNorm) {
        const auto [m, r] = norm_row<kResidual, kStream>(
            x.row(b, n), kResidual ? branch.row(b, n) : nullptr, kResidual ? gate.row(b, n) : nullptr, shift.row(b, n),
            scale.row(b, n), kResidual ? x_new.row(b, n) : nullptr, h.row(b, n), scratch.data() + thread * width, D,
            static_cast<A>(p.eps));
        mean[i] = m;
        rstd[i] = r;
      } else {
        residual_row<kStream>(x.row(b, n), branch.row(b, n), gate.row(b, n), x_new.row(b, n), D);
      }
    }
    if (kStream) finish_streaming();
  });
}

template <bool kResidual, bool kNorm, class T, class M>
void choose_stores(const AdalnForwardParams& p) {
  constexpr int64_t tensors = 1 + 2 * kResidual + kNorm;  // x, branch and x_new, h
  const bool stream = (!kResidual || streams<T>(tensors * p.x.numel() * sizeof(T), p.x_new)) &&
                      (!kNorm || streams<T>(tensors * p.x.numel() * sizeof(T), p.h));
  stream ? forward<kResidual, kNorm, true, T, M>(p) : forward<kResidual, kNorm, false, T, M>(p);
}

}  // namespace

void adaln_forward(const AdalnForwardParams& p) {
  check(p);
  const bool residual = p.branch.defined(), norm = p.h.defined();
  dispatch_modulation(p.x.dtype, residual ? p.gate.dtype : p.scale.dtype, [&](auto x_tag, auto rows_tag) {
    using T = decltype(x_tag);
    using M = decltype(rows_tag);
    if (residual && norm) {
      choose_stores<true, true, T, M>(p);
    } else if (norm) {
      choose_stores<false, true, T, M>(p);
    } else {
      choose_stores<true, false, T, M>(p);
    }
  });
}

}  // namespace walt::WALT_ISA::adaln_lora
