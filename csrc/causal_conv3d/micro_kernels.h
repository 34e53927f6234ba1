// The inner loops: tiles of sums that stay in registers over the whole reduction. In forward and backward data a tile
// is a few pixels by one panel of output channels; in backward weight a few rows of the weight by one panel.
#pragma once

#include "causal_conv3d/geometry.h"
#include "common/simd.h"

namespace walt::WALT_ISA::causal_conv3d {

// Pixels, or rows, of a tile. A panel is two vectors wide, so that 64-byte vectors take 24 sums, 2 weights and a
// broadcast of 32 vector registers, and 12 + 3 addresses of 16 others; 32-byte vectors 12 + 2 + 1 of 16.
constexpr int kTilePixels = kVectorBytes == 64 ? 12 : kVectorBytes == 32 ? 6 : 4;

// How the numbers of dtype T lie in patches and packed weights. 16-bit floats are widened, except bfloat16 where the
// processor multiplies pairs of them; then `step` = 2 values of the reduction sit in one 32-bit lane.
template <class T>
struct Packing {
  using Acc = accumulate_t<T>;
  using Value = accumulate_t<T>;  // in patches
  using Lane = accumulate_t<T>;   // in packed weights
  static constexpr int step = 1;
};
#if defined(WALT_HAS_BF16_DOT)
template <>
struct Packing<bfloat16> {
  using Acc = float;
  using Value = bfloat16;
  using Lane = int32_t;
  static constexpr int step = 2;
};
#endif

inline vfloat load_broadcast(const float* p) { return broadcast(*p); }
inline vdouble load_broadcast(const double* p) { return broadcast(*p); }
inline vfloat accumulate(vfloat acc, vfloat a, vfloat b) { return acc + a * b; }
inline vdouble accumulate(vdouble acc, vdouble a, vdouble b) { return acc + a * b; }
#if defined(WALT_HAS_BF16_DOT)
inline vint load_broadcast(const bfloat16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return vint{} + pair;
}
inline vint load_broadcast(const int32_t* p) { return vint{} + *p; }
inline vfloat accumulate(vfloat acc, vint a, vint b) { return dot_bf16(acc, a, b); }
#endif

// acc[p][n] (+)= sum over runs of patch[offset_p + k] * weights[k][n] for `pixels` pixels and `vectors` vectors of n.
// `resume` continues from what acc holds.
template <class T, int pixels, int vectors>
void tile_kernel(const typename Packing<T>::Value* patch, const int64_t* offsets, const Run* runs, int64_t run_count,
                 const typename Packing<T>::Lane* weights, typename Packing<T>::Acc* acc, bool resume) {
  using Pack = Packing<T>;
  using A = typename Pack::Acc;
  constexpr int lanes = kLanes<A>, width = vectors * lanes, step = Pack::step;
  vector_t<A> sum[pixels][vectors];
  const typename Pack::Value* x[pixels];
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
    x[p] = patch + offsets[p];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[p][v] = resume ? load(acc + p * width + v * lanes) : vector_t<A>{};
  }
  for (int64_t r = 0; r < run_count; ++r) {
    const typename Pack::Lane* w = weights + runs[r].weight / step * width;
    int64_t k = runs[r].patch;
    const int64_t end = k + runs[r].length;
#pragma GCC unroll 2
    for (; k < end; k += step, w += width) {
      decltype(load(w)) row[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) row[v] = load(w + v * lanes);
#pragma GCC unroll 16
      for (int p = 0; p < pixels; ++p) {
        const auto value = load_broadcast(x[p] + k);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) sum[p][v] = accumulate(sum[p][v], value, row[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < pixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(acc + p * width + v * lanes, sum[p][v]);
  }
}

template <class T>
using TileKernel = void (*)(const typename Packing<T>::Value*, const int64_t*, const Run*, int64_t,
                            const typename Packing<T>::Lane*, typename Packing<T>::Acc*, bool);

template <class T, int vectors, int... index>
TileKernel<T> find_tile_kernel(int pixels, std::integer_sequence<int, index...>) {
  static constexpr TileKernel<T> table[] = {tile_kernel<T, index + 1, vectors>...};
  return table[pixels - 1];
}

template <class T>
TileKernel<T> tile_kernel_for(int pixels, int vectors) {
  constexpr auto sequence = std::make_integer_sequence<int, kTilePixels>{};
  return vectors == 1 ? find_tile_kernel<T, 1>(pixels, sequence) : find_tile_kernel<T, 2>(pixels, sequence);
}

// ---- backward weight ------------------------------------------------------------------------------------------------

// It sums over pixels. Where the processor multiplies pairs of bfloat16, a pair is two neighbouring pixels of a row, so
// patches and gradients hold 32-bit lanes of (pixel, next pixel).
template <class T>
struct PixelPacking {
  using Acc = accumulate_t<T>;
  using Lane = accumulate_t<T>;
  static constexpr int step = 1;
};
#if defined(WALT_HAS_BF16_DOT)
template <>
struct PixelPacking<bfloat16> {
  using Acc = float;
  using Lane = int32_t;
  static constexpr int step = 2;
};
#endif

// sum[i][n] += sum over p of patch[offset_p + i] * grad[p][n] for i < rows.
template <class T, int rows, int vectors>
void weight_tile(const typename PixelPacking<T>::Lane* patch, const int64_t* offsets, int64_t pixels,
                 const typename PixelPacking<T>::Lane* grad, typename PixelPacking<T>::Acc* sum) {
  using A = typename PixelPacking<T>::Acc;
  constexpr int lanes = kLanes<A>, width = vectors * lanes;
  vector_t<A> acc[rows][vectors] = {};
  for (int64_t p = 0; p < pixels; ++p, grad += width) {
    const typename PixelPacking<T>::Lane* x = patch + offsets[p];
    decltype(load(grad)) row[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) row[v] = load(grad + v * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const auto value = load_broadcast(x + i);
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) acc[i][v] = accumulate(acc[i][v], value, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      A* at = sum + i * width + v * lanes;
      store(at, load(at) + acc[i][v]);
    }
  }
}

template <class T>
using WeightTile = void (*)(const typename PixelPacking<T>::Lane*, const int64_t*, int64_t,
                            const typename PixelPacking<T>::Lane*, typename PixelPacking<T>::Acc*);

template <class T, int vectors, int... index>
WeightTile<T> find_weight_tile(int rows, std::integer_sequence<int, index...>) {
  static constexpr WeightTile<T> table[] = {weight_tile<T, index + 1, vectors>...};
  return table[rows - 1];
}

template <class T>
WeightTile<T> weight_tile_for(int rows, int vectors) {
  constexpr auto sequence = std::make_integer_sequence<int, kTilePixels>{};
  return vectors == 1 ? find_weight_tile<T, 1>(rows, sequence) : find_weight_tile<T, 2>(rows, sequence);
}

}  // namespace walt::WALT_ISA::causal_conv3d
