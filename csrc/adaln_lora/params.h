// Arguments of the adaln kernels. Tensors over tokens (x, branch, h and their gradients) are [B, N, D] with any strides
// over B and N and unit stride over D. Modulation rows (shift, scale, gate and their gradients) are [B, F, D], F may
// differ between them; one row belongs to N / F consecutive tokens. What a pass does not need stays undefined.
#pragma once

#include "common/isa.h"
#include "common/tensor_view.h"

namespace walt {

// x_new = x + gate * branch (without branch: x);  h = (x_new - mean) * rstd * (1 + scale) + shift.
struct AdalnForwardParams {
  TensorView x, branch, gate, shift, scale;
  TensorView x_new, h, mean, rstd;
  double eps = 0;
  int threads = 1;
};

// Gradients of the above. Without grad_h the norm took no part: then x, scale, mean, rstd and grad_x are undefined too.
struct AdalnBackwardParams {
  TensorView grad_x_new, grad_h, x, branch, gate, scale, mean, rstd;
  TensorView grad_x, grad_branch, grad_gate, grad_shift, grad_scale;
  int threads = 1;
};

// hidden[l] = down[l] cond;  out[l] = base + up[l] hidden[l]. All contiguous: cond [B, D], base [B, K],
// down [layers, r, D], up [layers, K, r], hidden [layers, B, r] in the accumulation type, out [layers, B, K].
struct LoraForwardParams {
  TensorView cond, base, down, up;
  TensorView hidden, out;
  int threads = 1;
};

struct LoraBackwardParams {
  TensorView grad, hidden, cond, down, up;
  TensorView grad_cond, grad_base, grad_down, grad_up;
  int threads = 1;
};

WALT_DECLARE_KERNEL(adaln_lora, adaln_forward, AdalnForwardParams)
WALT_DECLARE_KERNEL(adaln_lora, adaln_backward, AdalnBackwardParams)
WALT_DECLARE_KERNEL(adaln_lora, lora_forward, LoraForwardParams)
WALT_DECLARE_KERNEL(adaln_lora, lora_backward, LoraBackwardParams)

}  // namespace walt
