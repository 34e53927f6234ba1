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
  int threads;
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

template <class T>
void gather_convolution(const Gather& g) {
  using Pack = Packing<T>;
  using Value = typename Pack::Value;
  using A = typename Pack::Acc;
  using Layout = PanelLayout<T>;
  constexpr int step = Pack::step;
  const WeightView& weight = g.weight;
  const int64_t kernel[3] = {weight.kernel(0), weight.kernel(1), weight.kernel(2)};
  const Layout layout(weight.in_channels, weight.out_channels, weight.taps());
  int64_t outputs = g.batches;
  for (const std::vector<AxisRun>& axis : g.axes) {
    int64_t positions = 0;
    for (const AxisRun& run : axis) positions += run.count;
    outputs *= positions;
  }
  const int threads = std::max(g.threads, 1);
  // Few enough pixels for the sums to stay near, unless they wait for further chunks anyway.
  const int64_t near = kBlockSums / (layout.panels * Layout::width);
  const int64_t most = std::clamp<int64_t>(std::max<int64_t>(near, layout.chunks.count > 1 ? 768 : 0), 192,
                                           std::max<int64_t>(outputs / (4 * threads), 192));
  const std::vector<Block> blocks =
      make_blocks(g.axes, g.batches, layout.chunks.widest() * static_cast<int64_t>(sizeof(Value)), most);
  if (blocks.empty()) return;

  Scratch<typename Pack::Lane> packed(weight.groups * layout.panels * layout.panel_size());
  pack_weights<T>(weight, threads, packed.data());
  Scratch<A> bias(weight.groups * layout.panels * Layout::width);
  for (int64_t i = 0; i < weight.groups * layout.panels * Layout::width; ++i) {
    const int64_t group = i / (layout.panels * Layout::width), n = i % (layout.panels * Layout::width);
    const bool exists = g.bias->defined() && n < weight.out_channels;
    const T* from = static_cast<const T*>(g.bias->data);
    bias[i] = exists ? to_float(from[(group * weight.out_channels + n) * g.bias->stride[0]]) : A{};
  }

  int64_t patch_size = 0, pixels = 0;
  for (const Block& block : blocks) {
    pixels = std::max(pixels, block.pixels());
    if (block.empty()) continue;
    patch_size =
        std::max(patch_size, block.patch_size(0) * block.patch_size(1) * block.patch_size(2) * layout.chunks.widest());
  }
  // Few blocks: several tasks share one, each with its own panels.
  const int64_t tasks = static_cast<int64_t>(blocks.size()) * weight.groups;
  const int64_t splits = std::min(layout.panels, (4 * threads + tasks - 1) / tasks);
  const int64_t split_panels = (layout.panels + splits - 1) / splits;
  const int64_t patch_stride = (patch_size + 31) / 32 * 32, acc_size = pixels * Layout::width;
  Scratch<Value> patches(threads * patch_stride);
  Scratch<A> accumulators(threads * split_panels * acc_size);
  Scratch<int64_t> offsets(threads * pixels);

  parallel_for(tasks * splits, threads, [&](int64_t task, int thread) {
    const Block& block = blocks[static_cast<size_t>(task / splits / weight.groups)];
    const int64_t group = task / splits % weight.groups, split = task % splits;
    const int64_t first = part_begin(layout.panels, splits, split), end = part_begin(layout.panels, splits, split + 1);
    Value* patch = patches.data() + thread * patch_stride;
    A* acc = accumulators.data() + thread * split_panels * acc_size;
    int64_t* offset = offsets.data() + thread * pixels;
    const int64_t n = block.pixels(), tiles = (n + kTilePixels - 1) / kTilePixels;
    if (block.empty()) {  // a stride that skips these positions
      std::memset(acc, 0, static_cast<size_t>((end - first) * acc_size) * sizeof(A));
    }
    std::vector<Piece> pieces;
    for (int64_t chunk = 0; chunk < layout.chunks.count && !block.empty(); ++chunk) {
      const int64_t pitch = layout.chunks.pitch(chunk);
      fill_patch<T>(g.source, block, group * weight.in_channels + layout.chunks.begin(chunk), layout.chunks.size(chunk),
                    pitch, pieces, patch);
      pixel_offsets(block, pitch, offset);
      const auto parts = split_reduction(reduction_runs(block, pitch, kernel, weight.transposed), step);
      for (int64_t panel = first; panel < end; ++panel) {
        const int vectors = Layout::vectors(Layout::count(weight.out_channels, panel));
        const int64_t width = vectors * Layout::lanes;
        const auto* rows =
            packed.data() + (group * layout.panels + panel) * layout.panel_size() + layout.chunk_row(chunk) * width;
        A* sums = acc + (panel - first) * acc_size;
        for (size_t part = 0; part < parts.size(); ++part) {
          const std::vector<Run>& runs = parts[part];
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t begin = part_begin(n, tiles, tile), size = part_begin(n, tiles, tile + 1) - begin;
            tile_kernel_for<T>(static_cast<int>(size), vectors)(patch, offset + begin, runs.data(),
                                                                static_cast<int64_t>(runs.size()), rows,
                                                                sums + begin * width, chunk > 0 || part > 0);
          }
        }
      }
    }
    const int64_t begin = first * Layout::width;
    write_block<T>(g, block,
                   PanelSums<A>{acc, acc_size, bias.data() + group * layout.panels * Layout::width + begin,
                                std::min(weight.out_channels, end * Layout::width) - begin},
                   group * weight.out_channels + begin);
  });
}

}  // namespace walt::WALT_ISA
