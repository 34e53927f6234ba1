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

constexpr int64_t kMostPixels = 2048;     // of a block: 256 KiB of accumulators
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

// Writes `columns` pixels of `count` channels from [pixel][width] accumulators.
template <class T, class A>
void write_pixels(const A* acc, int64_t width, const A* bias, T* to, int64_t channel_stride, int64_t column_stride,
                  int64_t count, int64_t columns) {
  constexpr int lanes = kLanes<A>;
  if (channel_stride == 1) {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t c = 0; c < count; c += lanes) {
        const vector_t<A> sum = load(acc + i * width + c) + load(bias + c);
        if (c + lanes <= count) {
          store_flushed(to + i * column_stride + c, sum);
        } else {
          store_partial(to + i * column_stride + c, sum, count - c);
        }
      }
    }
    return;
  }
  for (int64_t i = 0; i < columns; i += lanes) {
    const int64_t pixels = std::min<int64_t>(lanes, columns - i);
    for (int64_t c = 0; c < count; c += lanes) {
      vector_t<A> tile[lanes] = {};
      for (int64_t k = 0; k < pixels; ++k) tile[k] = load(acc + (i + k) * width + c) + load(bias + c);
      transpose(tile);
      for (int64_t k = 0; k < std::min<int64_t>(lanes, count - c); ++k) {
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

// Writes a block's panel: `count` channels from `channel` on.
template <class T, class A>
void write_block(const Gather& g, const Block& block, const A* acc, int64_t width, const A* bias, int64_t channel,
                 int64_t count) {
  const int64_t columns = block.count[2];
  for (int64_t i = 0; i < block.count[0]; ++i) {
    const int64_t frame = block.position(0, i);
    const TensorView& out = frame < 0 ? *g.out_history : *g.out;
    T* to = static_cast<T*>(out.data) + block.batch * out.stride[0] + channel * out.stride[1] +
            (frame < 0 ? frame + out.shape[2] : frame) * out.stride[2] + block.position(2, 0) * out.stride[4];
    const int64_t column_stride = out.stride[4] * block.run[2]->step;
    const int64_t row_stride = out.stride[3] * block.run[1]->step;
    if (row_stride == columns * column_stride) {  // whole rows: one long run of pixels
      write_pixels(acc, width, bias, to + block.position(1, 0) * out.stride[3], out.stride[1], column_stride, count,
                   columns * block.count[1]);
    } else {
      for (int64_t j = 0; j < block.count[1]; ++j) {
        write_pixels(acc + j * columns * width, width, bias, to + block.position(1, j) * out.stride[3], out.stride[1],
                     column_stride, count, columns);
      }
    }
    acc += block.count[1] * columns * width;
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
  const int64_t most = std::clamp<int64_t>(outputs / (4 * threads), 192, kMostPixels);
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
  // Panels whose sums go on in the next chunk need room for each.
  const int64_t slots = layout.chunks.count == 1 ? 1 : (layout.panels + splits - 1) / splits;
  const int64_t patch_stride = (patch_size + 31) / 32 * 32, acc_size = pixels * Layout::width;
  Scratch<Value> patches(threads * patch_stride);
  Scratch<A> accumulators(threads * slots * acc_size);
  Scratch<int64_t> offsets(threads * pixels);

  parallel_for(tasks * splits, threads, [&](int64_t task, int thread) {
    const Block& block = blocks[static_cast<size_t>(task / splits / weight.groups)];
    const int64_t group = task / splits % weight.groups, split = task % splits;
    const int64_t first = part_begin(layout.panels, splits, split), end = part_begin(layout.panels, splits, split + 1);
    Value* patch = patches.data() + thread * patch_stride;
    A* acc = accumulators.data() + thread * slots * acc_size;
    int64_t* offset = offsets.data() + thread * pixels;
    const int64_t n = block.pixels(), tiles = (n + kTilePixels - 1) / kTilePixels;
    const auto write = [&](int64_t panel, const A* sums) {
      const int64_t count = Layout::count(weight.out_channels, panel);
      write_block<T>(g, block, sums, Layout::vectors(count) * Layout::lanes,
                     bias.data() + (group * layout.panels + panel) * Layout::width,
                     group * weight.out_channels + panel * Layout::width, count);
    };
    if (block.empty()) {  // a stride that skips these positions
      std::memset(acc, 0, static_cast<size_t>(acc_size) * sizeof(A));
      for (int64_t panel = first; panel < end; ++panel) write(panel, acc);
      return;
    }
    std::vector<Piece> pieces;
    for (int64_t chunk = 0; chunk < layout.chunks.count; ++chunk) {
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
        A* sums = acc + (slots == 1 ? 0 : panel - first) * acc_size;
        for (size_t part = 0; part < parts.size(); ++part) {
          const std::vector<Run>& runs = parts[part];
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t begin = part_begin(n, tiles, tile), size = part_begin(n, tiles, tile + 1) - begin;
            tile_kernel_for<T>(static_cast<int>(size), vectors)(patch, offset + begin, runs.data(),
                                                                static_cast<int64_t>(runs.size()), rows,
                                                                sums + begin * width, chunk > 0 || part > 0);
          }
        }
        if (chunk + 1 == layout.chunks.count) write(panel, sums);
      }
    }
  });
}

}  // namespace walt::WALT_ISA
