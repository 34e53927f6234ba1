// What forward and backward data share: every output pixel sums weighted source pixels over a list of taps. Blocks of
// output pixels are independent, and each pixel's sum has one order whatever the block, so results depend neither on
// threads nor on neighbours, batch or clip length.
#pragma once

#include "causal_conv3d/weights.h"

namespace walt::WALT_ISA::causal_conv3d {

struct Convolution {
  PatchSource source;
  std::vector<AxisRun> axes[3];
  WeightView weight;
  const TensorView* bias;         // may be undefined
  const TensorView* out;          // may be undefined: then only negative frames are computed
  const TensorView* out_history;  // frames before 0; may be undefined
  int64_t batches;
  int threads;  // at least 1
};

// Whether Winograd's method computes the positions of these runs. Does not depend on the number of frames.
bool winograd_takes(const Convolution&, const AxisRun* const run[3]);

// The runs that winograd_takes (winograd/convolve.cpp), and all others (direct/convolve.cpp).
void winograd_convolve(const Convolution&);
void direct_convolve(const Convolution&);

inline void convolve(const Convolution& conv) {
  winograd_convolve(conv);
  direct_convolve(conv);
}

// The sums of a block: panels of [pixel][width], the last one vector wide if that is enough.
template <class A>
struct PanelSums {
  static constexpr int lanes = kLanes<A>, width = 2 * lanes;
  const A* data;
  int64_t panel_stride;
  const A* bias;
  int64_t channels;

  vector_t<A> load_at(int64_t pixel, int64_t channel) const {
    const int64_t panel = channel / width, pitch = channels - panel * width <= lanes ? lanes : width;
    return load(data + panel * panel_stride + pixel * pitch + channel % width) + load(bias + channel);
  }
};

// Writes pixels [pixel, pixel + columns) of a block, side by side in memory at `column_stride`.
template <class T, class A>
void write_pixels(const PanelSums<A>& sums, int64_t pixel, T* to, int64_t channel_stride, int64_t column_stride,
                  int64_t columns) {
  constexpr int lanes = kLanes<A>;
  if (channel_stride == 1) {
    const int64_t full = sums.channels / lanes * lanes;
    for (int64_t i = 0; i < columns; ++i, to += column_stride) {
      for (int64_t c = 0; c < full; c += lanes) store_flushed(to + c, sums.load_at(pixel + i, c));
      if (full < sums.channels) store_partial(to + full, sums.load_at(pixel + i, full), sums.channels - full);
    }
    return;
  }
  for (int64_t c = 0; c < sums.channels; c += lanes) {
    const int64_t count = std::min<int64_t>(lanes, sums.channels - c);
    for (int64_t i = 0; i < columns; i += lanes) {
      const int64_t pixels = std::min<int64_t>(lanes, columns - i);
      vector_t<A> tile[lanes] = {};
      for (int64_t k = 0; k < pixels; ++k) tile[k] = sums.load_at(pixel + i + k, c);
      transpose(tile);
      for (int64_t k = 0; k < count; ++k) {
        T* row = to + (c + k) * channel_stride + i * column_stride;
        if (column_stride != 1) {
          for (int64_t p = 0; p < pixels; ++p) row[p * column_stride] = from_float<T>(tile[k][p]);
        } else if (pixels == lanes) {
          store_flushed(row, tile[k]);
        } else {
          store_partial(row, tile[k], pixels);
        }
      }
    }
  }
}

template <class T>
T* output_address(const Convolution& conv, int64_t batch, int64_t channel, int64_t frame, int64_t row, int64_t column) {
  const TensorView& out = frame < 0 ? *conv.out_history : *conv.out;
  return static_cast<T*>(out.data) + batch * out.stride[0] + channel * out.stride[1] +
         (frame < 0 ? frame + out.shape[2] : frame) * out.stride[2] + row * out.stride[3] + column * out.stride[4];
}

// Writes a block's channels from `channel` on.
template <class T, class A>
void write_block(const Convolution& conv, const Block& block, const PanelSums<A>& sums, int64_t channel) {
  const int64_t columns = block.count[2], rows = block.count[1];
  for (int64_t i = 0; i < block.count[0]; ++i) {
    const int64_t frame = block.position(0, i);
    const TensorView& out = frame < 0 ? *conv.out_history : *conv.out;
    T* to = output_address<T>(conv, block.batch, channel, frame, 0, block.position(2, 0));
    const int64_t column_stride = out.stride[4] * block.run[2]->step;
    const bool whole_rows = out.stride[3] * block.run[1]->step == columns * column_stride;  // one long run of pixels
    for (int64_t j = 0; j < (whole_rows ? 1 : rows); ++j) {
      write_pixels(sums, (i * rows + j) * columns, to + block.position(1, j) * out.stride[3], out.stride[1],
                   column_stride, whole_rows ? rows * columns : columns);
    }
  }
}

// The bias in float32 or wider, zero where there is none; each group padded to `padded` channels.
template <class T>
void load_bias(const Convolution& conv, int64_t padded, accumulate_t<T>* bias) {
  for (int64_t i = 0; i < conv.weight.groups * padded; ++i) {
    const int64_t n = i % padded, channel = i / padded * conv.weight.out_channels + n;
    const bool exists = conv.bias->defined() && n < conv.weight.out_channels;
    bias[i] =
        exists ? to_float(static_cast<const T*>(conv.bias->data)[channel * conv.bias->stride[0]]) : accumulate_t<T>{};
  }
}

}  // namespace walt::WALT_ISA::causal_conv3d
