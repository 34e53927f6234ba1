// What the adaln kernels for GPUs share: addresses of rows, and the choice of a kernel by types.
#pragma once

#include <algorithm>

#include "adaln_lora/checks.h"
#include "adaln_lora/cuda.h"
#include "common/device.cuh"

namespace walt::cuda::adaln_lora {

// Row (i, j) of a view of rows: token j of sample i, or modulation row j of sample i.
template <class T>
__device__ inline T* row_of(const TensorView& view, int64_t i, int64_t j) {
  return static_cast<T*>(view.data) + i * view.stride[0] + j * view.stride[1];
}

// Tokens that share one modulation row; a tensor that takes no part has one row for all.
inline int tokens_per_row(const TensorView& rows, int64_t N) {
  return static_cast<int>(rows.defined() ? N / rows.shape[1] : N);
}

// Columns of a row per thread. Without vectors fewer.
template <int kVector>
constexpr int kColumns = kVector > 1 ? 8 : 4;

// Threads of a group that has a row of D to itself.
template <int kVector>
int threads_of(int64_t D, int most) {
  return static_cast<int>(std::min<int64_t>(divide_up<int64_t>(D, kColumns<kVector> * kWarp) * kWarp, most));
}

// Neighbouring tokens of one sample under the same rows of so many modulation tensors.
template <int kRows>
struct Stretch {
  int64_t token, b;
  int n, count;

  __device__ Stretch(const int (&tokens_per_row)[kRows], int N, int64_t begin, int64_t end)
      : token(begin), b(begin / N), n(static_cast<int>(begin - b * N)) {
    count = end - begin < N ? static_cast<int>(end - begin) : N;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int left = tokens_per_row[i] - n % tokens_per_row[i];
      count = left < count ? left : count;
    }
  }
};

inline void require_int(int64_t size, const char* message) { require(size <= 0x3fffffff, message); }

template <class T>
struct Type {
  using type = T;
};

// Calls f with the type of a tensor.
template <class F>
void dispatch_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(Type<float>{});
    case DType::bfloat16: return f(Type<bfloat16>{});
    case DType::float16: return f(Type<float16>{});
    default: throw std::invalid_argument(std::string("no CUDA kernel for dtype ") + dtype_name(dtype));
  }
}

// Calls f with the types of x and of the modulation rows, which are x's own or float32 beside a 16-bit x.
template <class F>
void dispatch_types(DType x, DType rows, F&& f) {
  dispatch_type(x, [&](auto x_type) {
    if (rows == x) return f(x_type, x_type);
    if constexpr (sizeof(typename decltype(x_type)::type) == 2) {
      if (rows == DType::float32) return f(x_type, Type<float>{});
    }
    throw std::invalid_argument("modulation has neither the dtype of x nor float32 beside a 16-bit x");
  });
}

// Calls f with std::bool_constants: whether there is a branch, whether there is a norm.
template <class F>
void dispatch_parts(bool residual, bool norm, F&& f) {
  if (residual && norm) return f(std::true_type{}, std::true_type{});
  if (norm) return f(std::false_type{}, std::true_type{});
  return f(std::true_type{}, std::false_type{});
}

}  // namespace walt::cuda::adaln_lora
