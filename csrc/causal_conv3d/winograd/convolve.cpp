// Forward and backward data by Winograd's minimal filtering, for runs of positions that read a plain 3 x 3 of each
// frame: tiles of m x m output pixels from (m + 2)^2 products per channel and time tap. A task walks over the frames of
// one part of the plane, and each frame is transformed once:
//
//   source  ->  transformed[position][frame][tile][channel]                     a ring of frames
//           ->  products[position][panel][frame][tile][width]                   sums over time taps and channels
//           ->  m x m pixels, bias added, written
//
// Where tiles lie depends on the run alone, so neither batch, clip length nor threads change a result.
#include "causal_conv3d/convolution.h"
#include "causal_conv3d/winograd/pack.h"
#include "causal_conv3d/winograd/tiles.h"

namespace walt::WALT_ISA::causal_conv3d {
namespace {

// Whether neighbouring outputs read three neighbouring source positions each, by kernel index 0, 1, 2 or 2, 1, 0.
bool three_taps(const AxisRun& run) {
  if (run.taps.size() != 3 || run.step != 1 || run.base_step != 1) return false;
  for (int64_t i = 0; i < 3; ++i) {
    const Tap &tap = run.taps[static_cast<size_t>(i)], &first = run.taps[0];
    if (tap.offset != first.offset + i || tap.kernel != (first.kernel == 2 ? 2 - i : i)) return false;
  }
  return true;
}

constexpr int64_t kTransformedBytes = 4 << 20;  // of the source, of one thread
constexpr int64_t kProductBytes = 2 << 20;      // likewise
constexpr int64_t kWeightBytes = 16 << 20;      // transformed at a time: half of a last-level cache
constexpr int64_t kProductRows = 192;           // tiles that share a pass over the weights, at most
constexpr int64_t kThreadProducts = 1 << 16;    // of a position of the tiles

template <class T>
class WinogradKernel {
  static constexpr int m = kWinogradTile<T>;
  using A = accumulate_t<T>;
  using Layout = WinogradLayout<A, m>;
  static constexpr int n = Layout::n, positions = Layout::positions, lanes = Layout::lanes, width = Layout::width;

  // Positions of one run of rows and one of columns, whole tiles of them, and how they are cut into blocks.
  struct Plane {
    AxisRun rows, columns;
    int64_t height, width;            // in positions
    int64_t row_tiles, column_tiles;  // in all
    int64_t row_parts, column_parts;
  };
  // A few output frames of one run, computed together.
  struct Step {
    const AxisRun* run;
    int64_t begin, count;
  };
  struct Task {
    const Plane* plane;
    int64_t batch, group, row, rows, column, columns;  // tiles
    int64_t first_step, end_step;
  };
  // One group's transformed panels [first, end) and its whole bias.
  struct Weights {
    const A *packed, *bias;
    int64_t first, end;
  };
  struct ThreadScratch {
    A *patch, *transformed, *products, *pixels;
    std::vector<int64_t> held;  // the source frame in each slot of the ring
    std::vector<Piece> pieces;
  };

 public:
  explicit WinogradKernel(const Convolution& conv)
      : conv_(conv),
        source_(conv.source),
        layout_(conv.weight, conv.axes[0]),
        pitch_((layout_.channels + lanes - 1) / lanes * lanes) {
    for (const AxisRun& h : conv.axes[1]) {
      for (const AxisRun& w : conv.axes[2]) {
        for (const AxisRun& t : conv.axes[0]) {
          const AxisRun* const run[3] = {&t, &h, &w};
          if (!winograd_takes(conv, run)) continue;
          planes_.push_back(plane(h, w));
          break;
        }
      }
    }
    if (planes_.empty() || conv.batches == 0) return;
    for (int axis = 1; axis < 3; ++axis) source_.map[axis].position.insert(source_.map[axis].position.end(), m, -1);
    choose_blocks();
    make_steps();
    make_tasks();
  }

