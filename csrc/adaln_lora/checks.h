// What the adaln kernels, on the CPU and on the GPU, require of their arguments.
#pragma once

#include "adaln_lora/params.h"
#include "common/checks.h"

namespace walt {

inline void require_tokens(const TensorView& v, const char* name, DType dtype, int64_t B, int64_t N, int64_t D) {
  require_view(v, name, dtype, B, N, D);
  require(D == 1 || v.stride[2] == 1, "rows of tokens need unit stride");
}

inline void require_rows(const TensorView& v, const char* name, DType dtype, int64_t B, int64_t N, int64_t D) {
  require_view(v, name, dtype, B, -1, D);
  require(v.shape[1] > 0 && N % v.shape[1] == 0, "the number of modulation rows must divide the number of tokens");
  require(D == 1 || v.stride[2] == 1, "modulation rows need unit stride");
}

inline void require_dense(const TensorView& view, const char* name) {
  if (!view.contiguous()) throw std::invalid_argument(std::string(name) + " is not contiguous");
}

inline void check(const AdalnForwardParams& p) {
  require(p.x.rank == 3, "x has three dimensions");
  const int64_t B = p.x.shape[0], N = p.x.shape[1], D = p.x.shape[2];
  const bool residual = p.branch.defined(), norm = p.h.defined();
  require(residual || norm, "nothing to compute");
  const DType rows = residual ? p.gate.dtype : p.scale.dtype;
  require_tokens(p.x, "x", p.x.dtype, B, N, D);
  if (residual) {
    require_tokens(p.branch, "branch", p.x.dtype, B, N, D);
    require_rows(p.gate, "gate", rows, B, N, D);
    require_tokens(p.x_new, "x_new", p.x.dtype, B, N, D);
  }
  if (norm) {
    const DType wide = p.x.dtype == DType::float64 ? DType::float64 : DType::float32;
    require_rows(p.shift, "shift", rows, B, N, D);
    require_rows(p.scale, "scale", rows, B, N, D);
    require_tokens(p.h, "h", p.x.dtype, B, N, D);
    require_view(p.mean, "mean", wide, B, N);
    require_view(p.rstd, "rstd", wide, B, N);
    require(p.mean.contiguous() && p.rstd.contiguous(), "mean and rstd are contiguous");
  }
}

inline void check(const AdalnBackwardParams& p) {
  const bool residual = p.branch.defined(), norm = p.grad_h.defined();
  require(norm || (residual && p.grad_x_new.defined()), "nothing to compute");
  const TensorView& shape = norm ? p.grad_h : p.grad_x_new;
  require(shape.rank == 3, "gradients have three dimensions");
  const int64_t B = shape.shape[0], N = shape.shape[1], D = shape.shape[2];
  const DType dtype = shape.dtype, rows = residual ? p.gate.dtype : p.scale.dtype;
  if (p.grad_x_new.defined()) require_tokens(p.grad_x_new, "grad_x_new", dtype, B, N, D);
  if (residual) {
    require_tokens(p.branch, "branch", dtype, B, N, D);
    require_tokens(p.grad_branch, "grad_branch", dtype, B, N, D);
    require_rows(p.gate, "gate", rows, B, N, D);
    require_rows(p.grad_gate, "grad_gate", rows, B, N, D);
  }
  if (norm) {
    const DType wide = dtype == DType::float64 ? DType::float64 : DType::float32;
    require_tokens(p.grad_h, "grad_h", dtype, B, N, D);
    require_tokens(p.x, "x", dtype, B, N, D);
    require_tokens(p.grad_x, "grad_x", dtype, B, N, D);
    require_rows(p.scale, "scale", rows, B, N, D);
    require_rows(p.grad_shift, "grad_shift", rows, B, N, D);
    require_rows(p.grad_scale, "grad_scale", rows, B, N, D);
    require_view(p.mean, "mean", wide, B, N);
    require_view(p.rstd, "rstd", wide, B, N);
    require(p.mean.contiguous() && p.rstd.contiguous(), "mean and rstd are contiguous");
  }
}

inline void check(const LoraForwardParams& p) {
  require(p.down.rank == 3 && p.cond.rank == 2 && p.base.rank == 2,
          "cond and base have two dimensions, down has three");
  const int64_t layers = p.down.shape[0], rank = p.down.shape[1], D = p.down.shape[2];
  const int64_t B = p.cond.shape[0], K = p.base.shape[1];
  const DType dtype = p.cond.dtype, wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  require_view(p.cond, "cond", dtype, B, D);
  require_view(p.base, "base", dtype, B, K);
  require_view(p.down, "down", dtype, layers, rank, D);
  require_view(p.up, "up", dtype, layers, K, rank);
  require_view(p.hidden, "hidden", wide, layers, B, rank);
  require_view(p.out, "out", dtype, layers, B, K);
  for (const TensorView* view : {&p.cond, &p.base, &p.down, &p.up, &p.hidden, &p.out})
    require_dense(*view, "an argument");
}

inline void check(const LoraBackwardParams& p) {
  require(p.down.rank == 3 && p.cond.rank == 2 && p.grad.rank == 3,
          "cond has two dimensions, grad and down have three");
  const int64_t layers = p.down.shape[0], rank = p.down.shape[1], D = p.down.shape[2];
  const int64_t B = p.cond.shape[0], K = p.grad.shape[2];
  const DType dtype = p.cond.dtype, wide = dtype == DType::float64 ? DType::float64 : DType::float32;
  require_view(p.grad, "grad", dtype, layers, B, K);
  require_view(p.hidden, "hidden", wide, layers, B, rank);
  require_view(p.cond, "cond", dtype, B, D);
  require_view(p.up, "up", dtype, layers, K, rank);
  require_view(p.grad_cond, "grad_cond", dtype, B, D);
  require_view(p.grad_base, "grad_base", dtype, B, K);
  require_view(p.grad_down, "grad_down", dtype, layers, rank, D);
  require_view(p.grad_up, "grad_up", dtype, layers, K, rank);
  for (const TensorView* view :
       {&p.grad, &p.hidden, &p.cond, &p.down, &p.up, &p.grad_cond, &p.grad_base, &p.grad_down, &p.grad_up}) {
    require_dense(*view, "an argument");
  }
}

}  // namespace walt
