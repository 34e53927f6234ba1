// Forward: checks, and which positions of x each output reads. direct/ and winograd/convolve.cpp hold the kernels.
#include "causal_conv3d/convolution.h"
#include "common/checks.h"

namespace walt::WALT_ISA::causal_conv3d {

void forward(const ConvForwardParams& p) {
  const TensorView &x = p.x, &weight = p.weight, &y = p.y;
  const ConvOptions& o = p;
  check(o);
  require(x.rank == 5 && weight.rank == 5, "x and weight must have 5 dimensions");
  require(weight.shape[0] % o.groups == 0, "groups must divide weight's output channels");
  const Axis axes[3] = {time_axis(x.shape[2], weight.shape[2], o, p.history.defined()),
                        space_axis(1, x.shape[3], weight.shape[3], o), space_axis(2, x.shape[4], weight.shape[4], o)};
  require_view(weight, "weight", x.dtype, -1, x.shape[1] / o.groups, -1, -1, -1);
  require_view(y, "y", x.dtype, x.shape[0], weight.shape[0], axes[0].outputs(), axes[1].outputs(), axes[2].outputs());
  if (p.bias.defined()) require_view(p.bias, "bias", x.dtype, weight.shape[0]);
  if (p.history.defined()) {
    require_view(p.history, "history", x.dtype, x.shape[0], x.shape[1], axes[0].before, x.shape[3], x.shape[4]);
  }
  const TensorView none;
  const WeightView view{&weight, x.shape[1] / o.groups, weight.shape[0] / o.groups, o.groups, false};
  const Convolution convolution{
      {&x, &p.history, {forward_map(axes[0]), forward_map(axes[1]), forward_map(axes[2])}},
      {forward_runs(axes[0], true), forward_runs(axes[1], false), forward_runs(axes[2], false)},
      view,
      &p.bias,
      &y,
      &none,
      x.shape[0],
      std::max(o.threads, 1)};
  convolve(convolution);
}

}  // namespace walt::WALT_ISA::causal_conv3d
