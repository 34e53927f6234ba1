// Backward weight as it is defined. The clip's blocks are dealt to a number of splits that depends on shapes only; each
// split adds its blocks up in order, and the splits are then summed in order: no atomics, and the same bits on any
// number of threads.
#include <algorithm>

#include "causal_conv3d/weight_gradient.h"
#include "causal_conv3d/weights.h"
#include "common/checks.h"

namespace walt::WALT_ISA::causal_conv3d {
namespace {

constexpr int64_t kSplits = 16;
constexpr int64_t kBlockPixels = 768;       // a panel of their gradients takes 96 KiB
constexpr int64_t kPartialBytes = 8 << 20;  // all splits together, where one is not already more

struct WeightGradient {
  const ConvBackwardWeightParams* params;
  PatchSource source;
  std::vector<Block> blocks;
  int64_t in_channels, out_channels, groups, taps;  // channels per group

  bool wants_weight() const { return params->grad_weight.defined(); }
  bool wants_bias() const { return params->grad_bias.defined(); }
};

template <class T>
class WeightGradientKernel {
  using Pack = PixelPacking<T>;
  using Lane = typename Pack::Lane;
  using A = typename Pack::Acc;
  using Stored = std::conditional_t<Pack::step == 2, T, A>;  // before pairs are made
  static constexpr int step = Pack::step;
  static constexpr int lanes = kLanes<A>;
  static constexpr int panel_width = 2 * lanes;

 public:
  WeightGradientKernel(const WeightGradient& g, const Chunks& chunks) : g_(g), chunks_(chunks) {
    panels_ = (g.out_channels + panel_width - 1) / panel_width;
    unit_size_ = (g.taps * chunks.widest() + 1) * panel_width;  // the bias is one more row
    units_ = g.groups * chunks.count * panels_;
    const int64_t bytes = units_ * unit_size_ * static_cast<int64_t>(sizeof(A));
    splits_ = std::max<int64_t>(1, std::min({kSplits, kPartialBytes / bytes, static_cast<int64_t>(g.blocks.size())}));
    shares_ = std::min(units_, (kSplits + splits_ - 1) / splits_);
    for (const Block& block : g.blocks) {
      patch_size_ = std::max(patch_size_, patch_pixels(block) * chunks.widest());
      pixels_ = std::max(pixels_, block.count[0] * block.count[1] * padded(block.count[2]));
    }
  }

  void run() {
    const int threads = std::max(g_.params->threads, 1);
    Scratch<A> partial(splits_ * units_ * unit_size_);
    Scratch<Lane> patches(threads * patch_size_), grads(threads * pixels_ * panel_width);
    // bfloat16 rows before they are paired.
    Scratch<Stored> unpaired(step == 2 ? threads * std::max(patch_size_, pixels_ * panel_width) : 0);
    Scratch<int64_t> offsets(threads * pixels_);
    parallel_for(splits_ * shares_, threads, [&](int64_t task, int thread) {
      const int64_t split = task / shares_, share = task % shares_;
      const ThreadScratch scratch{
          patches.data() + thread * patch_size_, grads.data() + thread * pixels_ * panel_width,
          unpaired.data() + (step == 2 ? thread * std::max(patch_size_, pixels_ * panel_width) : 0),
          offsets.data() + thread * pixels_};
      accumulate_split(scratch, partial.data() + split * units_ * unit_size_, split, part_begin(units_, shares_, share),
                       part_begin(units_, shares_, share + 1));
    });
    const int64_t rows = g_.taps * std::min(chunks_.widest(), kStoreChannels) * panel_width;
    Scratch<A> scratch(threads * rows);
    parallel_for(units_, threads,
                 [&](int64_t unit, int thread) { reduce(partial.data(), unit, scratch.data() + thread * rows); });
  }

 private:
  struct ThreadScratch {
    Lane* patch;
    Lane* grad;
    Stored* unpaired;
    int64_t* offsets;
  };

  static int64_t padded(int64_t columns) { return (columns + step - 1) / step * step; }
  static int64_t patch_pixels(const Block& block) {
    return block.patch_size(0) * block.patch_size(1) * block.patch_size(2);
  }
  // A unit is a panel of output channels against a chunk of input channels of one group.
  int64_t group(int64_t unit) const { return unit / panels_ / chunks_.count; }
  int64_t chunk(int64_t unit) const { return unit / panels_ % chunks_.count; }
  int64_t out_channel(int64_t unit) const { return group(unit) * g_.out_channels + unit % panels_ * panel_width; }
  int64_t count(int64_t unit) const {
    return std::min<int64_t>(panel_width, g_.out_channels - unit % panels_ * panel_width);
  }
  int64_t bias_row(int64_t unit) const { return g_.taps * chunks_.size(chunk(unit)) * panel_width; }

