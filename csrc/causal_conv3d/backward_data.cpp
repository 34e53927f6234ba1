// Gradients of x and history: checks, and which positions of grad_y each of theirs reads. The kernels are those of
// forward, in direct/ and winograd/convolve.cpp.
#include "causal_conv3d/convolution.h"
#include "common/checks.h"

namespace walt::WALT_ISA::causal_conv3d {

void backward_data(const ConvBackwardDataParams& p) {
  const TensorView &grad_y = p.grad_y, &weight = p.weight, &shape = p.grad_x;
  const ConvOptions& o = p;
  check(o);
  require(grad_y.rank == 5 && weight.rank == 5 && shape.rank == 5, "grad_y, weight and grad_x must have 5 dimensions");
  require(weight.shape[0] % o.groups == 0, "groups must divide weight's output channels");
  const bool history = p.grad_history.defined() || p.has_history;
  const Axis axes[3] = {time_axis(shape.shape[2], weight.shape[2], o, history),
                        space_axis(1, shape.shape[3], weight.shape[3], o),
                        space_axis(2, shape.shape[4], weight.shape[4], o)};
  require_view(weight, "weight", grad_y.dtype, -1, shape.shape[1] / o.groups, -1, -1, -1);
  require_view(grad_y, "grad_y", shape.dtype, shape.shape[0], weight.shape[0], axes[0].outputs(), axes[1].outputs(),
               axes[2].outputs());
  if (p.grad_history.defined()) {
    require_view(p.grad_history, "grad_history", shape.dtype, shape.shape[0], shape.shape[1], axes[0].before,
                 shape.shape[3], shape.shape[4]);
  }
  const int64_t begin = p.grad_history.defined() ? -axes[0].before : 0, end = shape.data ? shape.shape[2] : 0;
  const TensorView none;
  const WeightView view{&weight, weight.shape[0] / o.groups, shape.shape[1] / o.groups, o.groups, true};
  Convolution convolution{{&grad_y, &none, {}},
                          {backward_runs(axes[0], begin, end, true), backward_runs(axes[1], 0, axes[1].size, false),
                           backward_runs(axes[2], 0, axes[2].size, false)},
                          view,
                          &none,
                          &p.grad_x,
                          &p.grad_history,
                          shape.shape[0],
                          std::max(o.threads, 1)};
  for (int i = 0; i < 3; ++i) convolution.source.map[i] = backward_map(convolution.axes[i], axes[i].outputs());
  convolve(convolution);
}

}  // namespace walt::WALT_ISA::causal_conv3d
