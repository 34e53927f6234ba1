// Which source positions an output position reads, per axis. Forward, backward data, strides, dilation and every
// padding mode come down to the same two tables: a list of taps (source offset, kernel index) shared by a run of
// positions, and a map from padded source coordinates to real ones.
#pragma once

#include <algorithm>
#include <vector>

#include "causal_conv3d/params.h"
#include "common/checks.h"

namespace walt::WALT_ISA::causal_conv3d {

inline void check(const ConvOptions& o) {
  for (int64_t i : o.stride) require(i >= 1, "stride must be at least 1");
  for (int64_t i : o.dilation) require(i >= 1, "dilation must be at least 1");
  for (int64_t i : o.padding) require(i >= 0, "padding must be at least 0");
  require(o.groups >= 1, "groups must be at least 1");
}

struct Tap {
  int64_t offset;  // in the source, from the position's base
  int64_t kernel;  // index into the kernel
  bool operator==(const Tap& other) const { return offset == other.offset && kernel == other.kernel; }
  bool operator<(const Tap& other) const {
    return offset != other.offset ? offset < other.offset : kernel < other.kernel;
  }
};

// Positions first, first + step, ... whose bases are base, base + base_step, ... and whose taps are the same.
struct AxisRun {
  int64_t first, step, base, base_step, count;
  std::vector<Tap> taps;

  int64_t lowest() const { return base + taps.front().offset; }  // taps are sorted
  int64_t extent(int64_t positions) const {                      // source positions that `positions` neighbours read
    return (positions - 1) * base_step + taps.back().offset - taps.front().offset + 1;
  }
};

// One axis of the convolution: n input positions, `before` and `after` of padding, and what the padding is made of.
struct Axis {
  int64_t size, kernel, stride, dilation, before, after;
  enum Mode { zeros, replicate, reflect, history } mode;

  int64_t outputs() const { return (size + before + after - (kernel - 1) * dilation - 1) / stride + 1; }

