// Transforms weights into panels of output channels, as Winograd's kernel reads them:
// [group][position][panel][time tap][channel][width].
#pragma once

#include "causal_conv3d/weights.h"
#include "causal_conv3d/winograd/transforms.h"

namespace walt::WALT_ISA::causal_conv3d {

template <class A, int m>
struct WinogradLayout {
  static constexpr int n = Winograd<m>::n, positions = n * n;
  static constexpr int lanes = kLanes<A>, width = 2 * lanes;
  int64_t channels;                // of the sum
  int64_t panels;                  // of one group
  std::vector<int64_t> time_taps;  // kernel indices that are read at all: an image needs only the last
  std::vector<int64_t> time_slot;  // where each kernel index lies among them

  WinogradLayout(const WeightView& weight, const std::vector<AxisRun>& time)
      : channels(weight.in_channels),
        panels((weight.out_channels + width - 1) / width),
        time_slot(static_cast<size_t>(weight.kernel(0)), -1) {
    for (const AxisRun& run : time) {
      for (const Tap& tap : run.taps) time_slot[static_cast<size_t>(tap.kernel)] = 0;
    }
    for (size_t k = 0; k < time_slot.size(); ++k) {
      if (time_slot[k] < 0) continue;
      time_slot[k] = static_cast<int64_t>(time_taps.size());
      time_taps.push_back(static_cast<int64_t>(k));
    }
  }
  int64_t rows() const { return static_cast<int64_t>(time_taps.size()) * channels; }
  int64_t panel_size() const { return rows() * width; }
};

// G g G^T of `count` 3 x 3 kernels, `vectors` vectors of output channels wide, whose taps lie `width` numbers apart;
// each kernel's follow the last one's after `pitch`. `flipped` turns the kernels around in both axes.
template <int m, int vectors, class A>
void transform_weights(const A* taps, int64_t pitch, int64_t count, bool flipped, A* to, int64_t position_stride) {
  using V = vector_t<A>;
  constexpr int n = Winograd<m>::n, lanes = kLanes<A>, width = vectors * lanes;
  for (int64_t c = 0; c < count; ++c, taps += pitch, to += width) {
    for (int v = 0; v < vectors; ++v) {
      V u[n][n];
#pragma GCC unroll 3
      for (int i = 0; i < 9; ++i) {
        u[i / 3][i % 3] = load(taps + (flipped ? 8 - i : i) * width + v * lanes);
      }
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) Winograd<m>::weight(&u[0][j], &u[0][j], n);
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) {
        Winograd<m>::weight(u[i], u[i], 1);
#pragma GCC unroll 6
        for (int j = 0; j < n; ++j) store(to + (i * n + j) * position_stride + v * lanes, u[i][j]);
      }
    }
  }
}

// Panels [first, end) of every group.
template <class T, int m>
void pack_winograd(const WeightView& view, const WinogradLayout<accumulate_t<T>, m>& layout, int64_t first, int64_t end,
                   bool flipped, int threads, accumulate_t<T>* packed) {
  using A = accumulate_t<T>;
  using Layout = WinogradLayout<A, m>;
  constexpr int64_t kChannels = 16;  // of a task: their taps stay in the first-level cache
  std::vector<int64_t> tap_offset;
  for (int64_t t : layout.time_taps) {
    for (int64_t i = 0; i < 9; ++i) {
      tap_offset.push_back(t * view.weight->stride[2] + i / 3 * view.weight->stride[3] +
                           i % 3 * view.weight->stride[4]);
    }
  }
  const int64_t taps = static_cast<int64_t>(tap_offset.size()), scratch_size = kChannels * taps * Layout::width;
  const int64_t panels = end - first, slices = (layout.channels + kChannels - 1) / kChannels;
  Scratch<A> scratch(threads * scratch_size);
  parallel_for(view.groups * panels * slices, threads, [&](int64_t task, int thread) {
    A* rows = scratch.data() + thread * scratch_size;
    const int64_t group = task / slices / panels, local = task / slices % panels, panel = first + local;
    const int64_t begin = task % slices * kChannels, channels = std::min(kChannels, layout.channels - begin);
    const int64_t count = std::min<int64_t>(Layout::width, view.out_channels - panel * Layout::width);
    const int64_t width = count <= Layout::lanes ? Layout::lanes : Layout::width;
    if (count < width) std::memset(rows, 0, static_cast<size_t>(scratch_size) * sizeof(A));
    weight_rows(view,
                static_cast<const T*>(view.weight->data) + view.group_offset(group) +
                    panel * Layout::width * view.out_stride() + begin * view.in_stride(),
                tap_offset, channels, count, width, rows);
    A* to = packed + (group * Layout::positions * panels + local) * layout.panel_size();
    for (int64_t t = 0; t * 9 < taps; ++t) {
      const auto transform = width == Layout::width ? transform_weights<m, 2, A> : transform_weights<m, 1, A>;
      transform(rows + t * 9 * width, taps * width, channels, flipped, to + (t * layout.channels + begin) * width,
                panels * layout.panel_size());
    }
  });
}

}  // namespace walt::WALT_ISA::causal_conv3d