  // Adds the blocks of one split to the partial sums of units [begin, end).
  void accumulate_split(const ThreadScratch& scratch, A* partial, int64_t split, int64_t begin, int64_t end) const {
    std::memset(partial + begin * unit_size_, 0, static_cast<size_t>((end - begin) * unit_size_) * sizeof(A));
    const int64_t blocks = static_cast<int64_t>(g_.blocks.size());
    std::vector<Piece> pieces;
    std::vector<Run> runs;
    for (int64_t b = part_begin(blocks, splits_, split); b < part_begin(blocks, splits_, split + 1); ++b) {
      const Block& block = g_.blocks[static_cast<size_t>(b)];
      int64_t pixels = 0, filled = -1;  // the group and chunk in the patch
      for (int64_t unit = begin; unit < end; ++unit) {
        if (unit / panels_ != filled) {
          filled = unit / panels_;
          const int64_t channels = chunks_.size(chunk(unit));
          pixels = pair_offsets(block, channels, scratch.offsets);
          runs = reduction_runs(block, channels, g_.params->kernel.data(), false);
          const int64_t channel = group(unit) * g_.in_channels + chunks_.begin(chunk(unit));
          if (g_.wants_weight()) load_patch(block, channel, channels, scratch, pieces);
        }
        const int vectors = count(unit) <= lanes ? 1 : 2;
        load_grad(block, unit, vectors * lanes, scratch);
        A* sum = partial + unit * unit_size_;
        if (g_.wants_weight()) multiply(runs, scratch, pixels, vectors, sum);
        if (g_.wants_bias() && chunk(unit) == 0) add_bias(scratch.grad, pixels, vectors * lanes, sum + bias_row(unit));
      }
    }
  }

  static void multiply(const std::vector<Run>& runs, const ThreadScratch& scratch, int64_t pixels, int vectors,
                       A* sum) {
    for (const Run& run : runs) {
      const int64_t tiles = (run.length + kTilePixels - 1) / kTilePixels;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = part_begin(run.length, tiles, tile), size = part_begin(run.length, tiles, tile + 1) - i;
        weight_tile_for<T>(static_cast<int>(size), vectors)(scratch.patch + run.patch + i, scratch.offsets, pixels,
                                                            scratch.grad, sum + (run.weight + i) * vectors * lanes);
      }
    }
  }

  // Offsets of pixels in the patch, or of pairs of pixels in a row.
  static int64_t pair_offsets(const Block& block, int64_t channels, int64_t* offsets) {
    pixel_offsets(block, channels, offsets);
    if constexpr (step == 1) return block.pixels();
    int64_t n = 0;
    for (int64_t row = 0; row < block.count[0] * block.count[1]; ++row) {
      for (int64_t k = 0; k < block.count[2]; k += step) offsets[n++] = offsets[row * block.count[2] + k];
    }
    return n;
  }

  void load_patch(const Block& block, int64_t channel, int64_t channels, const ThreadScratch& scratch,
                  std::vector<Piece>& pieces) const {
    if constexpr (step == 1) {
      fill_patch<T>(g_.source, block, channel, channels, channels, pieces, scratch.patch);
    } else {
      fill_patch<T>(g_.source, block, channel, channels, channels, pieces, scratch.unpaired);
      const int64_t row = block.patch_size(2) * channels, next = block.run[2]->base_step * channels;
      for (int64_t r = 0; r < block.patch_size(0) * block.patch_size(1); ++r) {
        pair_up(scratch.unpaired + r * row, next, row, scratch.patch + r * row);
      }
    }
  }

  // to[i] = (from[i], from[i + next]) for i < n; past the end the second is zero.
  static void pair_up(const bfloat16* from, int64_t next, int64_t n, int32_t* to) {
    const int64_t both = std::max<int64_t>(n - next, 0);
    for (int64_t i = 0; i < both; ++i) {
      to[i] = static_cast<int32_t>(from[i].bits | static_cast<uint32_t>(from[i + next].bits) << 16);
    }
    for (int64_t i = both; i < n; ++i) to[i] = from[i].bits;
  }

