// Which tokens a window holds, and where the bias of a pair of tokens lies in the table.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/tensor_view.h"
#include "window_attention/params.h"

namespace walt::WALT_ISA::window_attention {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The windows of one video: full ones, and smaller ones at the far edge of an axis that the window does not divide.
struct Grid {
  int64_t size[3], window[3], count[3];

  explicit Grid(const WindowAttentionParams& p) {
    for (int axis = 0; axis < 3; ++axis) {
      size[axis] = p.q.shape[axis + 1];
      window[axis] = std::min(p.window[axis], size[axis]);
      count[axis] = (size[axis] + window[axis] - 1) / window[axis];
    }
  }
  int64_t windows() const { return count[0] * count[1] * count[2]; }
  int64_t max_tokens() const { return window[0] * window[1] * window[2]; }
  Range range(int axis, int64_t index) const {
    return {index * window[axis], std::min((index + 1) * window[axis], size[axis])};
  }
};

// One window of one sample: its video frames, whose tokens attend to each other, and its image frames. Token n counts
// video frames, rows and columns in that order.
struct Window {
  int64_t sample = 0;
  Range rows{}, columns{};
  std::vector<int64_t> video, images;

  void reserve(const Grid& grid) {  // room for any window, so that load() never allocates
    video.reserve(static_cast<size_t>(grid.window[0]));
    images.reserve(static_cast<size_t>(grid.window[0]));
  }

  void load(const Grid& grid, const TensorView& image, int64_t b, int64_t index) {
    sample = b;
    columns = grid.range(2, index % grid.count[2]);
    rows = grid.range(1, index / grid.count[2] % grid.count[1]);
    const Range frames = grid.range(0, index / grid.count[2] / grid.count[1]);
    video.clear();
    images.clear();
    const bool* flags = static_cast<const bool*>(image.data);
    for (int64_t frame = frames.begin; frame < frames.end; ++frame) {
      const bool is_image = image.defined() && flags[b * image.stride[0] + frame * image.stride[1]];
      (is_image ? images : video).push_back(frame);
    }
  }

  int64_t tokens() const { return static_cast<int64_t>(video.size()) * rows.size() * columns.size(); }

  // Offset in x [B, T, H, W, heads, ...] of the token at (frame, row, column).
  int64_t offset(const TensorView& x, int64_t head, int64_t frame, int64_t row, int64_t column) const {
    return sample * x.stride[0] + frame * x.stride[1] + row * x.stride[2] + column * x.stride[3] + head * x.stride[4];
  }

  // Calls f(n - begin, frame, row, column) for the video tokens n in [begin, end).
  template <class F>
  void each_token(int64_t begin, int64_t end, F&& f) const {
    const int64_t width = columns.size(), height = rows.size();
    int64_t column = begin % width, row = begin / width % height, frame = begin / width / height;
    for (int64_t n = begin; n < end; ++n) {
      f(n - begin, video[static_cast<size_t>(frame)], rows.begin + row, columns.begin + column);
      if (++column < width) continue;
      column = 0;
      if (++row < height) continue;
      row = 0;
      ++frame;
    }
  }

  template <class F>
  void each_image_token(F&& f) const {
    for (int64_t frame : images) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        for (int64_t column = columns.begin; column < columns.end; ++column) f(frame, row, column);
      }
    }
  }
};

// At most a vector of queries in one row of the window: neighbours in a row of scores and in the bias table.
struct Run {
  int64_t offset, length, position;
};

// The table is indexed by position(query) - position(key) + center, position being linear in (frame, row, column).
struct BiasGeometry {
  int64_t extent[3], center, size;

  explicit BiasGeometry(const WindowAttentionParams& p) {
    for (int axis = 0; axis < 3; ++axis) extent[axis] = 2 * p.window[axis] - 1;
    center = position(p.window[0] - 1, p.window[1] - 1, p.window[2] - 1);
    size = extent[0] * extent[1] * extent[2];
  }
  int64_t position(int64_t frame, int64_t row, int64_t column) const {
    return (frame * extent[1] + row) * extent[2] + column;
  }

  void runs(const Window& window, int64_t begin, int64_t end, int64_t lanes, std::vector<Run>& result) const {
    result.clear();
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      const bool starts = n == 0 || column == window.columns.begin || result.back().length == lanes;
      if (starts) result.push_back({n, 0, position(frame, row, column)});
      ++result.back().length;
    });
  }
};

}  // namespace walt::WALT_ISA::window_attention
