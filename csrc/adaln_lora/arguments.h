// The arguments of the adaln kernels by name, for the CPU (which also takes `threads`) and the GPU.
#pragma once

#include "adaln_lora/params.h"
#include "common/bind.h"

namespace walt {

inline Arguments<AdalnForwardParams> adaln_forward_arguments() {
  using P = AdalnForwardParams;
  return Arguments<P>()
      .required({{"x", &P::x}, {"eps", &P::eps}})
      .optional({{"branch", &P::branch}, {"gate", &P::gate}, {"shift", &P::shift}, {"scale", &P::scale}})
      .optional({{"x_new", &P::x_new}, {"h", &P::h}, {"mean", &P::mean}, {"rstd", &P::rstd}});
}

inline Arguments<AdalnBackwardParams> adaln_backward_arguments() {
  using P = AdalnBackwardParams;
  return Arguments<P>()
      .optional({{"grad_x_new", &P::grad_x_new}, {"grad_h", &P::grad_h}, {"x", &P::x}, {"branch", &P::branch}})
      .optional({{"gate", &P::gate}, {"scale", &P::scale}, {"mean", &P::mean}, {"rstd", &P::rstd}})
      .optional({{"grad_x", &P::grad_x}, {"grad_branch", &P::grad_branch}, {"grad_gate", &P::grad_gate}})
      .optional({{"grad_shift", &P::grad_shift}, {"grad_scale", &P::grad_scale}});
}

inline Arguments<LoraForwardParams> lora_forward_arguments() {
  using P = LoraForwardParams;
  return Arguments<P>()
      .required({{"cond", &P::cond}, {"base", &P::base}, {"down", &P::down}, {"up", &P::up}})
      .required({{"hidden", &P::hidden}, {"out", &P::out}});
}

inline Arguments<LoraBackwardParams> lora_backward_arguments() {
  using P = LoraBackwardParams;
  return Arguments<P>()
      .required({{"grad", &P::grad}, {"hidden", &P::hidden}, {"cond", &P::cond}, {"down", &P::down}, {"up", &P::up}})
      .required({{"grad_cond", &P::grad_cond}, {"grad_base", &P::grad_base}})
      .required({{"grad_down", &P::grad_down}, {"grad_up", &P::grad_up}});
}

}  // namespace walt