  // The input position that padded coordinate p copies: -1 for zero, below -1 for history frame -2 - result.
  int64_t source(int64_t p) const {
    int64_t i = p - before;
    if (i >= 0 && i < size) return i;
    switch (mode) {
      case zeros: return -1;
      case replicate: return i < 0 ? 0 : size - 1;
      case reflect: return i < 0 ? -i : 2 * (size - 1) - i;
      case history: return i < 0 ? -2 - p : -1;
    }
    return -1;
  }
};

inline Axis time_axis(int64_t size, int64_t kernel, const ConvOptions& o, bool history) {
  const Axis::Mode mode = history                                      ? Axis::history
                          : o.time_padding == TimePadding::first_frame ? Axis::replicate
                                                                       : Axis::zeros;
  return {size, kernel, o.stride[0], o.dilation[0], (kernel - 1) * o.dilation[0], 0, mode};
}

// `which` is 1 for height, 2 for width.
inline Axis space_axis(int which, int64_t size, int64_t kernel, const ConvOptions& o) {
  const Axis::Mode mode = o.space_padding == SpacePadding::replicate ? Axis::replicate
                          : o.space_padding == SpacePadding::reflect ? Axis::reflect
                                                                     : Axis::zeros;
  const int64_t* pads = o.padding.data() + 2 * (which - 1);
  return {size, kernel, o.stride[which], o.dilation[which], pads[0], pads[1], mode};
}

// Adds a position to the first run that it continues, or as a run of its own.
inline void append(std::vector<AxisRun>& runs, int64_t position, int64_t step, int64_t base, int64_t base_step,
                   std::vector<Tap> taps) {
  for (AxisRun& run : runs) {
    if (run.first + run.count * run.step == position && run.base + run.count * run.base_step == base &&
        run.taps == taps) {
      ++run.count;
      return;
    }
  }
  runs.push_back({position, step, base, base_step, 1, std::move(taps)});
}

// Output positions reading padded input coordinates. With `skip_zeros`, taps on zero padding are left out: the first
// frames of a clip, and images, then cost only the frames they have.
inline std::vector<AxisRun> forward_runs(const Axis& axis, bool skip_zeros) {
  std::vector<AxisRun> runs;
  for (int64_t o = 0; o < axis.outputs(); ++o) {
    std::vector<Tap> taps;
    for (int64_t k = 0; k < axis.kernel; ++k) {
      if (!skip_zeros || axis.source(o * axis.stride + k * axis.dilation) != -1) taps.push_back({k * axis.dilation, k});
    }
    append(runs, o, 1, o * axis.stride, axis.stride, std::move(taps));
  }
  return runs;
}

// Input positions [begin, end) (negative ones are history) reading output coordinates. Position n collects the gradient
// of every padded coordinate that copies it. Reads past the ends of the output are zeros in the patch; they
// are left out with `skip_zeros`, and for coordinates of padding.
inline std::vector<AxisRun> backward_runs(const Axis& axis, int64_t begin, int64_t end, bool skip_zeros) {
  const int64_t outputs = axis.outputs();
  std::vector<std::vector<Tap>> taps(static_cast<size_t>(end - begin));
  const auto base = [&](int64_t position) { return (position + axis.before) / axis.stride; };
  for (int64_t p = 0; p < axis.before + axis.size + axis.after; ++p) {
    const int64_t source = axis.source(p);
    const int64_t position = source < -1 ? p - axis.before : source;
    if (source == -1 || position < begin || position >= end) continue;
    const bool copied = position != p - axis.before;  // p is padding
    for (int64_t k = 0; k < axis.kernel; ++k) {
      const int64_t numerator = p - k * axis.dilation;
      // Floor division, since far taps reach before the first output.
      const int64_t o = numerator >= 0 ? numerator / axis.stride : -((-numerator + axis.stride - 1) / axis.stride);
      if (o * axis.stride != numerator) continue;
      if ((o < 0 || o >= outputs) && (skip_zeros || copied)) continue;
      taps[static_cast<size_t>(position - begin)].push_back({o - base(position), k});
    }
  }
  std::vector<AxisRun> runs;
  for (int64_t position = begin; position < end; ++position) {
    std::vector<Tap>& list = taps[static_cast<size_t>(position - begin)];
    std::sort(list.begin(), list.end());
    append(runs, position, axis.stride, base(position), 1, std::move(list));
  }
  return runs;
}

// A block of output positions that one task computes from one patch of the source.
struct Block {
  const AxisRun* run[3];
  int64_t begin[3], count[3];  // positions of the runs
  int64_t batch;

