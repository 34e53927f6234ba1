// Backward weight of 3 x 3 kernels by Winograd's method: (m + 2)^2 products per tile of m x m outputs instead of 9 m^2.
//
//   dg = G^T [ sum over tiles of (A dy A^T) * (B^T d B) ] G
//
// A slab of the clip (some frames of some tiles) is transformed once, by all threads; then, for each position of a
// tile, all taps in time multiply the same transformed frames, shifted. Every product adds to one set of sums in
// the order of the slabs, whichever thread does it: the same bits on any number of threads.
#include "causal_conv3d/weight_gradient.h"
#include "causal_conv3d/weights.h"
#include "causal_conv3d/winograd/tiles.h"

namespace walt::WALT_ISA::causal_conv3d {
namespace {

// Input and output channels at a time: at most 3 MiB of sums for 3 taps in time.
template <int m>
constexpr int64_t kUnitChannels = m == 2 ? 128 : 64;
constexpr int64_t kSlabBytes = 6 << 20;  // of transformed tiles; with the sums they stay in a third-level cache
constexpr int64_t kSlabColumns = 64;     // tiles
constexpr int64_t kPieceTiles = 128;     // a panel of gradients and as many lines of inputs stay in the first level

template <class T>
class WinogradWeightKernel {
  using A = accumulate_t<T>;
  static constexpr int m = kWinogradTile<T>;
  using Tile = Winograd<m>;
  static constexpr int lanes = kLanes<A>, panel_width = 2 * lanes, n = Tile::n, positions = n * n;
  static constexpr int64_t line = 64 / sizeof(A);

  // Output frames and tiles of one sample.
  struct Slab {
    int64_t batch, begin[3], count[3];
    int64_t tiles() const { return count[1] * count[2]; }  // of a frame
    int64_t rows() const { return count[0] * tiles(); }
  };
  // Chunks of the channels of one group.
  struct Unit {
    int64_t group, in, out;
  };

 public:
  WinogradWeightKernel(const ConvBackwardWeightParams& p, const Axis (&axes)[3])
      : p_(p),
        time_(axes[0]),
        groups_(p.groups),
        in_(p.x.shape[1] / groups_, lanes, kUnitChannels<m>),
        out_(p.grad_y.shape[1] / groups_, panel_width, kUnitChannels<m>),
        panels_(out_.widest() / panel_width),
        threads_(std::max(p.threads, 1)) {
    for (int i = 0; i < 3; ++i) source_.map[i] = forward_map(axes[i]);
    source_.view = &p.x;
    source_.history = &p.history;
    for (int i = 1; i < 3; ++i) {
      tiles_[i] = (axes[i].outputs() + m - 1) / m;
      source_.map[i].position.insert(source_.map[i].position.end(), m - 1, -1);  // under a last tile that overhangs
      runs_[i] = {0, 1, 0, 1, m * tiles_[i], {{0, 0}, {1, 1}, {2, 2}}};
    }
    runs_[0] = {0, 1, 0, 1, 1, {{0, 0}}};
    tiles_[0] = axes[0].outputs();
    make_slabs();
  }

  void run() {
    Scratch<A> x(positions * x_stride_), y(positions * y_stride_);
    Scratch<A> sums(positions * sum_stride_), bias(panels_ * panel_width);
    const int64_t patch_size =
        std::max(n * (m * columns_ + 2) * in_.widest(), m * m * columns_ * panels_ * panel_width);
    const int64_t rows_size = kStoreChannels * 9 * time_.kernel * panel_width;
    Scratch<A> scratch(threads_ * std::max(patch_size, rows_size));
    const auto thread_scratch = [&](int thread) { return scratch.data() + thread * std::max(patch_size, rows_size); };
    for (int64_t i = 0; i < groups_ * in_.count * out_.count; ++i) {
      const Unit unit{i / (in_.count * out_.count), i / out_.count % in_.count, i % out_.count};
      const int64_t panels = (out_.size(unit.out) + panel_width - 1) / panel_width;
      parallel_for(positions, threads_, [&](int64_t position, int) {
        std::memset(sums.data() + position * sum_stride_, 0, static_cast<size_t>(sum_stride_) * sizeof(A));
      });
      std::memset(bias.data(), 0, static_cast<size_t>(panels_ * panel_width) * sizeof(A));
      for (const Slab& slab : slabs_) {
        find_frames(slab);
        const int64_t inputs = static_cast<int64_t>(frames_.size()) * slab.count[1];
        parallel_for(inputs + slab.count[0] * slab.count[1], threads_, [&](int64_t task, int thread) {
          if (task < inputs) return transform_input(unit, slab, task, thread_scratch(thread), x.data());
          transform_gradient(unit, slab, task - inputs, thread_scratch(thread), y.data());
        });
        parallel_for(positions * panels, threads_, [&](int64_t task, int) {
          const int64_t position = task / panels, panel = task % panels;
          const A* gradients = y.data() + position * y_stride_ + panel * rows_ * panel_width;
          multiply(unit, slab, panel, x.data() + position * x_stride_, gradients,
                   sums.data() + position * sum_stride_ + panel * in_.widest() * panel_width);
          if (position == n + 1 && unit.in == 0)
            add_bias(slab, width(unit, panel), gradients, &bias[panel * panel_width]);
        });
      }
      const int64_t parts = (in_.size(unit.in) + kStoreChannels - 1) / kStoreChannels;
      parallel_for(panels * parts, threads_, [&](int64_t task, int thread) {
        const int64_t panel = task / parts;
        store_panel(unit, panel, task % parts * kStoreChannels, sums.data() + panel * in_.widest() * panel_width,
                    thread_scratch(thread));
      });
      if (p_.grad_bias.defined() && unit.in == 0) store_bias(unit, bias.data());
    }
  }

