// The inner loop of backward weight: a few rows of the reduction times one panel of output channels, held in registers
// over all pixels of a block.
#pragma once

#include "causal_conv3d/micro.h"

namespace walt::WALT_ISA::causal_conv3d {

// Backward weight sums over pixels. Where the processor multiplies pairs of bfloat16, a pair is two neighbouring pixels
// of a row, so patches and gradients hold 32-bit lanes of (pixel, next pixel).
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
      const auto value = spread(x + i);
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
