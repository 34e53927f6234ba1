// The one portable SIMD layer: compiler vector extensions as wide as the level's registers. Intrinsics live here and
// in amx.h, and only where the compiler cannot find the instruction by itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/tensor_view.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace walt::WALT_ISA {

// WALT_EMULATE_AVX512 compiles the AVX-512 level without its instructions: the same widths and the same pairs of
// bfloat16, in vector code that AVX2 can run. Slow; it lets the level's kernels be tested where it cannot run.
#if defined(__AVX512F__) || defined(WALT_EMULATE_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vuint __attribute__((vector_size(kVectorBytes)));
typedef int64_t vlong __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vhalf __attribute__((vector_size(kVectorBytes / 2)));

// Vector of the accumulation type A (float or double).
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vfloat;
};
template <>
struct VectorOf<double> {
  using type = vdouble;
};
template <class A>
using vector_t = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <class A>
inline vector_t<A> broadcast(A value) {
  return value - vector_t<A>{};  // x - 0 == x bitwise, also for -0.0
}

// ---- scalars: storage type <-> accumulation type --------------------------------------------------------------------

inline float to_float(bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float to_float(float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity and NaN
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x0400) {
    bits = sign | ((magnitude << 13) + 0x38000000);
  } else {  // subnormal: magnitude * 2^-24
    const float f = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &f, 4);
    bits |= sign;
  }
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
#endif
}

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }

template <class T>
T from_float(accumulate_t<T> x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline double from_float<double>(double x) {
  return x;
}
template <>
inline bfloat16 from_float<bfloat16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline float16 from_float<float16>(float x) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#elif defined(__aarch64__)
  const __fp16 half = x;
  float16 result;
  std::memcpy(&result, &half, sizeof half);
  return result;
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(x);
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (magnitude < 6.103515625e-5f) {  // subnormal: nearbyint rounds ties to even
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 16777216.0f)))};
  }
  bits &= 0x7fffffff;
  bits += 0xfff + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13))};
#endif
}

// ---- whole vectors --------------------------------------------------------------------------------------------------

// Vectors at any address. Plain dereferences, not memcpy: arrays of vectors that are loaded and stored through
// these stay in registers.
typedef float vfloat_unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
typedef double vdouble_unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
typedef int32_t vint_unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat_unaligned*>(p); }
inline vdouble load(const double* p) { return *reinterpret_cast<const vdouble_unaligned*>(p); }
inline vint load(const int32_t* p) { return *reinterpret_cast<const vint_unaligned*>(p); }
inline vfloat load(const bfloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vfloat)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__) && !defined(WALT_EMULATE_AVX512)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vfloat)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#elif defined(__aarch64__)
  return (vfloat)vshlq_n_u32(vmovl_u16(vld1_u16(&p->bits)), 16);
#else
  vhalf half;
  std::memcpy(&half, p, sizeof half);
  return (vfloat)(__builtin_convertvector(half, vuint) << 16);
#endif
}
inline vfloat load(const float16* p) {
#if defined(__AVX512F__)
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__) && !defined(WALT_EMULATE_AVX512)
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (vfloat)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  vfloat v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

inline void store(float* p, vfloat v) { *reinterpret_cast<vfloat_unaligned*>(p) = v; }
inline void store(double* p, vdouble v) { *reinterpret_cast<vdouble_unaligned*>(p) = v; }
inline void store(int32_t* p, vint v) { *reinterpret_cast<vint_unaligned*>(p) = v; }
inline void store(bfloat16* p, vfloat v) {
  const vuint bits = (vuint)v;
  const vuint rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const vuint quiet_nan = bits >> 16 | 0x40;
  const vuint result = v != v ? quiet_nan : rounded;
#if defined(__AVX512F__)  // the compiler's own narrowing takes twice the instructions
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)result));
#elif defined(__AVX2__) && !defined(WALT_EMULATE_AVX512)
  const __m256i wide = (__m256i)result;
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
#else
  const vhalf half = __builtin_convertvector(result, vhalf);
  std::memcpy(p, &half, sizeof half);
#endif
}
inline void store(float16* p, vfloat v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && !defined(WALT_EMULATE_AVX512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_float<float16>(v[i]);
#endif
}

// Where a processor rounds to bfloat16 in one instruction, that also makes subnormal numbers zero, as dot_bf16 does.
template <class T>
inline void store_flushed(T* p, vector_t<accumulate_t<T>> v) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, sizeof half);
    return;
  }
#endif
  store(p, v);
}

// Stores a vector past the caches, aligned to its size; finish_streaming makes such stores visible to other threads.
template <class T>
inline void store_streaming(T* p, vector_t<accumulate_t<T>> v) {
#if defined(__AVX__)
  alignas(kVectorBytes) T rounded[kLanes<accumulate_t<T>>];
  store(rounded, v);
  const auto* from = reinterpret_cast<const __m128i*>(rounded);
  for (size_t i = 0; i < sizeof rounded / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + i, from[i]);
#else
  store(p, v);
#endif
}
inline void finish_streaming() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// The first `count` lanes; the rest read as zero, and are not written.
template <class T>
inline vector_t<accumulate_t<T>> load_partial(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return (vfloat)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
#endif
  T lanes[kLanes<accumulate_t<T>>] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * sizeof(T));
  return load(lanes);
}
template <class T>
inline void store_partial(T* p, vector_t<accumulate_t<T>> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
  }
#endif
  T lanes[kLanes<accumulate_t<T>>];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(count) * sizeof(T));
}