 private:
  int64_t out_channel(const Unit& unit, int64_t panel) const {
    return unit.group * out_.channels + out_.begin(unit.out) + panel * panel_width;
  }
  int64_t count(const Unit& unit, int64_t panel) const {
    return std::min<int64_t>(panel_width, out_.size(unit.out) - panel * panel_width);
  }
  int64_t width(const Unit& unit, int64_t panel) const { return count(unit, panel) <= lanes ? lanes : panel_width; }
  // An odd number of cache lines, so that neighbours do not meet in one set of a cache.
  static int64_t odd_lines(int64_t n) { return ((n + line - 1) / line | 1) * line; }

  void make_slabs() {
    const auto even = [](int64_t n, int64_t most) {  // nearly equal parts of at most `most`
      const int64_t parts = (n + most - 1) / std::max<int64_t>(most, 1);
      return parts == 0 ? 0 : (n + parts - 1) / parts;
    };
    const int64_t row_bytes = positions * static_cast<int64_t>(sizeof(A)) * (in_.widest() + panels_ * panel_width);
    const int64_t most = std::max<int64_t>(kSlabBytes / row_bytes, kSlabColumns);
    columns_ = even(tiles_[2], kSlabColumns);
    const int64_t frames = even(tiles_[0], std::max<int64_t>(most / std::max<int64_t>(columns_, 1), 1));
    const int64_t tile_rows = even(tiles_[1], std::max<int64_t>(most / std::max<int64_t>(columns_ * frames, 1), 1));
    const int64_t size[3] = {frames, tile_rows, columns_};
    for (int64_t batch = 0; batch < p_.x.shape[0]; ++batch) {
      for (int64_t t = 0; t < tiles_[0]; t += size[0]) {
        for (int64_t h = 0; h < tiles_[1]; h += size[1]) {
          for (int64_t w = 0; w < tiles_[2]; w += size[2]) {
            slabs_.push_back({batch,
                              {t, h, w},
                              {std::min(size[0], tiles_[0] - t), std::min(size[1], tiles_[1] - h),
                               std::min(size[2], tiles_[2] - w)}});
          }
        }
      }
    }
    rows_ = frames * tile_rows * columns_;
    const int64_t sources =
        std::min((frames - 1) * time_.stride + (time_.kernel - 1) * time_.dilation + 1, frames * time_.kernel);
    x_pitch_ = odd_lines(in_.widest());
    x_stride_ = odd_lines(sources * tile_rows * columns_ * x_pitch_);
    y_stride_ = odd_lines(panels_ * rows_ * panel_width);
    sum_stride_ = odd_lines(time_.kernel * panels_ * in_.widest() * panel_width);
  }

  // Source frames that a slab reads, and for each tap in time and each row of the slab where that row's input lies.
  // Frames of zeros come before all others, so a tap that reads them starts at a later row.
  void find_frames(const Slab& slab) {
    const int64_t first = slab.begin[0] * time_.stride;
    std::vector<int64_t> slot(
        static_cast<size_t>((slab.count[0] - 1) * time_.stride + (time_.kernel - 1) * time_.dilation + 1), -1);
    frames_.clear();
    for (int64_t t = 0; t < slab.count[0]; ++t) {
      for (int64_t k = 0; k < time_.kernel; ++k) slot[static_cast<size_t>(t * time_.stride + k * time_.dilation)] = 0;
    }
    for (size_t i = 0; i < slot.size(); ++i) {
      const int64_t frame = first + static_cast<int64_t>(i);
      if (slot[i] < 0 || source_.map[0][frame] == -1) {
        slot[i] = -1;
      } else {
        slot[i] = static_cast<int64_t>(frames_.size());
        frames_.push_back(frame);
      }
    }
    offsets_.clear();
    starts_.clear();
    for (int64_t k = 0; k < time_.kernel; ++k) {
      starts_.push_back(slab.rows());
      for (int64_t t = 0; t < slab.count[0]; ++t) {
        const int64_t s = slot[static_cast<size_t>(t * time_.stride + k * time_.dilation)];
        if (s >= 0 && starts_.back() == slab.rows()) starts_.back() = t * slab.tiles();
        for (int64_t i = 0; i < slab.tiles(); ++i) offsets_.push_back((s * slab.tiles() + i) * x_pitch_);
      }
    }
  }