  bool empty() const { return run[0]->taps.empty() || run[1]->taps.empty() || run[2]->taps.empty(); }
  int64_t pixels() const { return count[0] * count[1] * count[2]; }
  int64_t position(int axis, int64_t i) const { return run[axis]->first + (begin[axis] + i) * run[axis]->step; }
  int64_t patch_begin(int axis) const { return run[axis]->lowest() + begin[axis] * run[axis]->base_step; }
  int64_t patch_size(int axis) const { return run[axis]->extent(count[axis]); }
};

constexpr int64_t kBlockCost = 64;          // of starting a block, in patch pixels
constexpr int64_t kPatchBytes = 448 << 10;  // half of a second-level cache, which also holds weights and accumulators

// Cuts the product of three runs into blocks of at most `most` pixels whose patch fits the cache, sharing as much of
// the halo as possible.
inline void choose_block(const AxisRun* const run[3], int64_t pixel_bytes, int64_t most, int64_t best[3]) {
  const auto extent = [&](int axis, int64_t n) { return run[axis]->taps.empty() ? n : run[axis]->extent(n); };
  int64_t columns = std::min(run[2]->count, most);
  while (columns > 16 && extent(2, columns) * extent(1, 1) * extent(0, 1) * pixel_bytes > kPatchBytes) {
    columns = (columns + 1) / 2;
  }
  double best_cost = 0;
  best[0] = best[1] = 1;
  best[2] = columns;
  for (int64_t frames = 1; frames <= std::min<int64_t>(run[0]->count, 16); ++frames) {
    for (int64_t rows = 1; rows <= std::min<int64_t>(run[1]->count, 64); ++rows) {
      const int64_t pixels = frames * rows * columns;
      const int64_t patch = extent(0, frames) * extent(1, rows) * extent(2, columns);
      const double cost = static_cast<double>(patch + kBlockCost) / static_cast<double>(pixels);
      const bool fits = pixels <= most && patch * pixel_bytes <= kPatchBytes;
      if (fits && (best_cost == 0 || cost < best_cost)) {
        best_cost = cost;
        best[0] = frames;
        best[1] = rows;
      }
    }
  }
}

// The blocks of all combinations of runs that are `wanted`.
template <class Wanted>
std::vector<Block> make_blocks(const std::vector<AxisRun> (&axes)[3], int64_t batches, int64_t pixel_bytes,
                               int64_t most, Wanted&& wanted) {
  std::vector<Block> blocks;
  for (const AxisRun& t : axes[0]) {
    for (const AxisRun& h : axes[1]) {
      for (const AxisRun& w : axes[2]) {
        const AxisRun* const run[3] = {&t, &h, &w};
        if (!wanted(run)) continue;
        int64_t size[3];
        choose_block(run, pixel_bytes, most, size);
        for (int64_t batch = 0; batch < batches; ++batch) {
          for (int64_t i = 0; i < t.count; i += size[0]) {
            for (int64_t j = 0; j < h.count; j += size[1]) {
              for (int64_t k = 0; k < w.count; k += size[2]) {
                blocks.push_back(
                    {{&t, &h, &w},
                     {i, j, k},
                     {std::min(size[0], t.count - i), std::min(size[1], h.count - j), std::min(size[2], w.count - k)},
                     batch});
              }
            }
          }
        }
      }
    }
  }
  return blocks;
}

inline std::vector<Block> make_blocks(const std::vector<AxisRun> (&axes)[3], int64_t batches, int64_t pixel_bytes,
                                      int64_t most) {
  return make_blocks(axes, batches, pixel_bytes, most, [](const AxisRun* const*) { return true; });
}

// A stretch of the reduction: `length` consecutive values of a pixel's patch against consecutive rows of packed
// weights.
struct Run {
  int64_t patch, weight, length;
};

// The reduction of one block, in kernel order, merged where both sides are contiguous. `flipped` kernels are packed
// with their last axis reversed, so that backward data's descending kernel index still walks the weights upwards.
inline std::vector<Run> reduction_runs(const Block& block, int64_t channels, const int64_t kernel[3], bool flipped) {
  std::vector<Run> runs;
  const int64_t rows = block.patch_size(1), columns = block.patch_size(2);
  const auto local = [&](int axis, const Tap& tap) { return tap.offset - block.run[axis]->taps.front().offset; };
  for (const Tap& t : block.run[0]->taps) {
    for (const Tap& h : block.run[1]->taps) {
      for (const Tap& w : block.run[2]->taps) {
        const int64_t kw = flipped ? kernel[2] - 1 - w.kernel : w.kernel;
        const int64_t patch = ((local(0, t) * rows + local(1, h)) * columns + local(2, w)) * channels;
        const int64_t weight = ((t.kernel * kernel[1] + h.kernel) * kernel[2] + kw) * channels;
        if (!runs.empty() && runs.back().patch + runs.back().length == patch &&
            runs.back().weight + runs.back().length == weight) {
          runs.back().length += channels;
        } else {
          runs.push_back({patch, weight, channels});
        }
      }
    }
  }
  return runs;
}

// Offsets of a block's pixels in its patch, in elements.
inline void pixel_offsets(const Block& block, int64_t channels, int64_t* offsets) {
  const int64_t rows = block.patch_size(1), columns = block.patch_size(2);
  for (int64_t i = 0; i < block.count[0]; ++i) {
    for (int64_t j = 0; j < block.count[1]; ++j) {
      for (int64_t k = 0; k < block.count[2]; ++k) {
        *offsets++ = ((i * block.run[0]->base_step * rows + j * block.run[1]->base_step) * columns +
                      k * block.run[2]->base_step) *
                     channels;
      }
    }
  }
}

}  // namespace walt::WALT_ISA::causal_conv3d
