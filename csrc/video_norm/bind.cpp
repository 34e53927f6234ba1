// The kernels of params.h as functions of the module, and the names of their arguments.
#include "common/bind.h"

#include "common/checks.h"
#include "video_norm/params.h"

namespace walt {

void read(py::handle value, Over& over) {
  const auto name = value.cast<std::string>();
  require(name == "frame" || name == "clip" || name == "pixel", "over must be frame, clip or pixel");
  over = name == "frame" ? Over::frame : name == "clip" ? Over::clip : Over::pixel;
}

namespace {

template <class P>
Arguments<P> inputs() {
  return Arguments<P>()
      .required({{"x", &P::x}, {"rstd", &P::rstd}, {"over", &P::over}, {"groups", &P::groups}})
      .required({{"center", &P::center}, {"silu", &P::silu}, {"threads", &P::threads}})
      .optional({{"weight", &P::weight}, {"bias", &P::bias}, {"scale", &P::scale}, {"shift", &P::shift}})
      .optional({{"mean", &P::mean}});
}

const Binding binding([](py::module_& m) {
  using F = VideoNormForwardParams;
  define(m, "video_norm", inputs<F>().required({{"y", &F::y}, {"eps", &F::eps}}), WALT_KERNEL(video_norm::forward));

  using G = VideoNormBackwardParams;
  define(m, "video_norm_backward",
         inputs<G>()
             .required({{"grad_y", &G::grad_y}})
             .optional({{"grad_x", &G::grad_x}, {"grad_weight", &G::grad_weight}, {"grad_bias", &G::grad_bias}})
             .optional({{"grad_scale", &G::grad_scale}, {"grad_shift", &G::grad_shift}}),
         WALT_KERNEL(video_norm::backward));
});

}  // namespace
}  // namespace walt
