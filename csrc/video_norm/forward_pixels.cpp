// Statistics over the channels of one pixel, then normalisation, modulation and activation.
#include "video_norm/activation.h"
#include "video_norm/video.h"

namespace walt::WALT_ISA::video_norm {
namespace {

// From the sums of deviations from a rounded mean, and of their squares: what the rounding left out goes to the mean.
template <class A>
void finish(A& mean, A& rstd, A sum, A square_sum, int64_t count, bool center, double eps) {
  const A left = center ? sum / static_cast<A>(count) : 0;
  mean += left;
  rstd = 1 / std::sqrt(square_sum / static_cast<A>(count) - left * left + static_cast<A>(eps));
}

// A pixel is a row: three passes over it in the nearest cache.
template <class T, bool kSilu, class A>
void normalize_row(const T* x, T* y, const A* gain, const A* offset, int64_t C, bool center, double eps, A& mean,
                   A& rstd) {
  using V = vector_t<A>;
  A m = 0, r;
  if (center) {
    V sums[kSlots] = {};
    sweep<A>(C, [&](int64_t c, auto piece, int slot)
                    __attribute__((always_inline)) { sums[slot] += piece.load(x + c); });
    m = sum_slots(sums) / static_cast<A>(C);
  }
  V sums[kSlots] = {}, squares[kSlots] = {};
  sweep<A>(C, [&](int64_t c, auto piece, int slot) __attribute__((always_inline)) {
    const V centred = piece.keep(piece.load(x + c) - m);
    sums[slot] += centred;
    squares[slot] += centred * centred;
  });
  finish(m, r, sum_slots(sums), sum_slots(squares), C, center, eps);
  sweep_packs<A>(C, [&](int64_t c, auto piece, auto count) __attribute__((always_inline)) {
    V z[count];
    for (int k = 0; k < count; ++k) {
      const int64_t at = c + k * kLanes<A>;
      z[k] = (piece.load(x + at) - m) * r * load(gain + at) + load(offset + at);
    }
    activate<kSilu>(z);
    store_pack(piece, y + c, z);
  });
  mean = m;
  rstd = r;
}

// Pixels are columns of planes: `count` of them at a time, so that all their channels fit in a cache. mean, rstd and
// sum are the tile's, and have room for whole vectors.
template <class T, bool kSilu, class A>
void normalize_tile(const T* x, int64_t x_c, T* y, int64_t y_c, const A* gain, const A* offset, int64_t C,
                    int64_t count, bool center, double eps, A* mean, A* rstd, A* sum) {
  for (A* line : {mean, rstd, sum}) std::fill(line, line + padded<A>(count), A{0});
  if (center) {
    for (int64_t c = 0; c < C; ++c) {
      sweep<A>(count, [&](int64_t i, auto piece, int) __attribute__((always_inline)) {
        store(mean + i, load(mean + i) + piece.load(x + c * x_c + i));
      });
    }
    for (int64_t i = 0; i < count; ++i) mean[i] /= static_cast<A>(C);
  }
  for (int64_t c = 0; c < C; ++c) {
    sweep<A>(count, [&](int64_t i, auto piece, int) __attribute__((always_inline)) {
      const auto centred = piece.load(x + c * x_c + i) - load(mean + i);
      store(sum + i, load(sum + i) + centred);
      store(rstd + i, load(rstd + i) + centred * centred);
    });
  }
  for (int64_t i = 0; i < count; ++i) finish(mean[i], rstd[i], sum[i], rstd[i], C, center, eps);
  for (int64_t c = 0; c < C; ++c) {
    sweep_packs<A>(count, [&](int64_t i, auto piece, auto vectors) __attribute__((always_inline)) {
      vector_t<A> z[vectors];
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = i + k * kLanes<A>;
        z[k] = (piece.load(x + c * x_c + at) - load(mean + at)) * load(rstd + at) * gain[c] + offset[c];
      }
      activate<kSilu>(z);
      store_pack(piece, y + c * y_c + i, z);
    });
  }
}

template <class T, bool kRows, bool kSilu>
void normalize(const VideoNormForwardParams& p) {
  using A = accumulate_t<T>;
  const Sizes s(p);
  const Video<const T> x(p.x);
  const Video<T> y(p.y);
  const Modulation<A> modulation(p, s);
  const Units units(s.P, s.C, kTilePixels);
  const int threads = threads_for(p.x.numel(), p.threads);
  const Scratch<A> tiles(kRows ? 0 : threads * 3 * units.step);
  A *const means = static_cast<A*>(p.mean.data), *const rstds = static_cast<A*>(p.rstd.data);

  parallel_for(s.frames() * units.count(), threads, [&](int64_t task, int thread) {
    const int64_t frame = task / units.count(), begin = units.begin(task % units.count());
    const int64_t count = units.end(task % units.count()) - begin, first = frame * s.P + begin;
    const A *const gain = modulation.gain(frame), *const offset = modulation.offset(frame);
    if constexpr (kRows) {
      for (int64_t i = 0; i < count; ++i) {
        A mean;
        normalize_row<T, kSilu>(x.frame(frame) + (begin + i) * x.p, y.frame(frame) + (begin + i) * y.p, gain, offset,
                                s.C, p.center, p.eps, mean, rstds[first + i]);
        if (p.center) means[first + i] = mean;
      }
    } else {
      A *const mean = tiles.data() + thread * 3 * units.step, *const rstd = mean + units.step;
      normalize_tile<T, kSilu>(x.frame(frame) + begin, x.c, y.frame(frame) + begin, y.c, gain, offset, s.C, count,
                               p.center, p.eps, mean, rstd, rstd + units.step);
      if (p.center) std::copy(mean, mean + count, means + first);
      std::copy(rstd, rstd + count, rstds + first);
    }
  });
}

}  // namespace

void forward_pixels(const VideoNormForwardParams& p) {
  dispatch(p.x, p.silu, [&](auto tag, auto rows, auto silu) { normalize<decltype(tag), rows, silu>(p); });
}

}  // namespace walt::WALT_ISA::video_norm
