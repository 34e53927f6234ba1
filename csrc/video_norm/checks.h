// What the kernels of video_norm require of their arguments.
#pragma once

#include "common/checks.h"
#include "video_norm/params.h"

namespace walt {

inline bool in_rows(const TensorView& x) { return x.stride[1] == 1 && x.shape[1] > 1; }

template <class Params>
void check_video(const Params& p) {
  require(p.x.rank == 4, "x has four dimensions");
  const int64_t B = p.x.shape[0], C = p.x.shape[1], T = p.x.shape[2], P = p.x.shape[3];
  require(C > 0 && T > 0 && P > 0, "x has channels, frames and pixels");
  require(p.groups > 0 && C % p.groups == 0, "groups must divide the channels");
  require(p.over != Over::pixel || p.groups == 1, "a pixel has one group");
  const DType wide = p.x.dtype == DType::float64 ? DType::float64 : DType::float32;
  const auto check_statistic = [&](const TensorView& v, const char* name) {
    if (p.over == Over::clip) return require_view(v, name, wide, B, p.groups);
    require_view(v, name, wide, B, T, p.over == Over::frame ? p.groups : P);
  };
  check_statistic(p.rstd, "rstd");
  require(p.rstd.contiguous(), "rstd is contiguous");
  require(p.mean.defined() == p.center, "mean is there where the norm centres");
  if (p.center) check_statistic(p.mean, "mean");
  require(!p.center || p.mean.contiguous(), "mean is contiguous");
}

// x, y or a gradient of their size.
inline void require_video(const TensorView& v, const char* name, const TensorView& x) {
  require_view(v, name, x.dtype, x.shape[0], x.shape[1], x.shape[2], x.shape[3]);
  require(in_rows(x) ? v.stride[1] == 1 : v.stride[3] == 1 || v.shape[3] == 1,
          "x, y and gradients have unit stride over the same dimension");
}

// weight, bias, scale and shift, or their gradients.
inline void require_modulation(const TensorView& v, const char* name, const TensorView& x, bool per_sample) {
  if (!v.defined()) return;
  require(v.dtype == x.dtype || (v.dtype == DType::float32 && x.dtype != DType::float64),
          "modulation has the dtype of x, or float32 beside a 16-bit x");
  if (!per_sample) return require_view(v, name, v.dtype, x.shape[1]);
  require_view(v, name, v.dtype, x.shape[0], x.shape[1], -1);
  require(v.shape[2] == 1 || v.shape[2] == x.shape[2], "scale and shift have one row, or one per frame");
}

inline void check_video_norm(const VideoNormForwardParams& p) {
  check_video(p);
  require_video(p.x, "x", p.x);
  require_video(p.y, "y", p.x);
  require_modulation(p.weight, "weight", p.x, false);
  require_modulation(p.bias, "bias", p.x, false);
  require_modulation(p.scale, "scale", p.x, true);
  require_modulation(p.shift, "shift", p.x, true);
}

inline void check_video_norm(const VideoNormBackwardParams& p) {
  check_video(p);
  require_video(p.x, "x", p.x);
  require_video(p.grad_y, "grad_y", p.x);
  if (p.grad_x.defined()) require_video(p.grad_x, "grad_x", p.x);
  for (const auto& [v, name] : {std::pair{&p.weight, "weight"},
                                {&p.bias, "bias"},
                                {&p.grad_weight, "grad_weight"},
                                {&p.grad_bias, "grad_bias"}}) {
    require_modulation(*v, name, p.x, false);
  }
  for (const auto& [v, name] : {std::pair{&p.scale, "scale"},
                                {&p.shift, "shift"},
                                {&p.grad_scale, "grad_scale"},
                                {&p.grad_shift, "grad_shift"}}) {
    require_modulation(*v, name, p.x, true);
  }
}

}  // namespace walt
