// Gradients where statistics are over the channels of one pixel; the formula of backward.cpp.
#include "video_norm/activation.h"
#include "video_norm/gradients.h"

namespace walt::WALT_ISA::video_norm {
namespace {

// A pixel is a row. `scratch` holds two rows, sum and sum_normal are rows of sums over pixels.
template <class T, bool kSilu, class A>
void differentiate_row(const T* x, const T* grad_y, T* grad_x, const A* gain, const A* offset, int64_t C, A mean,
                       A rstd, bool center, A* scratch, A* sum, A* sum_normal) {
  using V = vector_t<A>;
  A *const grads = scratch, *const normals = scratch + padded<A>(C);
  V group[kSlots] = {}, group_normal[kSlots] = {};
  sweep_packs<A>(C, [&](int64_t c, auto piece, auto count) __attribute__((always_inline)) {
    V g[count], normal[count], z[count];
    for (int k = 0; k < count; ++k) {
      const int64_t at = c + k * kLanes<A>;
      normal[k] = (piece.load(x + at) - mean) * rstd;
      z[k] = normal[k] * load(gain + at) + load(offset + at);
      g[k] = piece.load(grad_y + at);
    }
    through_activation<kSilu>(g, z);
    for (int k = 0; k < count; ++k) {  // beyond the end g is zero
      const int64_t at = c + k * kLanes<A>;
      store(sum + at, load(sum + at) + g[k]);
      store(sum_normal + at, load(sum_normal + at) + g[k] * normal[k]);
      g[k] *= load(gain + at);
      store(grads + at, g[k]);
      store(normals + at, normal[k]);
      group[k] += g[k];
      group_normal[k] += g[k] * normal[k];
    }
  });
  if (grad_x == nullptr) return;
  const A of_mean = center ? sum_slots(group) / static_cast<A>(C) : 0;
  const A of_normal = sum_slots(group_normal) / static_cast<A>(C);
  sweep<A>(C, [&](int64_t c, auto piece, int) __attribute__((always_inline)) {
    piece.store(grad_x + c, (load(grads + c) - of_mean - load(normals + c) * of_normal) * rstd);
  });
}

// Pixels are columns of planes, `count` of them at a time. `scratch` has room for C + 2 lines of whole vectors.
template <class T, bool kSilu, class A>
void differentiate_tile(const T* x, int64_t x_c, const T* grad_y, int64_t grad_c, T* grad_x, int64_t to_c,
                        const A* gain, const A* offset, int64_t C, int64_t count, const A* mean, const A* rstd,
                        bool center, A* scratch, A* sum, A* sum_normal) {
  using V = vector_t<A>;
  const int64_t line = padded<A>(count);
  A *const group = scratch, *const group_normal = group + line, *const grads = group_normal + line;
  std::fill(group, group + 2 * line, A{0});
  const auto mean_of = [&](int64_t i, auto piece) { return center ? piece.load(mean + i) : V{}; };
  for (int64_t c = 0; c < C; ++c) {
    V sums[kSlots] = {}, normal_sums[kSlots] = {};
    sweep_packs<A>(count, [&](int64_t i, auto piece, auto vectors) __attribute__((always_inline)) {
      V g[vectors], normal[vectors], z[vectors];
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = i + k * kLanes<A>;
        normal[k] = (piece.load(x + c * x_c + at) - mean_of(at, piece)) * piece.load(rstd + at);
        z[k] = normal[k] * gain[c] + offset[c];
        g[k] = piece.load(grad_y + c * grad_c + at);
      }
      through_activation<kSilu>(g, z);
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = i + k * kLanes<A>;
        sums[k] += g[k];
        normal_sums[k] += g[k] * normal[k];
        g[k] *= gain[c];
        store(grads + c * line + at, g[k]);
        store(group + at, load(group + at) + g[k]);
        store(group_normal + at, load(group_normal + at) + g[k] * normal[k]);
      }
    });
    sum[c] = sum_slots(sums);
    sum_normal[c] = sum_slots(normal_sums);
  }
  if (grad_x == nullptr) return;
  const A share = 1 / static_cast<A>(C);
  for (int64_t c = 0; c < C; ++c) {
    sweep_packs<A>(count, [&](int64_t i, auto piece, auto vectors) __attribute__((always_inline)) {
      V g[vectors];
      for (int k = 0; k < vectors; ++k) {
        const int64_t at = i + k * kLanes<A>;
        const V rstd_k = piece.load(rstd + at), of_mean = center ? load(group + at) * share : V{};
        const V normal = (piece.load(x + c * x_c + at) - mean_of(at, piece)) * rstd_k;
        g[k] = (load(grads + c * line + at) - of_mean - normal * (load(group_normal + at) * share)) * rstd_k;
      }
      store_pack(piece, grad_x + c * to_c + i, g);
    });
  }
}

template <class T, bool kRows, bool kSilu>
void differentiate(const VideoNormBackwardParams& p) {
  using A = accumulate_t<T>;
  const Sizes s(p);
  const Video<const T> x(p.x), grad_y(p.grad_y);
  const Video<T> grad_x(p.grad_x);
  const Modulation<A> modulation(p, s);
  const Units units(s.P, s.C, kTilePixels);
  const int threads = threads_for(p.x.numel(), p.threads);
  const int64_t width = padded<A>(s.C), room = kRows ? 2 * width : (s.C + 2) * units.step;
  const A *const means = static_cast<const A*>(p.mean.data), *const rstds = static_cast<const A*>(p.rstd.data);
  const Scratch<A> partial(s.frames() * units.count() * 2 * width), scratch(threads * room);

  parallel_for(s.frames() * units.count(), threads, [&](int64_t task, int thread) {
    const int64_t frame = task / units.count(), begin = units.begin(task % units.count());
    const int64_t count = units.end(task % units.count()) - begin, first = frame * s.P + begin;
    const A *const gain = modulation.gain(frame), *const offset = modulation.offset(frame);
    A *const sum = partial.data() + task * 2 * width, *const sum_normal = sum + width;
    A* const work = scratch.data() + thread * room;
    if constexpr (kRows) {
      std::fill(sum, sum + 2 * width, A{0});
      for (int64_t i = 0; i < count; ++i) {
        T* const to = p.grad_x.defined() ? grad_x.frame(frame) + (begin + i) * grad_x.p : nullptr;
        differentiate_row<T, kSilu>(x.frame(frame) + (begin + i) * x.p, grad_y.frame(frame) + (begin + i) * grad_y.p,
                                    to, gain, offset, s.C, p.center ? means[first + i] : 0, rstds[first + i], p.center,
                                    work, sum, sum_normal);
      }
    } else {
      T* const to = p.grad_x.defined() ? grad_x.frame(frame) + begin : nullptr;
      differentiate_tile<T, kSilu>(x.frame(frame) + begin, x.c, grad_y.frame(frame) + begin, grad_y.c, to, grad_x.c,
                                   gain, offset, s.C, count, p.center ? means + first : nullptr, rstds + first,
                                   p.center, work, sum, sum_normal);
    }
  });
  const ChannelSums sums(s);
  parallel_for(s.frames(), threads, [&](int64_t frame, int) {
    sums.join(frame, partial.data() + frame * units.count() * 2 * width, units.count(), width);
  });
  write_gradients(p, s, sums);
}

}  // namespace

void backward_pixels(const VideoNormBackwardParams& p) {
  dispatch(p.x, p.silu, [&](auto tag, auto rows, auto silu) { differentiate<decltype(tag), rows, silu>(p); });
}

}  // namespace walt::WALT_ISA::video_norm