  void run() {
    if (tasks_.empty()) return;
    const int64_t groups = conv_.weight.groups, padded = layout_.panels * width;
    const int64_t patch = (m * row_limit_ + 2) * (m * column_limit_ + 2) * patch_channels();
    const int64_t pixels = panel_limit_ * m * m * column_limit_ * width;
    Scratch<A> packed(groups * positions * pass_limit_ * layout_.panel_size()), bias(groups * padded);
    Scratch<A> patches(conv_.threads * patch), transformed(conv_.threads * positions * slice_);
    Scratch<A> products(conv_.threads * positions * product_slice_), outputs(conv_.threads * pixels);
    load_bias<T>(conv_, padded, bias.data());
    const bool flipped = planes_[0].rows.taps[0].kernel == 2;
    const int64_t passes = (layout_.panels + pass_limit_ - 1) / pass_limit_;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t first = part_begin(layout_.panels, passes, pass),
                    end = part_begin(layout_.panels, passes, pass + 1);
      pack_winograd<T, m>(conv_.weight, layout_, first, end, flipped, conv_.threads, packed.data());
      parallel_for(static_cast<int64_t>(tasks_.size()) * splits_, conv_.threads, [&](int64_t i, int thread) {
        ThreadScratch scratch{patches.data() + thread * patch,
                              transformed.data() + thread * positions * slice_,
                              products.data() + thread * positions * product_slice_,
                              outputs.data() + thread * pixels,
                              std::vector<int64_t>(static_cast<size_t>(ring_), INT64_MIN),
                              {}};
        const Task& task = tasks_[static_cast<size_t>(i / splits_)];
        const Weights weights{packed.data() + task.group * positions * (end - first) * layout_.panel_size(),
                              bias.data() + task.group * padded, first, end};
        compute(task, weights, first + part_begin(end - first, splits_, i % splits_),
                first + part_begin(end - first, splits_, i % splits_ + 1), scratch);
      });
    }
  }

 private:
  static int64_t tiles(int64_t positions) { return (positions + m - 1) / m; }
  int64_t patch_channels() const { return std::min<int64_t>(pitch_, kChunkBytes / static_cast<int64_t>(sizeof(A))); }

  static Plane plane(const AxisRun& h, const AxisRun& w) {
    Plane plane{h, w, h.count, w.count, tiles(h.count), tiles(w.count), 1, 1};
    plane.rows.count = plane.row_tiles * m;
    plane.columns.count = plane.column_tiles * m;
    return plane;
  }

  // Source frames from the first to the last that `frames` neighbouring output frames read.
  int64_t span(int64_t frames) const {
    int64_t most = 1;
    for (const AxisRun& t : conv_.axes[0]) {
      if (!t.taps.empty()) most = std::max(most, t.extent(std::min(frames, t.count)));
    }
    return most;
  }

