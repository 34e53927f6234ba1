// Arguments of the adaln kernels. x, branch, h and their gradients are [B, N, D] with any strides over B and N and unit
// stride over D; shift, scale and gate are [B, F, D] with any strides, one row for every N / F consecutive tokens.
#pragma once

#include "common/isa.h"
#include "common/tensor_view.h"

namespace walt {

struct AdalnResidualParams {
  TensorView x, branch, gate, x_new;
  int threads = 1;
};

WALT_DECLARE_KERNEL(adaln_residual, AdalnResidualParams)

}  // namespace walt
