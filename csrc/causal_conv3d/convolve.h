// Forward and backward data: Winograd's kernel where it is the faster one, the direct kernel for the rest.
#pragma once

#include "causal_conv3d/direct.h"
#include "causal_conv3d/winograd_kernel.h"

namespace walt::WALT_ISA::causal_conv3d {

template <class T>
void convolve(const Convolution& g) {
  const auto winograd = [&](const AxisRun* const run[3]) { return winograd_takes<T>(g.weight, run); };
  WinogradKernel<T>(g, winograd).run();
  DirectKernel<T>(g, [&](const AxisRun* const run[3]) { return !winograd(run); }).run();
}

}  // namespace walt::WALT_ISA::causal_conv3d