  // Blocks as large as the cache allows, for weights are read once per block and step; but some for every thread.
  void choose_blocks() {
    int64_t longest = 1;
    for (const AxisRun& t : conv_.axes[0]) longest = std::max(longest, t.count);
    int64_t widest = 1, tallest = 1;
    for (const Plane& plane : planes_) {
      widest = std::max(widest, plane.column_tiles);
      tallest = std::max(tallest, plane.row_tiles);
    }
    const int64_t parts = (widest + 15) / 16;
    column_limit_ = (widest + parts - 1) / parts;
    const auto bytes = [&](int64_t rows, int64_t frames) {
      return positions * span(frames) * rows * column_limit_ * pitch_ * static_cast<int64_t>(sizeof(A));
    };
    while (column_limit_ > 1 && bytes(1, 1) > kTransformedBytes) column_limit_ = (column_limit_ + 1) / 2;
    const int64_t planes = conv_.batches * conv_.weight.groups * static_cast<int64_t>(planes_.size());
    const int64_t apart = planes * parts * ((layout_.panels + 1) / 2);  // tasks in any case, see make_tasks
    const int64_t products = widest * tallest * longest * layout_.channels * conv_.weight.out_channels;
    // Blocks along the height. Too few products are not worth waking a thread for.
    const int64_t wanted = products < kThreadProducts ? 1 : (conv_.threads + apart - 1) / apart;
    tallest = std::min<int64_t>((tallest + wanted - 1) / wanted, 64);
    double best = 0;
    for (int64_t rows = 1; rows <= tallest; ++rows) {
      for (int64_t frames = 1; frames <= std::min<int64_t>(longest, 16); ++frames) {
        const int64_t sums = frames * rows * column_limit_;
        if (best > 0 && (bytes(rows, frames) > kTransformedBytes || sums > kProductRows)) continue;
        const double halo =
            (1 + 2.0 / static_cast<double>(rows * m)) * (1 + 2.0 / static_cast<double>(column_limit_ * m));
        const double cost = 11.0 / static_cast<double>(sums) + halo / static_cast<double>(layout_.panels * width);
        if (best == 0 || cost < best) {
          best = cost;
          row_limit_ = rows;
          frame_limit_ = frames;
        }
      }
    }
    ring_ = span(frame_limit_);
    // Powers of two apart, the positions of a tile would compete for the same lines of the cache.
    slice_ = ring_ * row_limit_ * column_limit_ * pitch_ + 5 * 64 / static_cast<int64_t>(sizeof(A));
    const int64_t sums = frame_limit_ * row_limit_ * column_limit_ * width;
    panel_limit_ = std::max<int64_t>(
        1, std::min(layout_.panels, kProductBytes / (positions * sums * static_cast<int64_t>(sizeof(A)))));
    product_slice_ = panel_limit_ * sums + 5 * 64 / static_cast<int64_t>(sizeof(A));
    const int64_t panel_bytes =
        conv_.weight.groups * positions * layout_.panel_size() * static_cast<int64_t>(sizeof(A));
    pass_limit_ = std::max<int64_t>(1, std::min(layout_.panels, kWeightBytes / panel_bytes));
    for (Plane& plane : planes_) {
      plane.row_parts = (plane.row_tiles + row_limit_ - 1) / row_limit_;
      plane.column_parts = (plane.column_tiles + column_limit_ - 1) / column_limit_;
    }
  }

  void make_steps() {
    for (const AxisRun& t : conv_.axes[0]) {
      if (t.taps.empty()) continue;
      const int64_t parts = (t.count + frame_limit_ - 1) / frame_limit_;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t begin = part_begin(t.count, parts, i);
        steps_.push_back({&t, begin, part_begin(t.count, parts, i + 1) - begin});
      }
    }
  }

  // Few blocks: several tasks share one, each with its own frames or panels.
  void make_tasks() {
    int64_t blocks = 0;
    for (const Plane& plane : planes_) blocks += plane.row_parts * plane.column_parts;
    blocks *= conv_.batches * conv_.weight.groups;
    const int64_t steps = static_cast<int64_t>(steps_.size()), wanted = (8 * conv_.threads + blocks - 1) / blocks;
    const int64_t segments = std::min((steps + 3) / 4, wanted);
    splits_ = std::min((pass_limit_ + 1) / 2, (wanted + segments - 1) / segments);
    for (const Plane& plane : planes_) {
      const int64_t parts = plane.row_parts * plane.column_parts;
      for (int64_t i = 0; i < conv_.batches * conv_.weight.groups * parts * segments; ++i) {
        const int64_t segment = i % segments, part = i / segments % parts, sample = i / segments / parts;
        const int64_t row = part / plane.column_parts, column = part % plane.column_parts;
        Task task{};
        task.plane = &plane;
        task.batch = sample / conv_.weight.groups;
        task.group = sample % conv_.weight.groups;
        task.row = part_begin(plane.row_tiles, plane.row_parts, row);
        task.rows = part_begin(plane.row_tiles, plane.row_parts, row + 1) - task.row;
        task.column = part_begin(plane.column_tiles, plane.column_parts, column);
        task.columns = part_begin(plane.column_tiles, plane.column_parts, column + 1) - task.column;
        task.first_step = part_begin(steps, segments, segment);
        task.end_step = part_begin(steps, segments, segment + 1);
        tasks_.push_back(task);
      }
    }
  }

