// Packs weights once per call into panels of output channels: [group][panel][chunk][kt][kh][kw][channel][width]. A
// chunk is as many input channels as a block's patch holds at a time; its channels are padded to Packing::step, and
// pairs of them interleaved where the kernel multiplies pairs.
#pragma once

#include "causal_conv3d/weights.h"

namespace walt::WALT_ISA::causal_conv3d {

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
