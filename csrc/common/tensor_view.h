// What a kernel knows of a tensor: an address, a dtype, sizes and strides. It owns nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace walt {

enum class DType : int { float32, float64, bfloat16, float16, boolean };

constexpr int kMaxRank = 8;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::float32;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements, 64-bit on purpose: video tensors pass 2^31 elements

  bool defined() const { return rank > 0; }  // every optional argument of ours has at least one dimension

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

// 16-bit floats are storage only: kernels sum in float32.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The type a kernel accumulates in.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace walt
