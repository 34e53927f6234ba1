// Packs weights once per call into panels of output channels: [group][panel][chunk][kt][kh][kw][channel][width]. A
// chunk is as many input channels as a block's patch holds at a time; its channels are padded to Packing::step, and
// pairs of them interleaved where the kernel multiplies pairs.
#pragma once

#include "causal_conv3d/micro.h"
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

template <class T>
struct PanelLayout {
  static constexpr int step = Packing<T>::step;
  static constexpr int lanes = kLanes<typename Packing<T>::Acc>;
  static constexpr int width = 2 * lanes;
  int64_t taps;
  Chunks chunks;
  int64_t rows;    // of one panel, each `width` lanes
  int64_t panels;  // of one group

  PanelLayout(int64_t in_channels, int64_t out_channels, int64_t taps)
      : taps(taps),
        chunks(in_channels, step, kChunkBytes / static_cast<int64_t>(sizeof(typename Packing<T>::Value))),
        rows(taps * ((in_channels + step - 1) / step)),
        panels((out_channels + width - 1) / width) {}
  int64_t panel_size() const { return rows * width; }
  int64_t chunk_row(int64_t chunk) const { return chunks.begin(chunk) / step * taps; }
  static int64_t count(int64_t out_channels, int64_t panel) {
    return std::min<int64_t>(width, out_channels - panel * width);
  }
  // The last panel is one vector wide if that is enough; its rows then lie closer together.
  static int vectors(int64_t count) { return count <= lanes ? 1 : 2; }
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

inline void store_rows(const float* even, const float*, int64_t width, float* to) {
  std::memcpy(to, even, static_cast<size_t>(width) * sizeof(float));
}
inline void store_rows(const double* even, const double*, int64_t width, double* to) {
  std::memcpy(to, even, static_cast<size_t>(width) * sizeof(double));
}
// Two rows of numbers that bfloat16 represents exactly, interleaved.
inline void store_rows(const float* even, const float* odd, int64_t width, int32_t* to) {
  for (int64_t n = 0; n < width; ++n) {
    uint32_t low, high;
    std::memcpy(&low, even + n, 4);
    std::memcpy(&high, odd + n, 4);
    to[n] = static_cast<int32_t>(low >> 16 | (high & 0xffff0000u));
  }
}

// `packed` holds groups * panels * panel_size lanes.
template <class T>
void pack_weights(const WeightView& view, int threads, typename Packing<T>::Lane* packed) {
  using Layout = PanelLayout<T>;
  using A = typename Packing<T>::Acc;
  constexpr int step = Packing<T>::step;
  const int64_t taps = view.taps();
  const Layout layout(view.in_channels, view.out_channels, taps);
  std::vector<int64_t> tap_offset;
  for (int64_t i = 0; i < taps; ++i) tap_offset.push_back(view.tap_offset(i));
  const int64_t panels = view.groups * layout.panels, slices = (view.in_channels + step - 1) / step;
  constexpr int64_t slices_per_task = 16 / step;
  const int64_t tasks = (slices + slices_per_task - 1) / slices_per_task;
  const int64_t scratch_size = slices_per_task * step * taps * Layout::width;
  Scratch<A> scratch(threads * scratch_size);
  parallel_for(panels * tasks, threads, [&](int64_t task, int thread) {
    A* rows = scratch.data() + thread * scratch_size;
    const int64_t group = task / tasks / layout.panels, panel = task / tasks % layout.panels;
    const int64_t count = Layout::count(view.out_channels, panel), width = Layout::vectors(count) * Layout::lanes;
    const T* from =
        static_cast<const T*>(view.weight->data) + view.group_offset(group) + panel * Layout::width * view.out_stride();
    const int64_t begin = task % tasks * slices_per_task, end = std::min(slices, begin + slices_per_task);
    const int64_t channels = std::min(end * step, view.in_channels) - begin * step;
    std::memset(rows, 0, static_cast<size_t>(scratch_size) * sizeof(A));
    weight_rows(view, from + begin * step * view.in_stride(), tap_offset, channels, count, width, rows);
    int64_t chunk = 0;
    for (int64_t slice = begin; slice < end; ++slice, rows += step * taps * width) {
      while (slice * step >= layout.chunks.begin(chunk + 1)) ++chunk;
      const int64_t pitch = layout.chunks.pitch(chunk) / step, local = slice - layout.chunks.begin(chunk) / step;
      typename Packing<T>::Lane* to =
          packed + (task / tasks) * layout.panel_size() + (layout.chunk_row(chunk) + local) * width;
      for (int64_t i = 0; i < taps; ++i) {
        store_rows(rows + i * width, rows + ((step - 1) * taps + i) * width, width, to + i * pitch * width);
      }
    }
  });
}

}  // namespace walt::WALT_ISA::causal_conv3d
