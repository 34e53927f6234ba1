// What the adaln kernels share: finding the row of a token, and how rows are stored.
#pragma once

#include <type_traits>

#include "adaln_lora/checks.h"
#include "common/sweep.h"

namespace walt::WALT_ISA::adaln_lora {

// Whether a pass that moves this many bytes stores past the caches: no cache would hold its outputs until they are
// read, and a plain store would first read what it overwrites. Outputs need rows of whole, aligned vectors.
constexpr int64_t kStreamFrom = 32 << 20;
template <class T>
inline bool streams(int64_t bytes_moved, const TensorView& out) {
  constexpr int64_t lanes = kLanes<accumulate_t<T>>;
  return bytes_moved >= kStreamFrom && reinterpret_cast<uintptr_t>(out.data) % (lanes * sizeof(T)) == 0 &&
         out.shape[2] % lanes == 0 && out.stride[0] % lanes == 0 && out.stride[1] % lanes == 0;
}

// Rows of tokens, [B, N, D].
template <class T>
struct Tokens {
  T* data;
  int64_t batch_stride, token_stride;
  explicit Tokens(const TensorView& v)
      : data(static_cast<T*>(v.data)), batch_stride(v.stride[0]), token_stride(v.stride[1]) {}
  T* row(int64_t b, int64_t n) const { return data + b * batch_stride + n * token_stride; }
};

// Modulation rows, [B, F, D]; row(b, n) is the row of token n.
template <class T>
struct Modulation {
  const T* data;
  int64_t batch_stride, frame_stride, tokens_per_frame;
  Modulation(const TensorView& v, int64_t N)
      : data(static_cast<const T*>(v.data)),
        batch_stride(v.stride[0]),
        frame_stride(v.stride[1]),
        tokens_per_frame(v.defined() && N > 0 ? N / v.shape[1] : 1) {}
  const T* row(int64_t b, int64_t n) const { return data + b * batch_stride + n / tokens_per_frame * frame_stride; }
};

// Calls f with the types of x and of the modulation rows, which are x's own or float32 beside a 16-bit x.
template <class F>
void dispatch_modulation(DType x, DType rows, F&& f) {
  dispatch_dtype(x, [&](auto x_tag) {
    if (rows == x) return f(x_tag, x_tag);
    if constexpr (sizeof(x_tag) == 2) {
      if (rows == DType::float32) return f(x_tag, float{});
    }
    throw std::invalid_argument("modulation has neither the dtype of x nor float32 beside a 16-bit x");
  });
}

}  // namespace walt::WALT_ISA::adaln_lora
