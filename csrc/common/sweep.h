// Walking a row in vectors.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/simd.h"

namespace walt::WALT_ISA {

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

// Calls f(d, piece, count) for all vectors of a row, `count` of them at a time, a constant: long chains of operations
// (an exponential) on neighbouring vectors, written side by side, run side by side.
constexpr int kPack = kVectorBytes == 64 ? 4 : 2;  // as many as the registers hold
template <class A, class F>
inline __attribute__((always_inline)) void sweep_packs(int64_t D, F&& f) {
  constexpr int lanes = kLanes<A>;
  int64_t d = 0;
  for (; d + kPack * lanes <= D; d += kPack * lanes) f(d, FullVector<>{}, std::integral_constant<int, kPack>{});
  if constexpr (kPack == 4) {
    if (d + 2 * lanes <= D) {
      f(d, FullVector<>{}, std::integral_constant<int, 2>{});
      d += 2 * lanes;
    }
  }
  if (d + lanes <= D) {
    f(d, FullVector<>{}, std::integral_constant<int, 1>{});
    d += lanes;
  }
  if (d < D) f(d, PartialVector{D - d}, std::integral_constant<int, 1>{});
}

// A row length rounded up so that whole vectors may be read and written in scratch memory.
template <class A>
inline int64_t padded(int64_t D) {
  return (D + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

}  // namespace walt::WALT_ISA
