// Gradients of residual + gate + LayerNorm + scale + shift, one pass over the rows of tokens.
//
// The gradients of modulation rows are sums over tokens, in two stages of fixed order: tokens are cut into segments
// that share every modulation row, and those into parts, whose number depends on the shapes alone, not on threads. Each
// part sums into its own row, then the parts are added up in order.
#include <numeric>

#include "adaln_lora/params.h"
#include "adaln_lora/rows.h"
#include "common/parallel.h"

namespace walt::WALT_ISA::adaln_lora {
namespace {

constexpr int64_t kMaxParts = 64;
constexpr int64_t kMinRowsPerPart = 16;
constexpr int64_t kReduceColumns = 512;

template <class T, class M, class A>
struct Row {
  const T *grad_x_new, *grad_h, *x, *branch;  // grad_x_new may be null
  const M *gate, *scale;
  A mean, rstd;
  T *grad_x, *grad_branch;
  A *sum_gate, *sum_shift, *sum_scale;
};

// With g = grad_h * (1 + scale) and xhat the normalised row:
// grad_x = grad_x_new + rstd * (g - mean(g) - xhat * mean(g * xhat)). `scratch` holds two padded rows.
template <bool kResidual, bool kStream, class T, class M, class A>
void norm_row(const Row<T, M, A> r, A* scratch, int64_t width, int64_t D) {
  using V = vector_t<A>;
  A *const g_row = scratch, *const xhat_row = scratch + width;
  V g_sums[kSlots] = {}, gx_sums[kSlots] = {};
  sweep<A>(D, [&](int64_t d, auto piece, int slot) __attribute__((always_inline)) {
    V v = piece.load(r.x + d);
    if constexpr (kResidual) v = v + piece.load(r.gate + d) * piece.load(r.branch + d);
    const V grad_h = piece.load(r.grad_h + d);
    const V xhat = (v - r.mean) * r.rstd, g = grad_h * (1 + piece.load(r.scale + d));
    store(g_row + d, g);
    store(xhat_row + d, xhat);
    store(r.sum_shift + d, load(r.sum_shift + d) + grad_h);
    store(r.sum_scale + d, load(r.sum_scale + d) + grad_h * xhat);
    g_sums[slot] += g;
    gx_sums[slot] += g * xhat;  // beyond the end g is zero
  });
  const A g_mean = sum_slots(g_sums) / static_cast<A>(D), gx_mean = sum_slots(gx_sums) / static_cast<A>(D);

  const auto finish = [&](auto has_grad_x_new) __attribute__((always_inline)) {
    sweep<A, kStream>(D, [&](int64_t d, auto piece, int) __attribute__((always_inline)) {
      V grad = (load(g_row + d) - g_mean - load(xhat_row + d) * gx_mean) * r.rstd;
      if constexpr (has_grad_x_new) grad += piece.load(r.grad_x_new + d);
      piece.store(r.grad_x + d, grad);
      if constexpr (kResidual) {
        piece.store(r.grad_branch + d, grad * piece.load(r.gate + d));
        store(r.sum_gate + d, load(r.sum_gate + d) + grad * piece.load(r.branch + d));
      }
    });
  };
  if (kResidual && r.grad_x_new != nullptr) {
    finish(std::true_type{});
  } else {
    finish(std::false_type{});
  }
}

template <bool kStream, class T, class M, class A>
void residual_row(const Row<T, M, A> r, int64_t D) {
  sweep<A, kStream>(D, [&](int64_t d, auto piece, int) __attribute__((always_inline)) {
    const auto grad = piece.load(r.grad_x_new + d);
    piece.store(r.grad_branch + d, grad * piece.load(r.gate + d));
    store(r.sum_gate + d, load(r.sum_gate + d) + grad * piece.load(r.branch + d));
  });
}

// out[b, f] = sum of the f-th run of partial rows of sample b, for one block of columns.
template <class M, class A>
void reduce_columns(const A* partial, const TensorView& out, int64_t b, int64_t rows, int64_t width, int64_t begin,
                    int64_t end) {
  const int64_t F = out.shape[1], run = rows / F;
  for (int64_t f = 0; f < F; ++f) {
    M* const target = static_cast<M*>(out.data) + b * out.stride[0] + f * out.stride[1];
    const A* const first = partial + (b * rows + f * run) * width;
    sweep<A>(end - begin, [&](int64_t i, auto piece, int) __attribute__((always_inline)) {
      auto sum = load(first + begin + i);
      for (int64_t row = 1; row < run; ++row) sum += load(first + row * width + begin + i);
      piece.store(target + begin + i, sum);
    });
  }
}

template <bool kResidual, bool kNorm, bool kStream, class T, class M>
void backward(const AdalnBackwardParams& p) {
  using A = accumulate_t<T>;
  const TensorView& shape = kNorm ? p.grad_h : p.grad_x_new;
  const int64_t B = shape.shape[0], N = shape.shape[1], D = shape.shape[2];
  const Tokens<const T> grad_x_new(p.grad_x_new), grad_h(p.grad_h), x(p.x), branch(p.branch);
  const Tokens<T> grad_x(p.grad_x), grad_branch(p.grad_branch);
  const Modulation<M> gate(p.gate, N), scale(p.scale, N);
  const A* const mean = static_cast<const A*>(p.mean.data);
  const A* const rstd = static_cast<const A*>(p.rstd.data);

  // Segments: runs of tokens that share every modulation row.
  const TensorView* const sums[] = {&p.grad_gate, &p.grad_shift, &p.grad_scale};
  int64_t segments = 1;
  for (const TensorView* sum : sums) segments = sum->defined() ? std::lcm(segments, sum->shape[1]) : segments;
  const int64_t tokens = N / segments;
  int64_t parts = kMaxParts / (B * segments > 0 ? B * segments : 1);
  parts = parts < tokens / kMinRowsPerPart ? parts : tokens / kMinRowsPerPart;
  parts = parts > 1 ? parts : 1;

  const int threads = threads_for(B * N * D, p.threads);
  const int64_t width = padded<A>(D), rows = segments * parts, size = B * rows * width;
  const Scratch<A> partial(size * 3), scratch(kNorm ? threads * 2 * width : 0);
  parallel_for(B * rows, threads, [&](int64_t task, int thread) {
    const int64_t b = task / rows, segment = task % rows / parts, part = task % parts;
    A* sum_rows[3];
    for (int i = 0; i < 3; ++i) {
      sum_rows[i] = partial.data() + i * size + task * width;
      if (sums[i]->defined()) std::memset(sum_rows[i], 0, static_cast<size_t>(width) * sizeof(A));
    }
    const int64_t end = segment * tokens + part_begin(tokens, parts, part + 1);
    for (int64_t n = segment * tokens + part_begin(tokens, parts, part); n < end; ++n) {
      Row<T, M, A> row{};
      row.sum_gate = sum_rows[0];
      row.sum_shift = sum_rows[1];
      row.sum_scale = sum_rows[2];
      if (grad_x_new.data != nullptr) row.grad_x_new = grad_x_new.row(b, n);
      if constexpr (kResidual) {
        row.branch = branch.row(b, n);
        row.gate = gate.row(b, n);
        row.grad_branch = grad_branch.row(b, n);
      }
      if constexpr (kNorm) {
        row.grad_h = grad_h.row(b, n);
        row.x = x.row(b, n);
        row.scale = scale.row(b, n);
        row.mean = mean[b * N + n];
        row.rstd = rstd[b * N + n];
        row.grad_x = grad_x.row(b, n);
        norm_row<kResidual, kStream>(row, scratch.data() + thread * 2 * width, width, D);
      } else {
        residual_row<kStream>(row, D);
      }
    }
    if (kStream) finish_streaming();
  });

  const int64_t blocks = (D + kReduceColumns - 1) / kReduceColumns;
  parallel_for(B * blocks, threads, [&](int64_t task, int) {
    const int64_t b = task / blocks, begin = task % blocks * kReduceColumns;
    const int64_t end = begin + kReduceColumns < D ? begin + kReduceColumns : D;
    for (int i = 0; i < 3; ++i) {
      if (!sums[i]->defined()) continue;
      reduce_columns<M>(partial.data() + i * size, *sums[i], b, rows, width, begin, end);
    }
  });
}

template <bool kResidual, bool kNorm, class T, class M>
void choose_stores(const AdalnBackwardParams& p) {
  // x, grad_h and grad_x; branch and grad_branch; grad_x_new.
  const int64_t tensors = 3 * kNorm + 2 * kResidual + p.grad_x_new.defined();
  const int64_t bytes = tensors * (kNorm ? p.grad_h : p.grad_x_new).numel() * static_cast<int64_t>(sizeof(T));
  const bool stream = (!kResidual || streams<T>(bytes, p.grad_branch)) && (!kNorm || streams<T>(bytes, p.grad_x));
  stream ? backward<kResidual, kNorm, true, T, M>(p) : backward<kResidual, kNorm, false, T, M>(p);
}

}  // namespace

void adaln_backward(const AdalnBackwardParams& p) {
  check(p);
  const bool residual = p.branch.defined(), norm = p.grad_h.defined();
  const DType dtype = norm ? p.grad_h.dtype : p.grad_x_new.dtype;
  dispatch_modulation(dtype, residual ? p.gate.dtype : p.scale.dtype, [&](auto x_tag, auto rows_tag) {
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
