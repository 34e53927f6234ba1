// Winograd's minimal filtering F(m x m, 3 x 3): m x m outputs of a 3 x 3 correlation from (m + 2)^2 products instead of
// 9 m^2 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", section 4):
//
//   Y = A^T [ (G g G^T) * (B^T d B) ] A          y: m x m outputs, g: 3 x 3 taps, d: (m + 2)^2 inputs, *: elementwise
//
// and, being linear in g, the gradient of the taps is dg = G^T [ sum over tiles of (A dy A^T) * (B^T d B) ] G.
// Each function below is one factor, applied along one axis: from[i * stride] -> to[i * stride]. X is a vector or a
// number; `from` and `to` may be the same memory.
//
// For m = 2 an output depends on the three inputs under its taps only, to the bit. For m = 4 the other inputs of its
// tile cancel up to about ten times the rounding of float32: less than a 16-bit output shows.
#pragma once

#include <cstdint>

namespace walt::WALT_ISA::causal_conv3d {

template <int m>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int n = 4;  // positions of a transformed tile along one axis

  // B^T d: 4 inputs -> 4 positions.
  template <class X>
  static void input(const X* from, X* to, int64_t stride) {
    const X d0 = from[0], d1 = from[stride], d2 = from[2 * stride], d3 = from[3 * stride];
    to[0] = d0 - d2;
    to[stride] = d1 + d2;
    to[2 * stride] = d2 - d1;
    to[3 * stride] = d1 - d3;
  }
  // G g: 3 taps -> 4 positions.
  template <class X>
  static void weight(const X* from, X* to, int64_t stride) {
    const X g0 = from[0], g1 = from[stride], g2 = from[2 * stride];
    const X even = (g0 + g2) * 0.5f, odd = g1 * 0.5f;
    to[0] = g0;
    to[stride] = even + odd;
    to[2 * stride] = even - odd;
    to[3 * stride] = g2;
  }
  // A^T p: 4 positions -> 2 outputs.
  template <class X>
  static void output(const X* from, X* to, int64_t stride) {
    const X p0 = from[0], p1 = from[stride], p2 = from[2 * stride], p3 = from[3 * stride];
    to[0] = p0 + p1 + p2;
    to[stride] = p1 - p2 - p3;
  }
  // A dy: 2 output gradients -> 4 positions. Position 1 is their sum.
  template <class X>
  static void output_gradient(const X* from, X* to, int64_t stride) {
    const X y0 = from[0], y1 = from[stride];
    to[0] = y0;
    to[stride] = y0 + y1;
    to[2 * stride] = y0 - y1;
    to[3 * stride] = -y1;
  }
  // G^T p: 4 positions -> 3 tap gradients.
  template <class X>
  static void weight_gradient(const X* from, X* to, int64_t stride) {
    const X p0 = from[0], p1 = from[stride], p2 = from[2 * stride], p3 = from[3 * stride];
    const X even = (p1 + p2) * 0.5f;
    to[0] = p0 + even;
    to[stride] = (p1 - p2) * 0.5f;
    to[2 * stride] = p3 + even;
  }
};

template <>
struct Winograd<4> {
  static constexpr int n = 6;

  template <class X>
  static void input(const X* from, X* to, int64_t stride) {
    const X d0 = from[0], d1 = from[stride], d2 = from[2 * stride], d3 = from[3 * stride], d4 = from[4 * stride],
            d5 = from[5 * stride];
    const X near = d4 - 4.0f * d2, near_odd = d3 - 4.0f * d1;
    const X far = d4 - d2, far_odd = 2.0f * (d3 - d1);
    to[0] = 4.0f * d0 - 5.0f * d2 + d4;
    to[stride] = near + near_odd;
    to[2 * stride] = near - near_odd;
    to[3 * stride] = far + far_odd;
    to[4 * stride] = far - far_odd;
    to[5 * stride] = 4.0f * d1 - 5.0f * d3 + d5;
  }
  template <class X>
  static void weight(const X* from, X* to, int64_t stride) {
    const X g0 = from[0], g1 = from[stride], g2 = from[2 * stride];
    const X even = (g0 + g2) * (-1.0f / 6), odd = g1 * (1.0f / 6);
    const X far = g0 * (1.0f / 24) + g2 * (1.0f / 6), far_odd = g1 * (1.0f / 12);
    to[0] = g0 * 0.25f;
    to[stride] = even - odd;
    to[2 * stride] = even + odd;
    to[3 * stride] = far + far_odd;
    to[4 * stride] = far - far_odd;
    to[5 * stride] = g2;
  }
  template <class X>
  static void output(const X* from, X* to, int64_t stride) {
    const X p0 = from[0], p1 = from[stride], p2 = from[2 * stride], p3 = from[3 * stride], p4 = from[4 * stride],
            p5 = from[5 * stride];
    const X near = p1 + p2, near_odd = p1 - p2, far = p3 + p4, far_odd = p3 - p4;
    to[0] = p0 + near + far;
    to[stride] = near_odd + 2.0f * far_odd;
    to[2 * stride] = near + 4.0f * far;
    to[3 * stride] = near_odd + 8.0f * far_odd + p5;
  }
  template <class X>
  static void output_gradient(const X* from, X* to, int64_t stride) {
    const X y0 = from[0], y1 = from[stride], y2 = from[2 * stride], y3 = from[3 * stride];
    const X near = y0 + y2, near_odd = y1 + y3, far = y0 + 4.0f * y2, far_odd = 2.0f * y1 + 8.0f * y3;
    to[0] = y0;
    to[stride] = near + near_odd;
    to[2 * stride] = near - near_odd;
    to[3 * stride] = far + far_odd;
    to[4 * stride] = far - far_odd;
    to[5 * stride] = y3;
  }
  template <class X>
  static void weight_gradient(const X* from, X* to, int64_t stride) {
    const X p0 = from[0], p1 = from[stride], p2 = from[2 * stride], p3 = from[3 * stride], p4 = from[4 * stride],
            p5 = from[5 * stride];
    const X near = (p1 + p2) * (-1.0f / 6), near_odd = (p1 - p2) * (-1.0f / 6), far = p3 + p4, far_odd = p3 - p4;
    to[0] = p0 * 0.25f + near + far * (1.0f / 24);
    to[stride] = near_odd + far_odd * (1.0f / 12);
    to[2 * stride] = near + far * (1.0f / 6) + p5;
  }
};

// The larger tile needs 4 / 2.25 times fewer products and rounds more: for results of 16 bits.
template <class T>
constexpr int kWinogradTile = sizeof(T) == 2 ? 4 : 2;

// Tiles of m x m outputs over a frame, those that overhang included.
inline int64_t winograd_tiles(int64_t m, int64_t rows, int64_t columns) {
  return (rows + m - 1) / m * ((columns + m - 1) / m);
}

// Whether the larger tile beats the direct method where the processor multiplies pairs of bfloat16, two products at a
// time. Measured on Zen 5: from 16 channels and 16 x 16 outputs on, with at most 0.65 times as many multiplications.
inline bool winograd_beats_pairs(int64_t channels, int64_t rows, int64_t columns) {
  const int64_t products = 6 * 6 * winograd_tiles(4, rows, columns), pairs = 9 * rows * columns;  // twice as many
  return channels >= 16 && rows >= 16 && columns >= 16 && 20 * 2 * products <= 13 * pairs;
}

}  // namespace walt::WALT_ISA::causal_conv3d
