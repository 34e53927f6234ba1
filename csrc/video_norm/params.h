// Arguments of video_norm's kernels. x, y and gradients of their size are [B, C, T, P], P the pixels of a frame, with
// unit stride over C (rows of channels) or over P (planes of pixels), all alike, and any other strides. weight, bias
// and their gradients are [C], scale, shift and their gradients [B, C, F], F 1 or T, with any strides. mean and rstd
// are [B, T, groups] over a frame, [B, groups] over a clip and [B, T, P] over a pixel, contiguous, in the accumulation
// type. What was left out is an undefined view.
#pragma once

#include "common/isa.h"
#include "common/tensor_view.h"

namespace walt {

enum class Over : int { frame, clip, pixel };

struct VideoNormOptions {
  Over over = Over::frame;
  int64_t groups = 1;
  bool center = true, silu = false;
  int threads = 1;
};

// y = act((x - mean) * rstd * gain + offset), gain = weight * (1 + scale), offset = bias * (1 + scale) + shift
struct VideoNormForwardParams : VideoNormOptions {
  TensorView x, weight, bias, scale, shift;
  TensorView y, mean, rstd;
  double eps = 0;
};

struct VideoNormBackwardParams : VideoNormOptions {
  TensorView grad_y, x, weight, bias, scale, shift, mean, rstd;
  TensorView grad_x, grad_weight, grad_bias, grad_scale, grad_shift;
};

WALT_DECLARE_KERNEL(video_norm, forward, VideoNormForwardParams)
WALT_DECLARE_KERNEL(video_norm, backward, VideoNormBackwardParams)

}  // namespace walt
