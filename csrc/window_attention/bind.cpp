// The kernels of params.h as functions of the module, and the names of their arguments.
#include "common/bind.h"

#include "window_attention/params.h"

namespace walt {
namespace {

// What both passes take.
template <class P>
Arguments<P> inputs() {
  return Arguments<P>()
      .required({{"q", &P::q}, {"k", &P::k}, {"v", &P::v}, {"out", &P::out}, {"lse", &P::lse}})
      .required({{"window", &P::window}, {"norm_eps", &P::norm_eps}, {"scale", &P::scale}, {"threads", &P::threads}})
      .optional({{"bias_table", &P::bias_table}, {"image", &P::image}, {"q_norm", &P::q_norm}, {"k_norm", &P::k_norm}})
      .optional({{"context_k", &P::context_k}, {"context_v", &P::context_v}, {"context_mask", &P::context_mask}});
}

const Binding binding([](py::module_& m) {
  using F = WindowAttentionParams;
  define(m, "window_attention", inputs<F>(), WALT_KERNEL(window_attention::forward));

  using B = WindowAttentionBackwardParams;
  define(m, "window_attention_backward",
         inputs<B>()
             .required({{"grad_out", &B::grad_out}})
             .optional({{"grad_q", &B::grad_q}, {"grad_k", &B::grad_k}, {"grad_v", &B::grad_v}})
             .optional({{"grad_bias_table", &B::grad_bias_table}, {"grad_q_norm", &B::grad_q_norm}})
             .optional({{"grad_k_norm", &B::grad_k_norm}, {"grad_context_k", &B::grad_context_k}})
             .optional({{"grad_context_v", &B::grad_context_v}}),
         WALT_KERNEL(window_attention::backward));
});

}  // namespace
}  // namespace walt
