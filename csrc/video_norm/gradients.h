// From sums over the pixels of a frame to the gradients of weight, bias, scale and shift.
#pragma once

#include "video_norm/video.h"

namespace walt::WALT_ISA::video_norm {

// Of every frame and channel: the sum of g and of g * normal, where g is the gradient of what is activated and normal
// is (x - mean) * rstd.
class ChannelSums {
 public:
  explicit ChannelSums(const Sizes& s) : C_(s.C), values_(s.frames() * 2 * s.C) {}
  double* of(int64_t frame) const { return values_.data() + frame * 2 * C_; }
  double* with_normal(int64_t frame) const { return of(frame) + C_; }

  // Adds up `parts` pairs of rows, [parts][2][width], in order.
  template <class A>
  void join(int64_t frame, const A* rows, int64_t parts, int64_t width) const {
    for (int row = 0; row < 2; ++row) {
      double* const sums = of(frame) + row * C_;
      std::fill(sums, sums + C_, 0.0);
      for (int64_t part = 0; part < parts; ++part) {
        const A* const terms = rows + (part * 2 + row) * width;
        for (int64_t c = 0; c < C_; ++c) sums[c] += static_cast<double>(terms[c]);
      }
    }
  }

 private:
  int64_t C_;
  Scratch<double> values_;
};

inline void assign(const TensorView& v, int64_t index, double value) {
  switch (v.dtype) {
    case DType::float32: static_cast<float*>(v.data)[index] = static_cast<float>(value); break;
    case DType::float64: static_cast<double*>(v.data)[index] = value; break;
    case DType::bfloat16:
      static_cast<bfloat16*>(v.data)[index] = from_float<bfloat16>(static_cast<float>(value));
      break;
    default: static_cast<float16*>(v.data)[index] = from_float<float16>(static_cast<float>(value));
  }
}

// Channel by channel, each over all frames in order.
inline void write_gradients(const VideoNormBackwardParams& p, const Sizes& s, const ChannelSums& sums) {
  const bool each_scale = p.grad_scale.shape[2] > 1;
  const bool each_shift = p.grad_shift.shape[2] > 1;
  for (int64_t c = 0; c < s.C; ++c) {
    const double weight = value<double>(p.weight, c * p.weight.stride[0], 1);
    const double bias = value<double>(p.bias, c * p.bias.stride[0], 0);
    double of_weight = 0, of_bias = 0;
    for (int64_t b = 0; b < s.B; ++b) {
      double of_scale = 0, of_shift = 0;
      for (int64_t t = 0; t < s.T; ++t) {
        const double sum = sums.of(b * s.T + t)[c], with_normal = sums.with_normal(b * s.T + t)[c];
        const double scale = 1 + value<double>(p.scale, place(p.scale, b, t, c), 0);
        of_weight += scale * with_normal;
        of_bias += scale * sum;
        of_scale += weight * with_normal + bias * sum;
        of_shift += sum;
        if (each_scale) assign(p.grad_scale, place(p.grad_scale, b, t, c), weight * with_normal + bias * sum);
        if (each_shift) assign(p.grad_shift, place(p.grad_shift, b, t, c), sum);
      }
      if (p.grad_scale.defined() && !each_scale) assign(p.grad_scale, place(p.grad_scale, b, 0, c), of_scale);
      if (p.grad_shift.defined() && !each_shift) assign(p.grad_shift, place(p.grad_shift, b, 0, c), of_shift);
    }
    if (p.grad_weight.defined()) assign(p.grad_weight, c * p.grad_weight.stride[0], of_weight);
    if (p.grad_bias.defined()) assign(p.grad_bias, c * p.grad_bias.stride[0], of_bias);
  }
}

}  // namespace walt::WALT_ISA::video_norm
