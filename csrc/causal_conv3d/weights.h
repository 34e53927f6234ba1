// How both methods read weights: as forward or as backward data, a chunk of channels at a time.
#pragma once

#include "causal_conv3d/micro_kernels.h"
#include "causal_conv3d/patch.h"
#include "common/parallel.h"

namespace walt::WALT_ISA::causal_conv3d {

// How weights are read: forward sums over input channels, backward data over output channels with the kernel's last
// axis reversed. Channel counts are per group.
struct WeightView {
  const TensorView* weight;
  int64_t in_channels, out_channels, groups;  // of the sum, of the result
  bool transposed;

  int64_t kernel(int axis) const { return weight->shape[2 + axis]; }
  int64_t taps() const { return kernel(0) * kernel(1) * kernel(2); }
  int64_t in_stride() const { return weight->stride[transposed ? 0 : 1]; }
  int64_t out_stride() const { return weight->stride[transposed ? 1 : 0]; }
  int64_t group_offset(int64_t g) const { return g * (transposed ? in_channels : out_channels) * weight->stride[0]; }
  // Where tap i of the packed order lies in the tensor.
  int64_t tap_offset(int64_t i) const {
    const int64_t w = i % kernel(2), h = i / kernel(2) % kernel(1), t = i / kernel(2) / kernel(1);
    return t * weight->stride[2] + h * weight->stride[3] + (transposed ? kernel(2) - 1 - w : w) * weight->stride[4];
  }
};

constexpr int64_t kChunkBytes = 256;  // of one pixel in a patch

// Channels [begin, end) of chunk i when `channels` are cut into nearly equal chunks of whole `step`s.
struct Chunks {
  int64_t channels, step, count;
  Chunks(int64_t channels, int64_t step, int64_t limit)
      : channels(channels), step(step), count((channels + limit - 1) / limit) {}
  int64_t begin(int64_t i) const {
    return std::min(part_begin((channels + step - 1) / step, count, i) * step, channels);
  }
  int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t pitch(int64_t i) const { return (size(i) + step - 1) / step * step; }  // with padding
  int64_t widest() const { return ((channels + step - 1) / step + count - 1) / count * step; }
};

// rows[channel][tap][width] of a few input channels, as accumulation type, by whichever stride is one.
template <class T, class A>
void weight_rows(const WeightView& view, const T* from, const std::vector<int64_t>& tap_offset, int64_t channels,
                 int64_t count, int64_t width, A* rows) {
  const int64_t taps = static_cast<int64_t>(tap_offset.size()), stride = view.out_stride();
  if (stride != 1 && view.in_stride() == 1 && channels > 2) {
    for (int64_t i = 0; i < taps; ++i) {
      copy_transposed(from + tap_offset[i], stride, rows + i * width, taps * width, count, channels);
    }
    return;
  }
  bool consecutive = taps > 2 && count > 2;
  for (int64_t i = 0; i < taps; ++i) consecutive = consecutive && tap_offset[i] == i;
  for (int64_t c = 0; c < channels; ++c, from += view.in_stride(), rows += taps * width) {
    if (stride == 1) {
      for (int64_t i = 0; i < taps; ++i) copy_channels(from + tap_offset[i], rows + i * width, count);
    } else if (consecutive) {
      copy_transposed(from, stride, rows, width, count, taps);
    } else {
      for (int64_t n = 0; n < count; ++n) {
        for (int64_t i = 0; i < taps; ++i) rows[i * width + n] = to_float(from[n * stride + tap_offset[i]]);
      }
    }
  }
}

}  // namespace walt::WALT_ISA::causal_conv3d
