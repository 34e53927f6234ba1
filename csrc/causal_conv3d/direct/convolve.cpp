// Forward and backward data as they are defined: one product for every tap and channel, a few pixels by one panel of
// output channels at a time.
#include "causal_conv3d/convolution.h"
#include "causal_conv3d/direct/pack.h"

namespace walt::WALT_ISA::causal_conv3d {
namespace {

constexpr int64_t kBlockSums = 65536;     // accumulators of a block: 256 KiB
constexpr int64_t kReductionRows = 1536;  // of packed weights between two loads of the accumulators: 192 KiB

// Cuts runs so that the packed weights of each part stay in the second-level cache over a whole block.
std::vector<std::vector<Run>> split_reduction(const std::vector<Run>& runs, int64_t step) {
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

int64_t block_limit(const Convolution& conv, int64_t sums_per_pixel, int64_t chunks) {
  int64_t outputs = conv.batches;
  for (const std::vector<AxisRun>& axis : conv.axes) {
    int64_t positions = 0;
    for (const AxisRun& run : axis) positions += run.count;
    outputs *= positions;
  }
  // Few enough pixels for the sums to stay near, unless they wait for further chunks anyway, and for all threads to
  // work.
  const int64_t near = std::max<int64_t>(kBlockSums / sums_per_pixel, chunks > 1 ? 768 : 0);
  return std::max<int64_t>(std::min(near, outputs / (4 * conv.threads)), 192);
}

template <class T>
class DirectKernel {
  using Pack = Packing<T>;
  using Value = typename Pack::Value;
  using A = typename Pack::Acc;
  using Layout = PanelLayout<T>;

 public:
  explicit DirectKernel(const Convolution& conv)
      : conv_(conv),
        layout_(conv.weight.in_channels, conv.weight.out_channels, conv.weight.taps()),
        blocks_(make_blocks(conv.axes, conv.batches, layout_.chunks.widest() * static_cast<int64_t>(sizeof(Value)),
                            block_limit(conv, layout_.panels * Layout::width, layout_.chunks.count),
                            [&](const AxisRun* const* run) { return !winograd_takes(conv, run); })) {
    for (const Block& block : blocks_) {
      pixels_ = std::max(pixels_, block.pixels());
      if (block.empty()) continue;
      patch_size_ = std::max(patch_size_, block.patch_size(0) * block.patch_size(1) * block.patch_size(2));
    }
    patch_size_ *= layout_.chunks.widest();
    // Few blocks: several tasks share one, each with its own panels.
    const int64_t tasks = static_cast<int64_t>(blocks_.size()) * conv.weight.groups;
    splits_ = tasks == 0 ? 1 : std::min(layout_.panels, (4 * conv.threads + tasks - 1) / tasks);
  }

  void run() {
    if (blocks_.empty()) return;
    const int64_t groups = conv_.weight.groups, split_panels = (layout_.panels + splits_ - 1) / splits_;
    Scratch<typename Pack::Lane> packed(groups * layout_.panels * layout_.panel_size());
    Scratch<A> bias(groups * layout_.panels * Layout::width);
    Scratch<Value> patches(conv_.threads * patch_size_);
    Scratch<A> sums(conv_.threads * split_panels * pixels_ * Layout::width);
    Scratch<int64_t> offsets(conv_.threads * pixels_);
    pack_weights<T>(conv_.weight, conv_.threads, packed.data());
    load_bias<T>(conv_, layout_.panels * Layout::width, bias.data());
    parallel_for(static_cast<int64_t>(blocks_.size()) * groups * splits_, conv_.threads, [&](int64_t task, int thread) {
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
  // Panels [first, end) of one group over one block.
  void compute(const Block& block, int64_t group, int64_t first, int64_t end, const typename Pack::Lane* packed,
               const A* bias, Value* patch, int64_t* offsets, A* sums) const {
    const WeightView& weight = conv_.weight;
    const int64_t kernel[3] = {weight.kernel(0), weight.kernel(1), weight.kernel(2)};
    const int64_t panel_sums = pixels_ * Layout::width;
    if (block.empty()) {  // a stride that skips these positions
      std::memset(sums, 0, static_cast<size_t>((end - first) * panel_sums) * sizeof(A));
    }
    std::vector<Piece> pieces;
    for (int64_t chunk = 0; chunk < layout_.chunks.count && !block.empty(); ++chunk) {
      const int64_t pitch = layout_.chunks.pitch(chunk);
      fill_patch<T>(conv_.source, block, group * weight.in_channels + layout_.chunks.begin(chunk),
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
    write_block<T>(conv_, block, PanelSums<A>{sums, panel_sums, bias + channel, channels},
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

  const Convolution& conv_;
  const Layout layout_;
  const std::vector<Block> blocks_;
  int64_t pixels_ = 0, patch_size_ = 0, splits_ = 1;
};

}  // namespace

void direct_convolve(const Convolution& conv) {
  dispatch_dtype(conv.source.view->dtype, [&](auto tag) { DirectKernel<decltype(tag)>(conv).run(); });
}

}  // namespace walt::WALT_ISA::causal_conv3d
