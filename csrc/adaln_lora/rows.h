// What the adaln kernels share: walking a row in vectors, and finding the row of a token.
#pragma once

#include <type_traits>

#include "adaln_lora/checks.h"
#include "common/simd.h"

namespace walt::WALT_ISA::adaln_lora {

// How a vector of a row is read and written: all of it, or the lanes that are left at the row's end; the others read as
// zero. With kStream vectors are stored past the caches.
template <bool kStream = false>
struct FullVector {
  template <class T>
  auto load(const T* p) const {
    return walt::WALT_ISA::load(p);
  }
  template <class T>
  void store(T* p, vector_t<accumulate_t<T>> v) const {
    if constexpr (kStream) {
      store_streaming(p, v);
    } else {
      walt::WALT_ISA::store(p, v);
    }
  }
  template <class V>
  V keep(V v) const {
    return v;
  }
};
struct PartialVector {
  int64_t count;
  template <class T>
  auto load(const T* p) const {
    return load_partial(p, count);
  }
  template <class T>
  void store(T* p, vector_t<accumulate_t<T>> v) const {
    store_partial(p, v, count);
  }
  template <class V>
  V keep(V v) const {
    for (int i = static_cast<int>(count); i < static_cast<int>(sizeof(V) / sizeof(v[0])); ++i) v[i] = 0;
    return v;
  }
};

// Calls f(d, piece, slot) for the vectors of a row of D elements; piece is a FullVector or a PartialVector. Four
// neighbouring calls get four slots, so that a sum can run in four independent chains; the last few all get slot 0.
constexpr int kSlots = 4;
template <class A, bool kStream = false, class F>
inline __attribute__((always_inline)) void sweep(int64_t D, F&& f) {
  constexpr int lanes = kLanes<A>;
  int64_t d = 0;
  for (; d + kSlots * lanes <= D; d += kSlots * lanes) {
    f(d, FullVector<kStream>{}, 0);
    f(d + lanes, FullVector<kStream>{}, 1);
    f(d + 2 * lanes, FullVector<kStream>{}, 2);
    f(d + 3 * lanes, FullVector<kStream>{}, 3);
  }
  for (; d + lanes <= D; d += lanes) f(d, FullVector<kStream>{}, 0);
  if (d < D) f(d, PartialVector{D - d}, 0);
}

template <class V>
inline auto sum_slots(const V (&slots)[kSlots]) {
  return reduce_add((slots[0] + slots[1]) + (slots[2] + slots[3]));
}

// Below this much work a second thread costs more than it brings.
constexpr int64_t kGrain = 32768;
inline int threads_for(int64_t elements, int threads) { return elements < kGrain ? 1 : threads; }

// Whether a pass that moves this many bytes stores past the caches: no cache would hold its outputs until they are
// read, and a plain store would first read what it overwrites. Outputs need rows of whole, aligned vectors.
constexpr int64_t kStreamFrom = 32 << 20;
template <class T>
inline bool streams(int64_t bytes_moved, const TensorView& out) {
  constexpr int64_t lanes = kLanes<accumulate_t<T>>;
  return bytes_moved >= kStreamFrom && reinterpret_cast<uintptr_t>(out.data) % (lanes * sizeof(T)) == 0 &&
         out.shape[2] % lanes == 0 && out.stride[0] % lanes == 0 && out.stride[1] % lanes == 0;
}

// A row length rounded up so that whole vectors may be read and written in scratch memory.
template <class A>
inline int64_t padded(int64_t D) {
  return (D + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
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
