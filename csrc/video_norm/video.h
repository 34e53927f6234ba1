// What the passes of video_norm share: frames in memory, their cut into units of work, rows of coefficients.
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "common/sweep.h"
#include "video_norm/checks.h"

namespace walt::WALT_ISA::video_norm {

void forward_pixels(const VideoNormForwardParams& p);
void backward_pixels(const VideoNormBackwardParams& p);

struct Sizes {
  int64_t B, C, T, P, groups, channels;  // channels: of a group
  int64_t set_frames;                    // that share statistics
  template <class Params>
  explicit Sizes(const Params& p)
      : B(p.x.shape[0]),
        C(p.x.shape[1]),
        T(p.x.shape[2]),
        P(p.x.shape[3]),
        groups(p.groups),
        channels(C / p.groups),
        set_frames(p.over == Over::clip ? T : 1) {}
  int64_t frames() const { return B * T; }
  int64_t sets() const { return frames() / set_frames; }
};

// x, y or a gradient of their size.
template <class T>
struct Video {
  T* data;
  int64_t b, c, t, p;  // strides
  int64_t T_;
  explicit Video(const TensorView& v)
      : data(static_cast<T*>(v.data)),
        b(v.stride[0]),
        c(v.stride[1]),
        t(v.stride[2]),
        p(v.stride[3]),
        T_(v.defined() ? v.shape[2] : 1) {}
  T* frame(int64_t i) const { return data + i / T_ * b + i % T_ * t; }
};

// The pixels of a frame (of rows) or its channels (of planes), cut by the frame's size alone: what comes out of a frame
// does not depend on what stands beside it, or on the number of threads.
constexpr int64_t kTilePixels = 64;  // a multiple of the pixels of a cached block, and of every vector's lanes
struct Units {
  int64_t items, step;
  Units(int64_t items, int64_t elements_of_an_item, int64_t multiple)
      : items(items), step((std::max<int64_t>(1, kGrain / elements_of_an_item) + multiple - 1) / multiple * multiple) {}
  int64_t count() const { return (items + step - 1) / step; }
  int64_t begin(int64_t unit) const { return unit * step; }
  int64_t end(int64_t unit) const { return std::min(items, (unit + 1) * step); }
};

// Whether a pass over so many bytes finds them in memory rather than in a cache. Rows are then fetched ahead: the
// processor does not foresee that a few of them are read side by side.
inline bool is_far(int64_t bytes) { return bytes > 20 << 20; }

// An element of a tensor, `otherwise` where there is none: an undefined view, whose sizes and strides are 0.
template <class A>
inline A value(const TensorView& v, int64_t index, A otherwise) {
  if (!v.defined()) return otherwise;
  switch (v.dtype) {
    case DType::float32: return static_cast<A>(static_cast<const float*>(v.data)[index]);
    case DType::float64: return static_cast<A>(static_cast<const double*>(v.data)[index]);
    case DType::bfloat16: return static_cast<A>(to_float(static_cast<const bfloat16*>(v.data)[index]));
    default: return static_cast<A>(to_float(static_cast<const float16*>(v.data)[index]));
  }
}

// The address of scale, shift or one of their gradients at a channel of a frame, in elements.
inline int64_t place(const TensorView& v, int64_t b, int64_t t, int64_t c) {
  return b * v.stride[0] + c * v.stride[1] + (v.shape[2] > 1 ? t * v.stride[2] : 0);
}

// gain and offset of every channel, in rows that end in zeros: one for all frames, for those of a sample, or for each.
template <class A>
class Modulation {
 public:
  template <class Params>
  Modulation(const Params& p, const Sizes& s)
      : T_(s.T),
        width_(padded<A>(s.C)),
        per_sample_(p.scale.defined() || p.shift.defined()),
        per_frame_(p.scale.shape[2] > 1 || p.shift.shape[2] > 1),
        rows_(per_frame_    ? s.frames()
              : per_sample_ ? s.B
                            : 1),
        values_(rows_ * 2 * width_) {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t b = per_frame_ ? row / s.T : row, t = per_frame_ ? row % s.T : 0;
      A *const gain = values_.data() + row * 2 * width_, *const offset = gain + width_;
      for (int64_t c = 0; c < s.C; ++c) {
        const A scale = 1 + value<A>(p.scale, place(p.scale, b, t, c), 0);
        const A shift = value<A>(p.shift, place(p.shift, b, t, c), 0);
        gain[c] = scale * value<A>(p.weight, c * p.weight.stride[0], 1);
        offset[c] = scale * value<A>(p.bias, c * p.bias.stride[0], 0) + shift;
      }
      std::fill(gain + s.C, gain + width_, A{0});
      std::fill(offset + s.C, offset + width_, A{0});
    }
  }
  const A* gain(int64_t frame) const { return values_.data() + row(frame) * 2 * width_; }
  const A* offset(int64_t frame) const { return gain(frame) + width_; }

 private:
  int64_t row(int64_t frame) const { return per_frame_ ? frame : per_sample_ ? frame / T_ : 0; }

  int64_t T_, width_;
  bool per_sample_, per_frame_;
  int64_t rows_;
  Scratch<A> values_;
};

// Runs measure(frame, unit, thread, room) for all frames of a set, what shares statistics, then finish(set), then
// apply(frame, unit, room). Threads take whole sets, which stay in their caches in between, and share those that would
// leave some of them idle. A room belongs to one set at a time.
inline int64_t whole_sets(int64_t sets, int threads) { return sets >= 8 * threads ? sets : sets / threads * threads; }
inline int64_t rooms(int64_t sets, int threads) { return threads + sets - whole_sets(sets, threads); }

template <class Measure, class Finish, class Apply>
void in_sets(int64_t sets, int64_t frames, int64_t units, int threads, Measure measure, Finish finish, Apply apply) {
  const int64_t whole = whole_sets(sets, threads), size = frames * units;
  parallel_for(whole, threads, [&](int64_t set, int thread) {
    for (int64_t i = set * size; i < (set + 1) * size; ++i) measure(i / units, i % units, thread, thread);
    finish(set);
    for (int64_t i = set * size; i < (set + 1) * size; ++i) apply(i / units, i % units, thread);
  });
  const int64_t first = whole * size, rest = sets * size - first;
  parallel_for(rest, threads, [&](int64_t i, int thread) {
    measure((first + i) / units, (first + i) % units, thread, threads + i / size);
  });
  parallel_for(sets - whole, threads, [&](int64_t set, int) { finish(whole + set); });
  parallel_for(rest, threads,
               [&](int64_t i, int) { apply((first + i) / units, (first + i) % units, threads + i / size); });
}

// Calls f with a value of x's type and whether x is in rows and activated, as types.
template <class F>
void dispatch(const TensorView& x, bool silu, F&& f) {
  dispatch_dtype(x.dtype, [&](auto tag) {
    const auto with = [&](auto rows) {
      if (silu) return f(tag, rows, std::true_type{});
      return f(tag, rows, std::false_type{});
    };
    if (in_rows(x)) return with(std::true_type{});
    return with(std::false_type{});
  });
}

}  // namespace walt::WALT_ISA::video_norm