  // B^T d B of one row of tiles of one source frame.
  void transform_input(const Unit& unit, const Slab& slab, int64_t task, A* patch, A* x) const {
    const int64_t slot = task / slab.count[1], row = task % slab.count[1], tiles = slab.count[2];
    const Block block{{&runs_[0], &runs_[1], &runs_[2]},
                      {frames_[static_cast<size_t>(slot)], m * (slab.begin[1] + row), m * slab.begin[2]},
                      {1, m, m * tiles},
                      slab.batch};
    const int64_t pitch = in_.pitch(unit.in);
    std::vector<Piece> pieces;
    fill_patch<T>(source_, block, unit.group * in_.channels + in_.begin(unit.in), in_.size(unit.in), pitch, pieces,
                  patch);
    causal_conv3d::transform_input<m>(patch, block.patch_size(2) * pitch, pitch, tiles,
                                      x + (slot * slab.tiles() + row * tiles) * x_pitch_, x_stride_, x_pitch_);
  }

  // A dy A^T of one row of tiles of one output frame, as panels of [tile][width].
  void transform_gradient(const Unit& unit, const Slab& slab, int64_t task, A* grad, A* y) const {
    const TensorView& view = p_.grad_y;
    const int64_t frame = task / slab.count[1], row = task % slab.count[1], tiles = slab.count[2];
    const int64_t channels = out_.size(unit.out), pitch = (channels + lanes - 1) / lanes * lanes;
    const int64_t columns = std::min(m * tiles, view.shape[4] - m * slab.begin[2]);
    const int64_t row_pitch = m * tiles * pitch;
    if (pitch != channels || columns < m * tiles) {
      std::memset(grad, 0, static_cast<size_t>(m * row_pitch) * sizeof(A));
    }
    for (int64_t r = 0; r < m; ++r) {
      const int64_t at = m * (slab.begin[1] + row) + r;
      if (at >= view.shape[3]) {
        std::memset(grad + r * row_pitch, 0, static_cast<size_t>(row_pitch) * sizeof(A));
        continue;
      }
      const T* from = static_cast<const T*>(view.data) + slab.batch * view.stride[0] +
                      out_channel(unit, 0) * view.stride[1] + (slab.begin[0] + frame) * view.stride[2] +
                      at * view.stride[3] + m * slab.begin[2] * view.stride[4];
      copy_columns(from, view.stride[1], view.stride[4], grad + r * row_pitch, pitch, channels, columns);
    }
    for (int64_t i = 0; i < tiles; ++i, grad += m * pitch) {
      for (int64_t c = 0; c < pitch; c += lanes) {
        const int64_t panel = c / panel_width, tile = (frame * slab.count[1] + row) * tiles + i;
        A* to = y + panel * rows_ * panel_width + tile * width(unit, panel) + c % panel_width;
        vector_t<A> d[n * m];
#pragma GCC unroll 4
        for (int s = 0; s < m; ++s) {
          vector_t<A> column[n];
#pragma GCC unroll 4
          for (int r = 0; r < m; ++r) column[r] = load(grad + r * row_pitch + s * pitch + c);
          Tile::output_gradient(column, column, 1);
#pragma GCC unroll 6
          for (int r = 0; r < n; ++r) d[m * r + s] = column[r];
        }
#pragma GCC unroll 6
        for (int r = 0; r < n; ++r) {
          vector_t<A> transformed[n];
          Tile::output_gradient(d + m * r, transformed, 1);
#pragma GCC unroll 6
          for (int s = 0; s < n; ++s) store(to + (n * r + s) * y_stride_, transformed[s]);
        }
      }
    }
  }

