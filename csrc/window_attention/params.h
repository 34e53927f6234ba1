// Arguments of the window attention kernels. q, k, v and their gradients are [B, T, H, W, heads, dim] with any strides;
// out is contiguous in that order and lse is [B, heads, T, H, W]. Bias table [heads, 2t-1, 2h-1, 2w-1], norms [dim] and
// their gradients are contiguous in the accumulation type of q. What was left out, and a gradient that is not
// wanted, is an undefined view.
#pragma once

#include <array>

#include "common/isa.h"
#include "common/tensor_view.h"

namespace walt {

struct WindowAttentionParams {
  TensorView q, k, v, bias_table, image, q_norm, k_norm, context_k, context_v, context_mask;
  TensorView out, lse;
  std::array<int64_t, 3> window = {1, 1, 1};
  double norm_eps = 0, scale = 1;
  int threads = 1;
};

struct WindowAttentionBackwardParams : WindowAttentionParams {
  TensorView grad_out, grad_q, grad_k, grad_v, grad_bias_table, grad_q_norm, grad_k_norm, grad_context_k,
      grad_context_v;
};

WALT_DECLARE_KERNEL(window_attention, forward, WindowAttentionParams)
WALT_DECLARE_KERNEL(window_attention, backward, WindowAttentionBackwardParams)

}  // namespace walt
