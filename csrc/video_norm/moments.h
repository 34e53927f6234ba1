// Mean and sum of squared deviations, in one pass over memory: two passes over what fits in the nearest cache, and the
// pieces joined (Chan et al., 1979). So a large mean or an outlier costs no digits.
#pragma once

#include "video_norm/video.h"

namespace walt::WALT_ISA::video_norm {

struct Moments {
  double count = 0, mean = 0, squares = 0;
  void join(const Moments& other) {
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * (other.count / total);
    squares += other.squares + delta * delta * (count * other.count / total);
    count = total;
  }
};

// Of every channel of `pixels` rows, which are `far` in memory or not; `mean` and `squares` have room for whole
// vectors.
constexpr int64_t kPixels = 16;  // 16 rows of 512 channels are 32 KB
template <class T, class A>
void measure_rows(const T* x, int64_t stride, int64_t pixels, int64_t C, bool far, A* mean, A* squares) {
  using V = vector_t<A>;
  for (int64_t p = 0; p < pixels; p += kPixels) {
    const int64_t n = std::min(kPixels, pixels - p);
    const A share = static_cast<A>(n) / static_cast<A>(p + n), weight = static_cast<A>(p) * share;
    const T* const block = x + p * stride;
    sweep<A>(C, [&](int64_t c, auto piece, int) __attribute__((always_inline)) {
      V sum{}, square{};
      for (int64_t i = 0; i < n; ++i) {
        sum += piece.load(block + i * stride + c);
        if (far) __builtin_prefetch(block + (i + kPixels) * stride + c);
      }
      const V block_mean = sum * (1 / static_cast<A>(n));
      for (int64_t i = 0; i < n; ++i) {
        const V centred = piece.load(block + i * stride + c) - block_mean;
        square += centred * centred;
      }
      if (p == 0) {
        store(mean + c, block_mean);
        store(squares + c, square);
      } else {
        const V before = load(mean + c), delta = block_mean - before;
        store(mean + c, before + delta * share);
        store(squares + c, load(squares + c) + square + delta * delta * weight);
      }
    });
  }
}

// Of a group of channels, of which each has `count` elements.
template <class A>
Moments join_channels(const A* mean, const A* squares, int64_t channels, int64_t count) {
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c) sum += static_cast<double>(mean[c]);
  Moments all{static_cast<double>(channels * count), sum / static_cast<double>(channels), 0};
  for (int64_t c = 0; c < channels; ++c) {
    const double delta = static_cast<double>(mean[c]) - all.mean;
    all.squares += static_cast<double>(squares[c]) + static_cast<double>(count) * delta * delta;
  }
  return all;
}

// Of n numbers in a line.
template <class T>
Moments measure_line(const T* x, int64_t n) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  constexpr int64_t kLine = 4096;
  Moments all;
  for (int64_t begin = 0; begin < n; begin += kLine) {
    const int64_t count = std::min(kLine, n - begin);
    V sums[kSlots] = {}, squares[kSlots] = {};
    sweep<A>(count, [&](int64_t i, auto piece, int slot)
                        __attribute__((always_inline)) { sums[slot] += piece.load(x + begin + i); });
    const A mean = sum_slots(sums) / static_cast<A>(count);
    sweep<A>(count, [&](int64_t i, auto piece, int slot) __attribute__((always_inline)) {
      const V centred = piece.keep(piece.load(x + begin + i) - mean);
      squares[slot] += centred * centred;
    });
    all.join({static_cast<double>(count), static_cast<double>(mean), static_cast<double>(sum_slots(squares))});
  }
  return all;
}

// 1 / sqrt(variance + eps); about 0 where the norm does not centre.
inline double rstd_of(const Moments& m, bool center, double eps) {
  return 1 / std::sqrt(m.squares / m.count + (center ? 0 : m.mean * m.mean) + eps);
}

}  // namespace walt::WALT_ISA::video_norm