  // Adds one panel's products at one position, for every tap in time.
  void multiply(const Unit& unit, const Slab& slab, int64_t panel, const A* x, const A* y, A* sums) const {
    const int64_t pitch = width(unit, panel), channels = in_.size(unit.in);
    const int64_t tiles = (channels + kTilePixels - 1) / kTilePixels;
    for (int64_t k = 0; k < time_.kernel; ++k, sums += panels_ * in_.widest() * panel_width) {
      const int64_t start = starts_[static_cast<size_t>(k)], rows = slab.rows() - start;
      const int64_t pieces = (rows + kPieceTiles - 1) / kPieceTiles;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = part_begin(rows, pieces, piece), size = part_begin(rows, pieces, piece + 1) - begin;
        const int64_t* offsets = offsets_.data() + k * slab.rows() + start + begin;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t c = part_begin(channels, tiles, tile), height = part_begin(channels, tiles, tile + 1) - c;
          weight_tile_for<A>(static_cast<int>(height), static_cast<int>(pitch / lanes))(
              x + c, offsets, size, y + (start + begin) * pitch, sums + c * pitch);
        }
      }
    }
  }

  // The position that sums all gradients of a tile gives the bias.
  static void add_bias(const Slab& slab, int64_t pitch, const A* y, A* sum) {
    A total[panel_width] = {};
    for (int64_t i = 0; i < slab.rows(); ++i) {
      for (int64_t c = 0; c < pitch; ++c) total[c] += y[i * pitch + c];
    }
    for (int64_t c = 0; c < pitch; ++c) sum[c] += total[c];
  }

  void store_bias(const Unit& unit, const A* bias) const {
    const TensorView& view = p_.grad_bias;
    for (int64_t i = 0; i < out_.size(unit.out); ++i) {
      static_cast<T*>(view.data)[(out_channel(unit, 0) + i) * view.stride[0]] = from_float<T>(bias[i]);
    }
  }

  // G^T p G of some channels of one panel.
  void store_panel(const Unit& unit, int64_t panel, int64_t channel, const A* sums, A* rows) const {
    const int64_t pitch = width(unit, panel), channels = std::min(kStoreChannels, in_.size(unit.in) - channel);
    A* to = rows;
    for (int64_t c = channel; c < channel + channels; ++c) {
      for (int64_t k = 0; k < time_.kernel; ++k, to += 9 * pitch) {
        const A* from = sums + k * panels_ * in_.widest() * panel_width + c * pitch;
        for (int64_t v = 0; v < pitch; v += lanes) {
          vector_t<A> p[positions];
          for (int i = 0; i < positions; ++i) p[i] = load(from + i * sum_stride_ + v);
          for (int s = 0; s < n; ++s) Tile::weight_gradient(p + s, p + s, n);  // to rows 0, 1 and 2
          for (int r = 0; r < 3; ++r) {
            vector_t<A> result[3];
            Tile::weight_gradient(p + n * r, result, 1);
            for (int s = 0; s < 3; ++s) store(to + (3 * r + s) * pitch + v, result[s]);
          }
        }
      }
    }
    store_weight_gradient<T>(p_, rows, pitch, out_channel(unit, panel), count(unit, panel),
                             in_.begin(unit.in) + channel, channels);
  }

  const ConvBackwardWeightParams& p_;
  const Axis time_;
  const int64_t groups_;
  const Chunks in_, out_;
  const int64_t panels_;  // of the widest unit
  const int threads_;
  PatchSource source_;
  AxisRun runs_[3];
  int64_t tiles_[3];  // output frames, and tiles along height and width
  std::vector<Slab> slabs_;
  int64_t columns_, rows_, x_pitch_, x_stride_, y_stride_, sum_stride_;
  std::vector<int64_t> frames_, offsets_, starts_;  // of the present slab
};

}  // namespace

// Whether fewer products make up for the transforms, whose cost all channels of the other tensor and all taps in time
// share, and for the halves of tiles that lie past an odd size.
bool winograd_pays(const ConvBackwardWeightParams& p, const Axis (&axes)[3]) {
  for (int i = 1; i < 3; ++i) {
    if (axes[i].kernel != 3 || axes[i].stride != 1 || axes[i].dilation != 1) return false;
  }
  const int64_t channels = p.x.shape[1] / p.groups, rows = axes[1].outputs(), columns = axes[2].outputs();
  if (!p.grad_weight.defined() || channels < 8 || channels * axes[0].kernel < 16) return false;
#if defined(WALT_HAS_BF16_DOT)
  if (p.x.dtype == DType::bfloat16) return winograd_beats_pairs(channels, rows, columns);
#endif
  const int64_t m = p.x.dtype == DType::bfloat16 || p.x.dtype == DType::float16 ? 4 : 2;  // as kWinogradTile
  return 5 * (m + 2) * (m + 2) * winograd_tiles(m, rows, columns) <= 4 * 9 * rows * columns;
}

void winograd_backward_weight(const ConvBackwardWeightParams& p, const Axis (&axes)[3]) {
  dispatch_dtype(p.x.dtype, [&](auto tag) { WinogradWeightKernel<decltype(tag)>(p, axes).run(); });
}

}  // namespace walt::WALT_ISA::causal_conv3d
