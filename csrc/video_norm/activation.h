// SiLU and its gradient on packs of neighbouring vectors.
#pragma once

#include "common/sweep.h"

namespace walt::WALT_ISA::video_norm {

// Turns z into 1 / (1 + exp(-z)), relative error 3e-7 and, without fused multiply-adds, 1e-7 |z|. exp(-z) is 2^(n + r),
// n an integer, |r| at most 1/2, and 2^r a polynomial. Beyond +-87, where 2^n would leave float's range, z counts
// as 87.
template <int count>
inline __attribute__((always_inline)) void sigmoid(vfloat (&z)[count]) {
  constexpr float kLog2e = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vfloat shifted[count], r[count], power[count];
  for (int i = 0; i < count; ++i) z[i] = maximum(broadcast(-87.0f), minimum(broadcast(87.0f), z[i]));  // keeps NaN
  for (int i = 0; i < count; ++i) shifted[i] = kRound - z[i] * kLog2e;
  for (int i = 0; i < count; ++i) r[i] = -(shifted[i] - kRound) - z[i] * kLog2e;
  for (int i = 0; i < count; ++i) power[i] = r[i] * 1.32764718e-3f + 9.67554133e-3f;
  for (const float term : {5.55071327e-2f, 2.40221197e-1f, 6.93146967e-1f, 1.00000007f}) {
    for (int i = 0; i < count; ++i) power[i] = power[i] * r[i] + term;
  }
  for (int i = 0; i < count; ++i) power[i] = (vfloat)((vint)power[i] + ((vint)shifted[i] << 23));
  for (int i = 0; i < count; ++i) z[i] = 1 / (1 + power[i]);
}
template <int count>
inline void sigmoid(vdouble (&z)[count]) {
  for (int i = 0; i < count; ++i) z[i] = 1 / (1 + exp(-z[i]));
}

// z to silu(z).
template <bool kSilu, int count, class V>
inline __attribute__((always_inline)) void activate(V (&z)[count]) {
  if constexpr (kSilu) {
    V s[count];
    for (int i = 0; i < count; ++i) s[i] = z[i];
    sigmoid(s);
    for (int i = 0; i < count; ++i) z[i] *= s[i];
  }
}

// grad, of what comes after the activation of z, to that of z.
template <bool kSilu, int count, class V>
inline __attribute__((always_inline)) void through_activation(V (&grad)[count], const V (&z)[count]) {
  if constexpr (kSilu) {
    V s[count];
    for (int i = 0; i < count; ++i) s[i] = z[i];
    sigmoid(s);
    for (int i = 0; i < count; ++i) grad[i] *= s[i] * (1 + z[i] * (1 - s[i]));
  }
}

// Rounds a pack; bfloat16 in one instruction where the processor has it (store_flushed).
template <int count, class T, class V>
inline __attribute__((always_inline)) void store_pack(FullVector<>, T* to, const V (&values)[count]) {
  for (int i = 0; i < count; ++i) store_flushed(to + i * kLanes<accumulate_t<T>>, values[i]);
}
template <class T, class V>
inline __attribute__((always_inline)) void store_pack(PartialVector piece, T* to, const V (&values)[1]) {
  piece.store(to, values[0]);
}

}  // namespace walt::WALT_ISA::video_norm