// b where either is NaN, which is what the processor's own instruction gives; the compiler writes two for it.
template <class V>
inline V maximum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vfloat>) return (vfloat)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && !defined(WALT_EMULATE_AVX512)
  if constexpr (std::is_same_v<V, vfloat>) return (vfloat)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}
template <class V>
inline V minimum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, vfloat>) return (vfloat)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && !defined(WALT_EMULATE_AVX512)
  if constexpr (std::is_same_v<V, vfloat>) return (vfloat)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

// Sums lanes pairwise, always in the same order.
template <class V>
inline auto reduce_add(V v) {
#if defined(__AVX512F__)  // in registers: the halves of an array would be written and read again four times
  if constexpr (std::is_same_v<V, vfloat>) {
    const __m256 eight = _mm512_castps512_ps256((__m512)v) + _mm512_extractf32x8_ps((__m512)v, 1);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return _mm_cvtss_f32(two + _mm_movehdup_ps(two));
  }
#endif
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  std::decay_t<decltype(v[0])> sums[lanes];
  std::memcpy(sums, &v, sizeof v);
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// ---- square transposes ----------------------------------------------------------------------------------------------

namespace detail {
// Lanes of a where `lane & distance` is zero, else b's, `distance` lanes lower; or the mirror image of it.
template <int distance, bool upper, class V, int... lane>
inline V exchange(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, (lane & distance ? lanes + lane : lane + distance)...)
               : __builtin_shufflevector(a, b, (lane & distance ? lanes + lane - distance : lane)...);
#else
  using Index = std::conditional_t<lanes == kLanes<float>, vint, vlong>;
  if (upper) return __builtin_shuffle(a, b, Index{(lane & distance ? lanes + lane : lane + distance)...});
  return __builtin_shuffle(a, b, Index{(lane & distance ? lanes + lane - distance : lane)...});
#endif
}

template <int distance, class V, size_t lanes>
inline void transpose_step(V (&rows)[lanes]) {
  constexpr auto sequence = std::make_integer_sequence<int, static_cast<int>(lanes)>{};
#pragma GCC unroll 16
  for (size_t i = 0; i < lanes; ++i) {
    if (i & distance) continue;
    const V a = rows[i], b = rows[i + distance];
    rows[i] = exchange<distance, false>(a, b, sequence);
    rows[i + distance] = exchange<distance, true>(a, b, sequence);
  }
  if constexpr (distance > 1) transpose_step<distance / 2>(rows);
}
}  // namespace detail

// Transposes a square of vectors: lane j of row i goes to lane i of row j.
template <class V, size_t lanes>
inline void transpose(V (&rows)[lanes]) {
  static_assert(lanes == sizeof(V) / sizeof(rows[0][0]), "as many rows as lanes");
  detail::transpose_step<static_cast<int>(lanes / 2)>(rows);
}

// exp for x <= 0 or small positive x, about 1 ulp: 2^n * p(r) with r = x - n ln 2 in [-ln2/2, ln2/2]; very negative x
// gives 0.
#if defined(__AVX512F__)
inline vfloat exp(vfloat x) {
  const vfloat clamped = (vfloat)_mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x);   // keeps NaN
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)(clamped * 1.44269504f), 8);  // to nearest, no exceptions
  vfloat r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vfloat p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
inline vfloat exp(vfloat x) {
  const vfloat low = broadcast(-87.336544f), high = broadcast(88.376262f);
  const vint is_low = x < low;
  const vfloat clamped = maximum(low, minimum(high, x));  // keeps NaN
  const vfloat shift = broadcast(12582912.0f);            // 1.5 * 2^23: adding it rounds to an integer
  const vfloat shifted = clamped * 1.44269504f + shift;
  const vfloat n = shifted - shift;
  vfloat r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vfloat p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vint exponent = ((vint)shifted - (vint)shift + 127) << 23;
  return (vfloat)((vint)(p * (vfloat)exponent) & ~is_low);
}
#endif
inline vdouble exp(vdouble x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

#if defined(__AVX512BF16__) || defined(WALT_EMULATE_AVX512)
#define WALT_HAS_BF16_DOT 1
#if defined(__AVX512BF16__)
// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1] over bfloat16 pairs packed into 32-bit lanes.
inline vfloat dot_bf16(vfloat acc, vint a, vint b) {
  return (vfloat)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
}

// Rounds to nearest, ties to even, and packs: lanes of `low` before those of `high`.
inline vint round_bf16(vfloat low, vfloat high) {
  return (vint)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// The same for one vector: lanes / 2 pairs.
inline vhalf half_bf16(vfloat v) { return (vhalf)(__m256i)_mm512_cvtneps_pbh((__m512)v); }
#else
inline vfloat dot_bf16(vfloat acc, vint a, vint b) {
  const vfloat odd = (vfloat)(a & -65536) * (vfloat)(b & -65536);
  return acc + odd + (vfloat)(a << 16) * (vfloat)(b << 16);
}
inline vhalf half_bf16(vfloat v) {
  vhalf half;
  store(reinterpret_cast<bfloat16*>(&half), v);
  return half;
}
inline vint round_bf16(vfloat low, vfloat high) {
  const vhalf halves[2] = {half_bf16(low), half_bf16(high)};
  vint both;
  std::memcpy(&both, halves, sizeof both);
  return both;
}
#endif

// Rounds and packs lane by lane: each 32-bit lane holds (low, high).
inline vint pair_bf16(vfloat low, vfloat high) {
  typedef uint16_t vshort __attribute__((vector_size(kVectorBytes)));
  const vshort v = (vshort)round_bf16(low, high);
  return (vint)__builtin_shufflevector(v, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10,
                                       26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#endif

}  // namespace walt::WALT_ISA
