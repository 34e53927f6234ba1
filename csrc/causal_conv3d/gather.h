// The convolution that forward and backward data share: every output pixel sums weighted source pixels over a list of
// taps. Blocks of output pixels are independent, and each pixel's sum has one order whatever the block, so results
// depend neither on threads nor on neighbours, batch or clip length.
#pragma once

#include "causal_conv3d/pack.h"

namespace walt::WALT_ISA {

struct Gather {
  Source source;
  std::vector<AxisRun> axes[3];
  WeightView weight;
  const TensorView* bias;         // may be undefined
  const TensorView* out;          // may be undefined: then only negative frames are computed
  const TensorView* out_history;  // frames before 0; may be undefined
  int64_t batches;
  int threads;  // at least 1
};

constexpr int64_t kBlockSums = 65536;     // accumulators of a block: 256 KiB
constexpr int64_t kReductionRows = 1536;  // of packed weights between two looks at the accumulators: 192 KiB

// Cuts runs so that the packed weights of each part stay in the second-level cache over a whole block.
inline std::vector<std::vector<Run>> split_reduction(const std::vector<Run>& runs, int64_t step) {
  const int64_t limit = kReductionRows * step;
  std::vector<std::vector<Run>> parts(1);
  int64_t used = 0;
  for (Run run : runs) {
    while (run.length > 0) {
      if (used == limit) {
        parts.emplace_back();
        used = 0;
      }
      const int64_t length = std::min(run.length, limit - used);
      parts.back().push_back({run.patch, run.weight, length});
      run = {run.patch + length, run.weight + length, run.length - length};
      used += length;
    }
  }
  return parts;
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

// Writes a block's channels from `channel` on.
template <class T, class A>
void write_block(const Gather& g, const Block& block, const PanelSums<A>& sums, int64_t channel) {
  const int64_t columns = block.count[2], rows = block.count[1];
  for (int64_t i = 0; i < block.count[0]; ++i) {
    const int64_t frame = block.position(0, i);
    const TensorView& out = frame < 0 ? *g.out_history : *g.out;
    T* to = static_cast<T*>(out.data) + block.batch * out.stride[0] + channel * out.stride[1] +
            (frame < 0 ? frame + out.shape[2] : frame) * out.stride[2] + block.position(2, 0) * out.stride[4];
    const int64_t column_stride = out.stride[4] * block.run[2]->step;
    const bool whole_rows = out.stride[3] * block.run[1]->step == columns * column_stride;  // one long run of pixels
    for (int64_t j = 0; j < (whole_rows ? 1 : rows); ++j) {
      write_pixels(sums, (i * rows + j) * columns, to + block.position(1, j) * out.stride[3], out.stride[1],
                   column_stride, whole_rows ? rows * columns : columns);
    }
  }
}

inline int64_t block_limit(const Gather& g, int64_t sums_per_pixel, int64_t chunks) {
  int64_t outputs = g.batches;
  for (const std::vector<AxisRun>& axis : g.axes) {
    int64_t positions = 0;
    for (const AxisRun& run : axis) positions += run.count;
    outputs *= positions;
  }
  // Few enough pixels for the sums to stay near, unless they wait for further chunks anyway, and for all threads to
  // work.
  const int64_t near = std::max<int64_t>(kBlockSums / sums_per_pixel, chunks > 1 ? 768 : 0);
  return std::max<int64_t>(std::min(near, outputs / (4 * g.threads)), 192);
}

template <class T>
class GatherKernel {
  using Pack = Packing<T>;
  using Value = typename Pack::Value;
  using A = typename Pack::Acc;
  using Layout = PanelLayout<T>;

 public:
  explicit GatherKernel(const Gather& g)
      : g_(g),
        layout_(g.weight.in_channels, g.weight.out_channels, g.weight.taps()),
        blocks_(make_blocks(g.axes, g.batches, layout_.chunks.widest() * static_cast<int64_t>(sizeof(Value)),
                            block_limit(g, layout_.panels * Layout::width, layout_.chunks.count))) {
    for (const Block& block : blocks_) {
      pixels_ = std::max(pixels_, block.pixels());
      if (block.empty()) continue;
      patch_size_ = std::max(patch_size_, block.patch_size(0) * block.patch_size(1) * block.patch_size(2));
    }
    patch_size_ *= layout_.chunks.widest();
    // Few blocks: several tasks share one, each with its own panels.
    const int64_t tasks = static_cast<int64_t>(blocks_.size()) * g.weight.groups;
    splits_ = tasks == 0 ? 1 : std::min(layout_.panels, (4 * g.threads + tasks - 1) / tasks);
  }

  void run() {
    const int64_t groups = g_.weight.groups, split_panels = (layout_.panels + splits_ - 1) / splits_;
    Scratch<typename Pack::Lane> packed(groups * layout_.panels * layout_.panel_size());
    Scratch<A> bias(groups * layout_.panels * Layout::width);
    Scratch<Value> patches(g_.threads * patch_size_);
    Scratch<A> sums(g_.threads * split_panels * pixels_ * Layout::width);
    Scratch<int64_t> offsets(g_.threads * pixels_);
    pack_weights<T>(g_.weight, g_.threads, packed.data());
    load_bias(bias.data());
    parallel_for(static_cast<int64_t>(blocks_.size()) * groups * splits_, g_.threads, [&](int64_t task, int thread) {
      const Block& block = blocks_[static_cast<size_t>(task / splits_ / groups)];
      const int64_t group = task / splits_ % groups, split = task % splits_;
      const int64_t first = group * layout_.panels;
      compute(block, group, part_begin(layout_.panels, splits_, split), part_begin(layout_.panels, splits_, split + 1),
              packed.data() + first * layout_.panel_size(), bias.data() + first * Layout::width,
              patches.data() + thread * patch_size_, offsets.data() + thread * pixels_,
              sums.data() + thread * split_panels * pixels_ * Layout::width);
    });
  }

 private:
  void load_bias(A* bias) const {
    const int64_t padded = layout_.panels * Layout::width;
    for (int64_t i = 0; i < g_.weight.groups * padded; ++i) {
      const int64_t n = i % padded, channel = i / padded * g_.weight.out_channels + n;
      const bool exists = g_.bias->defined() && n < g_.weight.out_channels;
      bias[i] = exists ? to_float(static_cast<const T*>(g_.bias->data)[channel * g_.bias->stride[0]]) : A{};
    }
  }

  // Panels [first, end) of one group over one block.
  void compute(const Block& block, int64_t group, int64_t first, int64_t end, const typename Pack::Lane* packed,
               const A* bias, Value* patch, int64_t* offsets, A* sums) const {
    const WeightView& weight = g_.weight;
    const int64_t kernel[3] = {weight.kernel(0), weight.kernel(1), weight.kernel(2)};
    const int64_t panel_sums = pixels_ * Layout::width;
    if (block.empty()) {  // a stride that skips these positions
      std::memset(sums, 0, static_cast<size_t>((end - first) * panel_sums) * sizeof(A));
    }
    std::vector<Piece> pieces;
    for (int64_t chunk = 0; chunk < layout_.chunks.count && !block.empty(); ++chunk) {
      const int64_t pitch = layout_.chunks.pitch(chunk);
      fill_patch<T>(g_.source, block, group * weight.in_channels + layout_.chunks.begin(chunk),
                    layout_.chunks.size(chunk), pitch, pieces, patch);
      pixel_offsets(block, pitch, offsets);
      const auto parts = split_reduction(reduction_runs(block, pitch, kernel, weight.transposed), Pack::step);
      for (int64_t panel = first; panel < end; ++panel) {
        const int vectors = Layout::vectors(Layout::count(weight.out_channels, panel));
        const auto* rows = packed + panel * layout_.panel_size() + layout_.chunk_row(chunk) * vectors * Layout::lanes;
        for (size_t part = 0; part < parts.size(); ++part) {
          multiply(parts[part], block.pixels(), vectors, patch, offsets, rows, sums + (panel - first) * panel_sums,
                   chunk > 0 || part > 0);
        }
      }
    }
    const int64_t channel = first * Layout::width;
    const int64_t channels = std::min(weight.out_channels, end * Layout::width) - channel;
    write_block<T>(g_, block, PanelSums<A>{sums, panel_sums, bias + channel, channels},
                   group * weight.out_channels + channel);
  }

  static void multiply(const std::vector<Run>& runs, int64_t pixels, int vectors, const Value* patch,
                       const int64_t* offsets, const typename Pack::Lane* rows, A* sums, bool resume) {
    const int64_t tiles = (pixels + kTilePixels - 1) / kTilePixels, count = static_cast<int64_t>(runs.size());
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t begin = part_begin(pixels, tiles, tile), size = part_begin(pixels, tiles, tile + 1) - begin;
      tile_kernel_for<T>(static_cast<int>(size), vectors)(patch, offsets + begin, runs.data(), count, rows,
                                                          sums + begin * vectors * Layout::lanes, resume);
    }
  }

  const Gather& g_;
  const Layout layout_;
  const std::vector<Block> blocks_;
  int64_t pixels_ = 0, patch_size_ = 0, splits_ = 1;
};

template <class T>
void gather_convolution(const Gather& g) {
  GatherKernel<T>(g).run();
}

}  // namespace walt::WALT_ISA