  int64_t slot(int64_t frame) const { return (frame % ring_ + ring_) % ring_; }

  // Panels [panel, end_panel).
  void compute(const Task& task, const Weights& weights, int64_t panel, int64_t end_panel,
               ThreadScratch& scratch) const {
    for (int64_t s = task.first_step; s < task.end_step; ++s) {
      const Step& step = steps_[static_cast<size_t>(s)];
      for (int64_t f = 0; f < step.count; ++f) {
        for (const Tap& tap : step.run->taps) {
          const int64_t frame = step.run->base + (step.begin + f) * step.run->base_step + tap.offset;
          int64_t& held = scratch.held[static_cast<size_t>(slot(frame))];
          if (held != frame) transform_frame(task, frame, scratch);
          held = frame;
        }
      }
      for (int64_t first = panel; first < end_panel; first += panel_limit_) {
        const int64_t end = std::min(first + panel_limit_, end_panel);
        multiply(task, step, first, end, weights, scratch);
        for (int64_t f = 0; f < step.count; ++f) write(task, step, f, first, end, weights.bias, scratch);
      }
    }
  }

  void transform_frame(const Task& task, int64_t frame, ThreadScratch& scratch) const {
    const AxisRun time{0, 1, 0, 1, 1, {{0, 0}}};
    const Block block{{&time, &task.plane->rows, &task.plane->columns},
                      {frame, task.row * m, task.column * m},
                      {1, task.rows * m, task.columns * m},
                      task.batch};
    const int64_t columns = task.columns * m + 2;
    A* to = scratch.transformed + slot(frame) * row_limit_ * column_limit_ * pitch_;
    for (int64_t c = 0; c < layout_.channels; c += patch_channels()) {
      const int64_t channels = std::min(patch_channels(), layout_.channels - c);
      const int64_t pitch = (channels + lanes - 1) / lanes * lanes;
      fill_patch<T>(source_, block, task.group * layout_.channels + c, channels, pitch, scratch.pieces, scratch.patch);
      for (int64_t row = 0; row < task.rows; ++row) {
        transform_input<m>(scratch.patch + row * m * columns * pitch, columns * pitch, pitch, task.columns,
                           to + row * task.columns * pitch_ + c, slice_, pitch_);
      }
    }
  }

  int vectors(int64_t panel) const { return conv_.weight.out_channels - panel * width <= lanes ? 1 : 2; }

  void multiply(const Task& task, const Step& step, int64_t first, int64_t end, const Weights& weights,
                ThreadScratch& scratch) const {
    const int64_t count = task.rows * task.columns, parts = (count + kTilePixels - 1) / kTilePixels;
    const int64_t frame_size = row_limit_ * column_limit_;
    std::vector<int64_t> offsets;
    for (int64_t i = 0; i < count; ++i) offsets.push_back(i * pitch_);
    std::vector<std::vector<Run>> runs(static_cast<size_t>(step.count));
    for (int64_t f = 0; f < step.count; ++f) {
      for (const Tap& tap : step.run->taps) {
        const int64_t frame = step.run->base + (step.begin + f) * step.run->base_step + tap.offset;
        runs[static_cast<size_t>(f)].push_back({slot(frame) * frame_size * pitch_,
                                                layout_.time_slot[static_cast<size_t>(tap.kernel)] * layout_.channels,
                                                layout_.channels});
      }
    }
    for (int position = 0; position < positions; ++position) {
      const A* from = scratch.transformed + position * slice_;
      for (int64_t panel = first; panel < end; ++panel) {
        const A* rows =
            weights.packed + (position * (weights.end - weights.first) + panel - weights.first) * layout_.panel_size();
        A* to = scratch.products + position * product_slice_ + (panel - first) * frame_limit_ * frame_size * width;
        for (int64_t f = 0; f < step.count; ++f) {
          const std::vector<Run>& list = runs[static_cast<size_t>(f)];
          for (int64_t part = 0; part < parts; ++part) {
            const int64_t begin = part_begin(count, parts, part), size = part_begin(count, parts, part + 1) - begin;
            tile_kernel_for<A>(static_cast<int>(size), vectors(panel))(
                from, offsets.data() + begin, list.data(), static_cast<int64_t>(list.size()), rows,
                to + (f * frame_size + begin) * vectors(panel) * lanes, false);
          }
        }
      }
    }
  }

