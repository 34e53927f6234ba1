// Statistics over groups of channels of frames or clips, then normalisation, modulation and activation.
#include "video_norm/activation.h"
#include "video_norm/moments.h"

namespace walt::WALT_ISA::video_norm {
namespace {

template <class T, bool kRows, bool kSilu>
void normalize(const VideoNormForwardParams& p) {
  using A = accumulate_t<T>;
  const Sizes s(p);
  const Video<const T> x(p.x);
  const Video<T> y(p.y);
  const Modulation<A> modulation(p, s);
  const Units units = kRows ? Units(s.P, s.C, kTilePixels) : Units(s.C, s.P, 1);
  const int threads = threads_for(p.x.numel(), p.threads);
  const bool far = is_far(2 * p.x.numel() * static_cast<int64_t>(sizeof(T)));
  const int64_t width = padded<A>(s.C);
  const int64_t sets = s.sets(), frames = s.set_frames;

  const int64_t parts = kRows ? units.count() * s.groups : s.C;  // of a frame: of groups in units, or channels
  const Scratch<Moments> partial(s.frames() * parts);
  const Scratch<A> channels(kRows ? threads * 2 * width : 0), coefficients(s.frames() * 2 * width);

  const auto measure = [&](int64_t frame, int64_t unit, int thread, int64_t) {
    const int64_t begin = units.begin(unit), end = units.end(unit);
    if constexpr (kRows) {
      A *const mean = channels.data() + thread * 2 * width, *const squares = mean + width;
      measure_rows(x.frame(frame) + begin * x.p, x.p, end - begin, s.C, far, mean, squares);
      for (int64_t g = 0; g < s.groups; ++g) {
        const int64_t c = g * s.channels;
        partial[frame * parts + unit * s.groups + g] = join_channels(mean + c, squares + c, s.channels, end - begin);
      }
    } else {
      for (int64_t c = begin; c < end; ++c) partial[frame * parts + c] = measure_line(x.frame(frame) + c * x.c, s.P);
    }
  };

  const auto finish = [&](int64_t set) {
    for (int64_t g = 0; g < s.groups; ++g) {
      Moments all;
      for (int64_t frame = set * frames; frame < (set + 1) * frames; ++frame) {
        for (int64_t i = 0; i < (kRows ? units.count() : s.channels); ++i) {
          all.join(partial[frame * parts + (kRows ? i * s.groups + g : g * s.channels + i)]);
        }
      }
      const A mean = static_cast<A>(p.center ? all.mean : 0), rstd = static_cast<A>(rstd_of(all, p.center, p.eps));
      if (p.center) static_cast<A*>(p.mean.data)[set * s.groups + g] = mean;
      static_cast<A*>(p.rstd.data)[set * s.groups + g] = rstd;
      for (int64_t frame = set * frames; frame < (set + 1) * frames; ++frame) {
        A *const means = coefficients.data() + frame * 2 * width, *const factors = means + width;
        const A* const gain = modulation.gain(frame);
        for (int64_t c = g * s.channels; c < (g + 1) * s.channels; ++c) {
          means[c] = mean;
          factors[c] = rstd * gain[c];
        }
      }
    }
    for (int64_t row = set * frames * 2; row < (set + 1) * frames * 2; ++row) {
      std::fill(coefficients.data() + row * width + s.C, coefficients.data() + (row + 1) * width, A{0});
    }
  };

  const auto apply = [&](int64_t frame, int64_t unit, int64_t) {
    const A *const means = coefficients.data() + frame * 2 * width, *const factors = means + width;
    const A* const offsets = modulation.offset(frame);
    for (int64_t i = units.begin(unit); i < units.end(unit); ++i) {
      const T* const from = x.frame(frame) + i * (kRows ? x.p : x.c);
      T* const to = y.frame(frame) + i * (kRows ? y.p : y.c);
      sweep_packs<A>(kRows ? s.C : s.P, [&](int64_t j, auto piece, auto count) __attribute__((always_inline)) {
        vector_t<A> z[count];
        for (int k = 0; k < count; ++k) {
          const int64_t at = j + k * kLanes<A>;
          if constexpr (kRows) {
            z[k] = (piece.load(from + at) - load(means + at)) * load(factors + at) + load(offsets + at);
          } else {
            z[k] = (piece.load(from + at) - means[i]) * factors[i] + offsets[i];
          }
        }
        activate<kSilu>(z);
        store_pack(piece, to + j, z);
      });
    }
  };
  in_sets(sets, frames, units.count(), threads, measure, finish, apply);
}

}  // namespace

void forward(const VideoNormForwardParams& p) {
  check_video_norm(p);
  if (p.over == Over::pixel) return forward_pixels(p);
  dispatch(p.x, p.silu, [&](auto tag, auto rows, auto silu) { normalize<decltype(tag), rows, silu>(p); });
}

}  // namespace walt::WALT_ISA::video_norm
