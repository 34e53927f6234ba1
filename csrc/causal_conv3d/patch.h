// Copies what a block reads into a small patch of scratch memory: [frame][row][column][channel], channels padded to a
// multiple. Padding, history, dtype and memory layout end here; the kernels behind it see plain rows of numbers.
#pragma once

#include <cstring>
#include <vector>

#include "causal_conv3d/geometry.h"
#include "common/simd.h"

namespace walt::WALT_ISA::causal_conv3d {

// What each padded coordinate of an axis reads, for coordinates from `lowest` on: a position, -1 for zero, and below -1
// the history frame -2 - value.
struct SourceMap {
  int64_t lowest = 0;
  std::vector<int64_t> position;
  int64_t operator[](int64_t coordinate) const { return position[static_cast<size_t>(coordinate - lowest)]; }
};

inline SourceMap forward_map(const Axis& axis) {
  SourceMap map;
  for (int64_t p = 0; p < axis.before + axis.size + axis.after; ++p) map.position.push_back(axis.source(p));
  return map;
}

// Every coordinate that some run reads; those outside [0, size) are zeros.
inline SourceMap backward_map(const std::vector<AxisRun>& runs, int64_t size) {
  int64_t lowest = 0, highest = size - 1;
  for (const AxisRun& run : runs) {
    if (run.taps.empty()) continue;
    lowest = std::min(lowest, run.lowest());
    highest = std::max(highest, run.lowest() + run.extent(run.count) - 1);
  }
  SourceMap map;
  map.lowest = lowest;
  for (int64_t p = lowest; p <= highest; ++p) map.position.push_back(p >= 0 && p < size ? p : -1);
  return map;
}

template <class T, class P>
void copy_channels(const T* from, P* to, int64_t n) {
  if constexpr (std::is_same_v<T, P>) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(P));
  } else {
    constexpr int lanes = kLanes<accumulate_t<P>>;
    int64_t c = 0;
    for (; c + lanes <= n; c += lanes) store(to + c, load(from + c));
    if (c < n) store_partial(to + c, load_partial(from + c, n - c), n - c);
  }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns. Where there is at least one whole
// square, the last one overlaps its neighbour instead of being a partial one.
template <class T, class P>
void copy_transposed(const T* from, int64_t from_stride, P* to, int64_t to_stride, int64_t rows, int64_t columns) {
  using A = accumulate_t<P>;
  constexpr int lanes = kLanes<A>;
  for (int64_t j = 0; j < columns; j += lanes) {
    if (columns >= lanes) j = std::min(j, columns - lanes);
    const int64_t width = std::min<int64_t>(lanes, columns - j);
    for (int64_t i = 0; i < rows; i += lanes) {
      if (rows >= lanes) i = std::min(i, rows - lanes);
      const int64_t height = std::min<int64_t>(lanes, rows - i);
      vector_t<A> tile[lanes] = {};
      const T* source = from + i * from_stride + j;
      P* target = to + j * to_stride + i;
      if (width == lanes && height == lanes) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) tile[k] = load(source + k * from_stride);
        transpose(tile);
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) store(target + k * to_stride, tile[k]);
      } else {
        for (int64_t k = 0; k < height; ++k) tile[k] = load_partial(source + k * from_stride, width);
        transpose(tile);
        for (int64_t k = 0; k < width; ++k) store_partial(target + k * to_stride, tile[k], height);
      }
    }
  }
}

// The same for bfloat16 as it is, two rows at a time in the lanes of one transpose. An odd last row is paired with
// zeros, so `to` must have room for it.
inline void copy_transposed_pairs(const bfloat16* from, int64_t from_stride, bfloat16* to, int64_t to_stride,
                                  int64_t rows, int64_t columns) {
  constexpr int lanes = kLanes<float>;
  const auto row = [&](int64_t i, int64_t j, int64_t width) {
    if (i >= rows) return vuint{};
    const bfloat16* p = from + i * from_stride + j;
    return (vuint)(width == lanes ? load(p) : load_partial(p, width)) >> 16;
  };
  for (int64_t j = 0; j < columns; j += lanes) {
    const int64_t width = std::min<int64_t>(lanes, columns - j);
    for (int64_t i = 0; i < rows; i += 2 * lanes) {
      const int64_t pairs = std::min<int64_t>(lanes, (rows - i + 1) / 2);
      vfloat tile[lanes] = {};
      for (int64_t k = 0; k < pairs; ++k) {
        tile[k] = (vfloat)(row(i + 2 * k, j, width) | row(i + 2 * k + 1, j, width) << 16);
      }
      transpose(tile);
      for (int64_t k = 0; k < width; ++k) {
        float* target = reinterpret_cast<float*>(to + (j + k) * to_stride + i);
        if (pairs == lanes) {
          std::memcpy(target, &tile[k], sizeof tile[k]);
        } else {
          std::memcpy(target, &tile[k], static_cast<size_t>(pairs) * sizeof(float));
        }
      }
    }
  }
}