  // Output frame f of the step, panels [first, end).
  void write(const Task& task, const Step& step, int64_t f, int64_t first, int64_t end, const A* bias,
             ThreadScratch& scratch) const {
    const Plane& plane = *task.plane;
    const int64_t frame_size = row_limit_ * column_limit_, panel_pixels = m * m * task.columns * width;
    const int64_t frame = step.run->first + (step.begin + f) * step.run->step;
    const int64_t channel = first * width, channels = std::min(conv_.weight.out_channels, end * width) - channel;
    const int64_t columns = std::min(task.columns * m, plane.width - task.column * m);
    for (int64_t row = 0; row < task.rows; ++row) {
      for (int64_t panel = first; panel < end; ++panel) {
        const A* from = scratch.products + (panel - first) * frame_limit_ * frame_size * width +
                        (f * frame_size + row * task.columns) * vectors(panel) * lanes;
        transform_output<m>(from, product_slice_, vectors(panel), task.columns,
                            scratch.pixels + (panel - first) * panel_pixels);
      }
      const PanelSums<A> sums{scratch.pixels, panel_pixels, bias + channel, channels};
      const int64_t y = (task.row + row) * m;
      for (int64_t i = 0; i < std::min<int64_t>(m, plane.height - y); ++i) {
        T* to = output_address<T>(conv_, task.batch, task.group * conv_.weight.out_channels + channel, frame,
                                  plane.rows.first + y + i, plane.columns.first + task.column * m);
        const TensorView& out = frame < 0 ? *conv_.out_history : *conv_.out;
        write_pixels(sums, i * task.columns * m, to, out.stride[1], out.stride[4], columns);
      }
    }
  }

  const Convolution& conv_;
  PatchSource source_;  // the Convolution's, with zeros beyond the far edges for tiles that overhang
  const Layout layout_;
  const int64_t pitch_;  // channels of a transformed tile, whole vectors
  std::vector<Plane> planes_;
  std::vector<Step> steps_;
  std::vector<Task> tasks_;
  int64_t row_limit_ = 1, column_limit_ = 1, frame_limit_ = 1, panel_limit_ = 1;  // of a block: tiles, frames, panels
  int64_t pass_limit_ = 1, splits_ = 1;  // panels whose weights are there at a time, parts of them in different tasks
  int64_t ring_ = 1, slice_ = 0, product_slice_ = 0;
};

}  // namespace

bool winograd_takes(const Convolution& conv, const AxisRun* const run[3]) {
  const WeightView& weight = conv.weight;
  if (run[0]->taps.empty() || weight.kernel(1) != 3 || weight.kernel(2) != 3) return false;
  if (!three_taps(*run[1]) || !three_taps(*run[2])) return false;
  // Measured: from 8 channels on both sides and 3 x 3 outputs on. Frames of far more channels would not fit the
  // scratch.
  if (weight.in_channels * weight.kernel(0) > 16384) return false;
  const int64_t channels = std::min(weight.in_channels, weight.out_channels);
#if defined(WALT_HAS_BF16_DOT)
  if (conv.source.view->dtype == DType::bfloat16) {
    return winograd_beats_pairs(channels, run[1]->count, run[2]->count);
  }
#endif
  return channels >= 8 && std::min(run[1]->count, run[2]->count) >= 3;
}

void winograd_convolve(const Convolution& conv) {
  dispatch_dtype(conv.source.view->dtype, [&](auto tag) { WinogradKernel<decltype(tag)>(conv).run(); });
}

}  // namespace walt::WALT_ISA::causal_conv3d
