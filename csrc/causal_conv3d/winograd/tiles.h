// Rows of tiles to Winograd's transformed positions and back, a vector of channels at a time.
#pragma once

#include "causal_conv3d/winograd/transforms.h"
#include "common/simd.h"

namespace walt::WALT_ISA::causal_conv3d {

// B^T d B of a row of tiles, `pitch` channels each. Pixels of the patch lie `pitch` apart.
template <int m, class A>
void transform_input(const A* patch, int64_t row_stride, int64_t pitch, int64_t tiles, A* to, int64_t position_stride,
                     int64_t tile_stride) {
  using V = vector_t<A>;
  constexpr int n = Winograd<m>::n;
  for (int64_t c = 0; c < pitch; c += kLanes<A>) {
    const A* from = patch + c;
    V column[n][n];  // columns that are transformed along the height; the last two serve the next tile too
    const auto read = [&](int j) {
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) column[j][i] = load(from + i * row_stride);
      Winograd<m>::input(column[j], column[j], 1);
      from += pitch;
    };
    read(m);
    read(m + 1);
    for (int64_t tile = 0; tile < tiles; ++tile) {
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) {
        column[0][i] = column[m][i];
        column[1][i] = column[m + 1][i];
      }
#pragma GCC unroll 6
      for (int j = 2; j < n; ++j) read(j);
      A* target = to + tile * tile_stride + c;
#pragma GCC unroll 6
      for (int i = 0; i < n; ++i) {
        V row[n];
#pragma GCC unroll 6
        for (int j = 0; j < n; ++j) row[j] = column[j][i];
        Winograd<m>::input(row, row, 1);
#pragma GCC unroll 6
        for (int j = 0; j < n; ++j) store(target + (i * n + j) * position_stride, row[j]);
      }
    }
  }
}

// A^T p A of a row of tiles into the pixels of m rows, both one panel of `vectors` vectors wide.
template <int m, class A>
void transform_output(const A* from, int64_t position_stride, int vectors, int64_t tiles, A* pixels) {
  using V = vector_t<A>;
  constexpr int n = Winograd<m>::n, lanes = kLanes<A>;
  const int64_t width = vectors * lanes;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int v = 0; v < vectors; ++v) {
      const A* source = from + tile * width + v * lanes;
      V p[n][n];
#pragma GCC unroll 6
      for (int j = 0; j < n; ++j) {
#pragma GCC unroll 6
        for (int i = 0; i < n; ++i) p[i][j] = load(source + (i * n + j) * position_stride);
        Winograd<m>::output(&p[0][j], &p[0][j], n);
      }
#pragma GCC unroll 4
      for (int i = 0; i < m; ++i) {
        Winograd<m>::output(p[i], p[i], 1);
#pragma GCC unroll 4
        for (int j = 0; j < m; ++j) store(pixels + ((i * tiles + tile) * m + j) * width + v * lanes, p[i][j]);
      }
    }
  }
}

}  // namespace walt::WALT_ISA::causal_conv3d
