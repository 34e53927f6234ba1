// Gradients of weight and bias: checks. direct/ and winograd/backward_weight.cpp hold the kernels.
#include "causal_conv3d/weight_gradient.h"
#include "common/checks.h"

namespace walt::WALT_ISA::causal_conv3d {

void backward_weight(const ConvBackwardWeightParams& p) {
  const TensorView &x = p.x, &grad_y = p.grad_y;
  const ConvOptions& o = p;
  check(o);
  require(x.rank == 5 && grad_y.rank == 5, "x and grad_y must have 5 dimensions");
  require(x.shape[1] % o.groups == 0 && grad_y.shape[1] % o.groups == 0,
          "groups must divide the channels of x and grad_y");
  const Axis axes[3] = {time_axis(x.shape[2], p.kernel[0], o, p.history.defined()),
                        space_axis(1, x.shape[3], p.kernel[1], o), space_axis(2, x.shape[4], p.kernel[2], o)};
  const int64_t in_channels = x.shape[1] / o.groups;
  require_view(grad_y, "grad_y", x.dtype, x.shape[0], -1, axes[0].outputs(), axes[1].outputs(), axes[2].outputs());
  if (p.grad_weight.defined()) {
    require_view(p.grad_weight, "grad_weight", x.dtype, grad_y.shape[1], in_channels, p.kernel[0], p.kernel[1],
                 p.kernel[2]);
  }
  if (p.grad_bias.defined()) require_view(p.grad_bias, "grad_bias", x.dtype, grad_y.shape[1]);
  if (p.history.defined()) {
    require_view(p.history, "history", x.dtype, x.shape[0], x.shape[1], axes[0].before, x.shape[3], x.shape[4]);
  }
  winograd_pays(p, axes) ? winograd_backward_weight(p, axes) : direct_backward_weight(p, axes);
}

}  // namespace walt::WALT_ISA::causal_conv3d