  // The output gradient's panel as [pixel][width], or [pair][width] of pairs.
  void load_grad(const Block& block, int64_t unit, int64_t width, const ThreadScratch& scratch) const {
    const TensorView& view = g_.params->grad_y;
    const int64_t columns = block.count[2], row_pixels = padded(columns);
    Stored* rows = nullptr;
    if constexpr (step == 1) {
      rows = scratch.grad;
    } else {
      rows = scratch.unpaired;
    }
    if (count(unit) != width || row_pixels != columns) {
      std::memset(rows, 0, static_cast<size_t>(block.count[0] * block.count[1] * row_pixels * width) * sizeof(Stored));
    }
    for (int64_t i = 0; i < block.count[0]; ++i) {
      for (int64_t j = 0; j < block.count[1]; ++j) {
        const T* from = static_cast<const T*>(view.data) + block.batch * view.stride[0] +
                        out_channel(unit) * view.stride[1] + block.position(0, i) * view.stride[2] +
                        block.position(1, j) * view.stride[3] + block.position(2, 0) * view.stride[4];
        Stored* to = rows + (i * block.count[1] + j) * row_pixels * width;
        copy_columns(from, view.stride[1], view.stride[4], to, width, count(unit), columns);
      }
    }
    if constexpr (step == 2) {
      const int64_t pairs = block.count[0] * block.count[1] * row_pixels / 2;
      for (int64_t p = 0; p < pairs; ++p) {
        const bfloat16 *first = rows + 2 * p * width, *second = first + width;
        for (int64_t n = 0; n < width; ++n) {
          scratch.grad[p * width + n] =
              static_cast<int32_t>(first[n].bits | static_cast<uint32_t>(second[n].bits) << 16);
        }
      }
    }
  }

  static void add_bias(const Lane* grad, int64_t pixels, int64_t width, A* sum) {
    A total[panel_width] = {};
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t n = 0; n < width; ++n) total[n] += lane_sum(grad[p * width + n]);
    }
    for (int64_t n = 0; n < width; ++n) sum[n] += total[n];
  }
  static float lane_sum(float x) { return x; }
  static double lane_sum(double x) { return x; }
  static float lane_sum(int32_t pair) {
    const uint32_t bits = static_cast<uint32_t>(pair);
    return to_float(bfloat16{static_cast<uint16_t>(bits)}) + to_float(bfloat16{static_cast<uint16_t>(bits >> 16)});
  }

  // Sums the splits of one unit, in order, and writes them.
  void reduce(const A* partial, int64_t unit, A* rows) const {
    const int64_t width = (count(unit) <= lanes ? 1 : 2) * lanes, n = count(unit), taps = g_.taps;
    const auto sum_row = [&](int64_t row, A* to) {
      const A* from = partial + unit * unit_size_ + row;
      for (int64_t v = 0; v < width; v += lanes) {
        vector_t<A> sum = load(from + v);
        for (int64_t s = 1; s < splits_; ++s) sum += load(from + s * units_ * unit_size_ + v);
        store(to + v, sum);
      }
    };
    if (g_.wants_bias() && chunk(unit) == 0) {
      sum_row(bias_row(unit), rows);
      const TensorView& bias = g_.params->grad_bias;
      for (int64_t i = 0; i < n; ++i) {
        static_cast<T*>(bias.data)[(out_channel(unit) + i) * bias.stride[0]] = from_float<T>(rows[i]);
      }
    }
    if (!g_.wants_weight()) return;
    const int64_t channels = chunks_.size(chunk(unit));
    for (int64_t first = 0; first < channels; first += kStoreChannels) {
      const int64_t end = std::min(first + kStoreChannels, channels);
      for (int64_t c = first; c < end; ++c) {
        for (int64_t i = 0; i < taps; ++i) {
          sum_row((i * channels + c) * width, rows + ((c - first) * taps + i) * width);
        }
      }
      store_weight_gradient<T>(*g_.params, rows, width, out_channel(unit), n, chunks_.begin(chunk(unit)) + first,
                               end - first);
    }
  }

  const WeightGradient& g_;
  const Chunks chunks_;
  int64_t panels_, units_, unit_size_, splits_, shares_, patch_size_ = 0, pixels_ = 0;
};

}  // namespace

void direct_backward_weight(const ConvBackwardWeightParams& p, const Axis (&axes)[3]) {
  const std::vector<AxisRun> runs[3] = {forward_runs(axes[0], true), forward_runs(axes[1], false),
                                        forward_runs(axes[2], false)};
  const int64_t in_channels = p.x.shape[1] / p.groups;
  dispatch_dtype(p.x.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int64_t lane_bytes = sizeof(typename PixelPacking<T>::Lane);
    const Chunks chunks(in_channels, 1, kChunkBytes / lane_bytes);
    const WeightGradient g{&p,
                           {&p.x, &p.history, {forward_map(axes[0]), forward_map(axes[1]), forward_map(axes[2])}},
                           make_blocks(runs, p.x.shape[0], chunks.widest() * lane_bytes, kBlockPixels),
                           in_channels,
                           p.grad_y.shape[1] / p.groups,
                           p.groups,
                           p.kernel[0] * p.kernel[1] * p.kernel[2]};
    WeightGradientKernel<T>(g, chunks).run();
  });
}

}  // namespace walt::WALT_ISA::causal_conv3d
