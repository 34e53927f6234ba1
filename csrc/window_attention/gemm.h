// Small matrix products out of cache: C[m][n] += A[m][k] * B[k][n], B and C row-major, A with any strides.
// A and B hold units: one number of the accumulation type, or a pair of bfloat16 of two consecutive k.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "common/simd.h"

namespace walt::WALT_ISA::window_attention {

template <class A_>
struct PlainUnits {
  using A = A_;
  using V = vector_t<A>;
  using Unit = A;
  static constexpr int kStep = 1;  // numbers of the k axis in one unit
  static V load_broadcast(const Unit* p) { return broadcast(*p); }
  static V vector(const Unit* p) { return load(p); }
  static V multiply_add(V sum, V a, V b) { return sum + a * b; }
};

#ifdef WALT_HAS_BF16_DOT
struct Bf16Pairs {
  using A = float;
  using V = vfloat;
  using Unit = int32_t;
  static constexpr int kStep = 2;
  static vint load_broadcast(const Unit* p) { return *p - vint{}; }
  static vint vector(const Unit* p) { return load(p); }
  static V multiply_add(V sum, vint a, vint b) { return dot_bf16(sum, a, b); }
};
#endif

constexpr int kRows = kVectorBytes == 64 ? 12 : 6;  // 12 x 2 sums of 32 registers; 6 x 2 of 16

// Rows x (Vectors * lanes) of C. A is read with unit stride along m when kUnitRow, else along k.
template <class U, int Rows, int Vectors, bool kUnitRow>
inline void micro_kernel(int64_t k, const typename U::Unit* a, int64_t lda, const typename U::Unit* b, int64_t ldb,
                         typename U::A* c, int64_t ldc) {
  constexpr int lanes = kLanes<typename U::A>;
  typename U::V sum[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(c + r * ldc + v * lanes);
  }
  for (int64_t i = 0; i < k; ++i) {
    decltype(U::vector(b)) row[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) row[v] = U::vector(b + v * lanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      const auto x = U::load_broadcast(a + (kUnitRow ? r : r * lda));
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] = U::multiply_add(sum[r][v], x, row[v]);
    }
    a += kUnitRow ? lda : 1;
    b += ldb;
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(c + r * ldc + v * lanes, sum[r][v]);
  }
}

template <class U>
using MicroKernel = void (*)(int64_t, const typename U::Unit*, int64_t, const typename U::Unit*, int64_t,
                             typename U::A*, int64_t);

// Kernels for 1..kRows rows, by rows - 1.
template <class U, int Vectors, bool kUnitRow, size_t... R>
constexpr std::array<MicroKernel<U>, kRows> micro_kernels(std::index_sequence<R...>) {
  return {&micro_kernel<U, static_cast<int>(R) + 1, Vectors, kUnitRow>...};
}

// C[m][vectors * lanes] += A B. kUnitRow: A[i][j] is a[i + j * lda], else a[i * lda + j], j counting units.
template <class U, bool kUnitRow>
void gemm(int64_t m, int64_t vectors, int64_t k, const typename U::Unit* a, int64_t lda, const typename U::Unit* b,
          int64_t ldb, typename U::A* c, int64_t ldc) {
  constexpr int lanes = kLanes<typename U::A>;
  static constexpr auto two = micro_kernels<U, 2, kUnitRow>(std::make_index_sequence<kRows>{});
  static constexpr auto one = micro_kernels<U, 1, kUnitRow>(std::make_index_sequence<kRows>{});
  constexpr int64_t kCacheBytes = 32 << 10;  // the L1 cache
  const int64_t blocks = (m + kRows - 1) / kRows;
  const auto tile = [&](int64_t block, int64_t v, int64_t k0, int64_t k1) {
    const int64_t i = m * block / blocks, rows = m * (block + 1) / blocks - i;  // nearly equal blocks, none tiny
    const auto kernel = (vectors - v >= 2 ? two : one)[rows - 1];
    const auto* a0 = kUnitRow ? a + i + k0 * lda : a + i * lda + k0;
    kernel(k1 - k0, a0, lda, b + k0 * ldb + v * lanes, ldb, c + i * ldc + v * lanes, ldc);
  };
  if (k * vectors * kVectorBytes <= kCacheBytes) {  // B stays in cache: rows outermost, A is read once
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t v = 0; v < vectors; v += 2) tile(block, v, 0, k);
    }
    return;
  }
  // Else a panel of two vectors of B stays, in a third of the cache: its rows straddle lines, and A needs the rest.
  const int64_t chunks = (k * 6 * kVectorBytes + kCacheBytes - 1) / kCacheBytes;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    for (int64_t v = 0; v < vectors; v += 2) {
      for (int64_t block = 0; block < blocks; ++block) tile(block, v, k * chunk / chunks, k * (chunk + 1) / chunks);
    }
  }
}

}  // namespace walt::WALT_ISA::window_attention