// What patches are copied from: a tensor, the frames before it, and where each padded coordinate lies in them.
struct PatchSource {
  const TensorView* view;
  const TensorView* history;  // may be undefined
  SourceMap map[3];
};

// A piece of a patch row: columns [column, column + count) copy source columns [from, from + count), or zeros (from
// -1).
struct Piece {
  int64_t column, from, count;
};

inline void row_pieces(const SourceMap& map, int64_t begin, int64_t columns, std::vector<Piece>& pieces) {
  pieces.clear();
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t from = map[begin + i];
    if (!pieces.empty()) {
      Piece& last = pieces.back();
      if (last.from < 0 ? from < 0 : from == last.from + last.count) {
        ++last.count;
        continue;
      }
    }
    pieces.push_back({i, from, 1});
  }
}

template <class T, class P>
void copy_columns(const T* from, int64_t channel_stride, int64_t column_stride, P* to, int64_t pitch, int64_t channels,
                  int64_t columns) {
  if (channel_stride == 1 || channels == 1) {
    if (column_stride == channels && pitch == channels) {
      return copy_channels(from, to, columns * channels);
    }
    for (int64_t i = 0; i < columns; ++i) copy_channels(from + i * column_stride, to + i * pitch, channels);
    return;
  }
  if (column_stride == 1 && channels >= 8 && columns >= 4) {
    if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<P, bfloat16>) {
      if (channels % 2 == 0 || pitch > channels) {
        return copy_transposed_pairs(from, channel_stride, to, pitch, channels, columns);
      }
    }
    return copy_transposed(from, channel_stride, to, pitch, channels, columns);
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < columns; ++i) {
      const T value = from[i * column_stride + c * channel_stride];
      if constexpr (std::is_same_v<T, P>) {
        to[i * pitch + c] = value;
      } else {
        to[i * pitch + c] = from_float<P>(to_float(value));
      }
    }
  }
}

// Fills a block's patch from channels [channel, channel + channels). Pixels lie `pitch` >= channels values apart; what
// is left of each becomes zero. `pieces` is working memory.
template <class T, class P>
void fill_patch(const PatchSource& source, const Block& block, int64_t channel, int64_t channels, int64_t pitch,
                std::vector<Piece>& pieces, P* patch) {
  const int64_t frames = block.patch_size(0), rows = block.patch_size(1), columns = block.patch_size(2);
  const size_t row_bytes = static_cast<size_t>(columns * pitch) * sizeof(P);
  row_pieces(source.map[2], block.patch_begin(2), columns, pieces);
  for (int64_t f = 0; f < frames; ++f) {
    const int64_t frame = source.map[0][block.patch_begin(0) + f];
    for (int64_t r = 0; r < rows; ++r, patch += columns * pitch) {
      const int64_t row = source.map[1][block.patch_begin(1) + r];
      if (frame == -1 || row == -1) {
        std::memset(patch, 0, row_bytes);
        continue;
      }
      if (pitch != channels) std::memset(patch, 0, row_bytes);
      const TensorView& view = frame < -1 ? *source.history : *source.view;
      const T* from = static_cast<const T*>(view.data) + block.batch * view.stride[0] + channel * view.stride[1] +
                      (frame < -1 ? -2 - frame : frame) * view.stride[2] + row * view.stride[3];
      for (const Piece& piece : pieces) {
        P* to = patch + piece.column * pitch;
        if (piece.from < 0) {
          std::memset(to, 0, static_cast<size_t>(piece.count * pitch) * sizeof(P));
        } else {
          copy_columns(from + piece.from * view.stride[4], view.stride[1], view.stride[4], to, pitch, channels,
                       piece.count);
        }
      }
    }
  }
}

}  // namespace walt::WALT_ISA::causal_conv3d
