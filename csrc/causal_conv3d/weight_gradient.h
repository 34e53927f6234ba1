// What both methods of backward weight share: how a panel of gradients is written, to any strides.
#pragma once

#include "causal_conv3d/params.h"
#include "causal_conv3d/patch.h"

namespace walt::WALT_ISA::causal_conv3d {

// Whether Winograd's method computes these gradients; and the two methods, in the folders of their names.
bool winograd_pays(const ConvBackwardWeightParams&, const Axis (&axes)[3]);
void winograd_backward_weight(const ConvBackwardWeightParams&, const Axis (&axes)[3]);
void direct_backward_weight(const ConvBackwardWeightParams&, const Axis (&axes)[3]);

constexpr int64_t kStoreChannels = 16;  // at a time: long runs of memory from little scratch

// Writes rows[channel][tap][width]: `channels` input channels from `channel` on (counted inside the group) against
// `count` <= width output channels from `out_channel` on.
template <class T, class A>
void store_weight_gradient(const ConvBackwardWeightParams& p, const A* rows, int64_t width, int64_t out_channel,
                           int64_t count, int64_t channel, int64_t channels) {
  const TensorView& weight = p.grad_weight;
  const int64_t *kernel = p.kernel.data(), *stride = weight.stride;
  const int64_t taps = kernel[0] * kernel[1] * kernel[2];
  T* to = static_cast<T*>(weight.data) + out_channel * stride[0] + channel * stride[1];
  if (stride[4] == 1 && stride[3] == kernel[2] && stride[2] == kernel[1] * kernel[2]) {
    const bool dense = stride[1] == taps;
    for (int64_t c = 0; c < (dense ? 1 : channels); ++c) {
      copy_transposed(rows + c * taps * width, width, to + c * stride[1], stride[0], dense ? channels * taps : taps,
                      count);
    }
    return;
  }
  for (int64_t i = 0; i < taps; ++i, rows += width) {
    T* at = to + i / (kernel[1] * kernel[2]) * stride[2] + i / kernel[2] % kernel[1] * stride[3] +
            i % kernel[2] * stride[4];
    if (stride[1] == 1) {
      copy_transposed(rows, taps * width, at, stride[0], channels, count);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t n = 0; n < count; ++n) {
        at[n * stride[0] + c * stride[1]] = from_float<T>(rows[c * taps * width + n]);
      }
    }
  }
}

}  // namespace walt::WALT_ISA::causal_conv3d
