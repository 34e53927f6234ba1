// Arguments of causal_conv3d's kernels. x is [B, C, T, H, W], weight [C_out, C / groups, kt, kh, kw], history
// [B, C, (kt - 1) * dilation_t, H, W], y [B, C_out, T', H', W'], all with any strides. What was left out is an
// undefined view.
#pragma once

#include <array>

#include "common/isa.h"
#include "common/tensor_view.h"

namespace walt {

enum class TimePadding : int { zeros, first_frame };
enum class SpacePadding : int { zeros, replicate, reflect };

struct ConvOptions {
  std::array<int64_t, 3> stride = {1, 1, 1};    // time, height, width
  std::array<int64_t, 3> dilation = {1, 1, 1};  // time, height, width
  std::array<int64_t, 4> padding = {};          // top, bottom, left, right
  TimePadding time_padding = TimePadding::zeros;
  SpacePadding space_padding = SpacePadding::zeros;
  int64_t groups = 1;
  int threads = 1;
};

struct ConvForwardParams : ConvOptions {
  TensorView x, weight, bias, history, y;
};

// grad_x has x's shape; its address is null when only the history's gradient is wanted. grad_history may be undefined.
struct ConvBackwardDataParams : ConvOptions {
  TensorView grad_y, weight, grad_x, grad_history;
  bool has_history = false;  // without one, frames before 0 give their gradient to frame 0 or to nobody
};

// grad_weight or grad_bias may be undefined.
struct ConvBackwardWeightParams : ConvOptions {
  TensorView grad_y, x, history, grad_weight, grad_bias;
  std::array<int64_t, 3> kernel;  // time, height, width
};

WALT_DECLARE_KERNEL(causal_conv3d, forward, ConvForwardParams)
WALT_DECLARE_KERNEL(causal_conv3d, backward_data, ConvBackwardDataParams)
WALT_DECLARE_KERNEL(causal_conv3d, backward_weight, ConvBackwardWeightParams)

}  // namespace walt
