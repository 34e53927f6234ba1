// What CUDA kernels share: conversions, 16-byte accesses, sums over threads, launches. The same sources also compile as
// plain C++ against emulate.h, where tests run them on the CPU.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/cuda_call.h"
#include "common/tensor_view.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "common/emulate.h"
#endif

#define WALT_HOST_DEVICE __host__ __device__

namespace walt::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;

template <class Integer>
WALT_HOST_DEVICE constexpr Integer divide_up(Integer a, Integer b) {
  return (a + b - 1) / b;
}

inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::invalid_argument("too many elements for one launch");
  return static_cast<unsigned>(blocks);
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, const CudaCall& call,
            Parameters... arguments) {
#ifdef __CUDACC__
  void* addresses[] = {&arguments...};
  const auto stream = static_cast<cudaStream_t>(call.stream);
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, 0, stream);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // told here, so that nobody else trips over it
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
#else
  (void)name, (void)call;
  emulate::run(grid, block, [&] { kernel(arguments...); });
#endif
}

// ---- 16-bit floats: pairs of them in 32 bits, the lower one first ---------------------------------------------------

template <class T>
struct Pair;  // unpack(word, low, high), pack(low, high); rounds to nearest, ties to even

#ifdef __CUDACC__
template <>
struct Pair<bfloat16> {
  static __device__ void unpack(uint32_t word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};
template <>
struct Pair<float16> {
  static __device__ void unpack(uint32_t word, float& low, float& high) {
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}"
        : "=f"(low), "=f"(high)
        : "r"(word));
  }
  static __device__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};
__device__ inline float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t float_to_bits(float value) { return __float_as_uint(value); }
#else
template <class T>
struct Pair : emulate::Pair<T> {};
using emulate::bits_to_float;
using emulate::float_to_bits;
#endif

// ---- a few neighbouring elements of a row: kVector * sizeof(T) is a multiple of 16 bytes, or kVector is 1 -----------

template <class T, int kVector>
struct Packed {
  static constexpr int kWords = kVector * static_cast<int>(sizeof(T)) / 4;
  uint4 quads[kWords / 4] = {};

  // `last_use`: nobody will read these bytes again soon, so they need not displace others in the caches.
  __device__ void load(const T* p, bool last_use) {
    const uint4* const source = reinterpret_cast<const uint4*>(p);
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) quads[i] = last_use ? __ldcs(source + i) : __ldg(source + i);
  }
  __device__ void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) reinterpret_cast<uint4*>(p)[i] = quads[i];
  }
  // For what nobody will read soon.
  __device__ void stream(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) __stcs(reinterpret_cast<uint4*>(p) + i, quads[i]);
  }
  __device__ void widen(float (&v)[kVector]) const {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint32_t words[4] = {quads[i].x, quads[i].y, quads[i].z, quads[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          v[4 * i + j] = bits_to_float(words[j]);
        } else {
          Pair<T>::unpack(words[j], v[8 * i + 2 * j], v[8 * i + 2 * j + 1]);
        }
      }
    }
  }
  __device__ void round(const float (&v)[kVector]) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (sizeof(T) == 4) {
          words[j] = float_to_bits(v[4 * i + j]);
        } else {
          words[j] = Pair<T>::pack(v[8 * i + 2 * j], v[8 * i + 2 * j + 1]);
        }
      }
      quads[i] = uint4{words[0], words[1], words[2], words[3]};
    }
  }
};

template <class T>
struct Packed<T, 1> {
  T value = {};

  __device__ void load(const T* p, bool) { value = *p; }
  __device__ void store(T* p) const { *p = value; }
  __device__ void stream(T* p) const { *p = value; }
  __device__ void widen(float (&v)[1]) const {
    if constexpr (sizeof(T) == 4) {
      v[0] = value;
    } else {
      float unused;
      Pair<T>::unpack(value.bits, v[0], unused);
    }
  }
  __device__ void round(const float (&v)[1]) {
    if constexpr (sizeof(T) == 4) {
      value = v[0];
    } else {
      value.bits = static_cast<uint16_t>(Pair<T>::pack(v[0], 0.0f));
    }
  }
};

template <int kVector, class T>
__device__ inline void load(const T* p, float (&v)[kVector]) {
  Packed<T, kVector> packed;
  packed.load(p, false);
  packed.widen(v);
}

template <int kVector, class T>
__device__ inline void store(T* p, const float (&v)[kVector]) {
  Packed<T, kVector> packed;
  packed.round(v);
  packed.store(p);
}

template <int kVector, class T>
__device__ inline void stream(T* p, const float (&v)[kVector]) {
  Packed<T, kVector> packed;
  packed.round(v);
  packed.stream(p);
}

template <class T>
__device__ inline float load(const T* p) {
  float v[1];
  load<1>(p, v);
  return v[0];
}

template <class T>
__device__ inline void store(T* p, float value) {
  const float v[1] = {value};
  store<1>(p, v);
}

// Whether whole vectors of a row may be read and written at its 16-byte boundaries. The last dimension is dense.
inline bool allows_vectors(const TensorView& v) {
  if (!v.defined()) return true;
  const int64_t size = v.dtype == DType::float32 ? 4 : 2;
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % kVectorBytes == 0;
  for (int i = 0; i < v.rank - 1; ++i) aligned = aligned && (v.shape[i] <= 1 || v.stride[i] * size % kVectorBytes == 0);
  return aligned && v.shape[v.rank - 1] * size % kVectorBytes == 0;
}

// ---- sums over threads, in an order that is always the same ---------------------------------------------------------

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

constexpr int kUsualWarps = 4;  // of a group: their sums are added without a loop

// Every thread of a group of so many neighbours, whole warps of a block, gets the group's sums. One barrier, for the
// whole block: a caller in a loop takes turns between two scratch arrays.
template <int kValues, int kMaxWarps>
__device__ inline void group_sum(float (&values)[kValues], float (&scratch)[kValues][kMaxWarps], int threads) {
  const int warps = threads / kWarp, warp = static_cast<int>(threadIdx.x) / kWarp, first = warp / warps * warps;
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i]);
  if (warps == 1) return;
  if (threadIdx.x % kWarp == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) scratch[i][warp] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = scratch[i][first];
#pragma unroll
    for (int w = 1; w < kUsualWarps; ++w) {
      if (w < warps) values[i] += scratch[i][first + w];
    }
    for (int w = kUsualWarps; w < warps; ++w) values[i] += scratch[i][first + w];
  }
}

}  // namespace walt::cuda
