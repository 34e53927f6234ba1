// The kernels of params.h as functions of the module, and the names of their arguments.
#include "common/bind.h"

#include "causal_conv3d/params.h"
#include "common/checks.h"

namespace walt {

void read(py::handle value, TimePadding& padding) {
  const auto name = value.cast<std::string>();
  require(name == "zeros" || name == "first_frame", "time_padding must be zeros or first_frame");
  padding = name == "zeros" ? TimePadding::zeros : TimePadding::first_frame;
}

void read(py::handle value, SpacePadding& padding) {
  const auto name = value.cast<std::string>();
  require(name == "zeros" || name == "replicate" || name == "reflect",
          "space_padding must be zeros, replicate or reflect");
  padding = name == "zeros"       ? SpacePadding::zeros
            : name == "replicate" ? SpacePadding::replicate
                                  : SpacePadding::reflect;
}

namespace {

template <class P>
Arguments<P> options() {
  return Arguments<P>()
      .required({{"stride", &P::stride}, {"dilation", &P::dilation}, {"padding", &P::padding}})
      .required({{"time_padding", &P::time_padding}, {"space_padding", &P::space_padding}})
      .required({{"groups", &P::groups}, {"threads", &P::threads}});
}

const Binding binding([](py::module_& m) {
  using F = ConvForwardParams;
  define(m, "causal_conv3d",
         options<F>()
             .required({{"x", &F::x}, {"weight", &F::weight}, {"y", &F::y}})
             .optional({{"bias", &F::bias}, {"history", &F::history}}),
         WALT_KERNEL(causal_conv3d::forward));

  using D = ConvBackwardDataParams;
  define(m, "causal_conv3d_backward_data",
         options<D>()
             .required({{"grad_y", &D::grad_y}, {"weight", &D::weight}, {"grad_x", &D::grad_x}})
             .required({{"has_history", &D::has_history}})
             .optional({{"grad_history", &D::grad_history}}),
         WALT_KERNEL(causal_conv3d::backward_data));

  using W = ConvBackwardWeightParams;
  define(m, "causal_conv3d_backward_weight",
         options<W>()
             .required({{"grad_y", &W::grad_y}, {"x", &W::x}, {"kernel", &W::kernel}})
             .optional({{"history", &W::history}, {"grad_weight", &W::grad_weight}, {"grad_bias", &W::grad_bias}}),
         WALT_KERNEL(causal_conv3d::backward_weight));
});

}  // namespace
}  // namespace walt
