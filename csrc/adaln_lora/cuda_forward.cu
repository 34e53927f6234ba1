// Residual + gate, LayerNorm, scale and shift on a GPU: one pass over memory. A row of tokens belongs to one warp while
// its unrounded x_new fits that warp's registers, to a block of more warps beyond.
#include "adaln_lora/rows.cuh"

namespace walt::cuda::adaln_lora {
namespace {

constexpr int kRowsPerBlock = 4;  // of one warp each
constexpr int kMaxWarps = 8;      // for one row

// Elements that a thread keeps: 1280 of a row per warp. Without vectors fewer, for shorter code.
template <int kVector>
constexpr int kKept = kVector > 1 ? 40 : 8;

struct ForwardShape {
  int N, D, gate_tokens, shift_tokens, scale_tokens;
  bool row_per_warp;
};

template <bool kResidual, bool kNorm, class T, class M, int kVector>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    adaln_forward_kernel(const AdalnForwardParams p, const ForwardShape shape) {
  constexpr int kSlots = kKept<kVector> / kVector;
  __shared__ float scratch[2][1][kMaxWarps];
  const int D = shape.D;
  const int lane = static_cast<int>(shape.row_per_warp ? threadIdx.x % kWarp : threadIdx.x);
  const int threads = static_cast<int>(shape.row_per_warp ? kWarp : blockDim.x);
  const int rows = static_cast<int>(blockDim.x) / threads;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * rows + static_cast<int>(threadIdx.x) / threads;
  if (n >= shape.N) return;  // only where every warp has a row to itself: no barrier waits for it

  for (int64_t b = blockIdx.y; b < p.x.shape[0]; b += gridDim.y) {
    const T* const x = row_of<const T>(p.x, b, n);
    const T* const branch = kResidual ? row_of<const T>(p.branch, b, n) : nullptr;
    const M* const gate = kResidual ? row_of<const M>(p.gate, b, static_cast<int>(n) / shape.gate_tokens) : nullptr;
    const M* const shift = kNorm ? row_of<const M>(p.shift, b, static_cast<int>(n) / shape.shift_tokens) : nullptr;
    const M* const scale = kNorm ? row_of<const M>(p.scale, b, static_cast<int>(n) / shape.scale_tokens) : nullptr;
    T* const x_new = kResidual ? row_of<T>(p.x_new, b, n) : nullptr;
    T* const h = kNorm ? row_of<T>(p.h, b, n) : nullptr;

    // x + gate * branch, unrounded
    const auto combine = [&](const Packed<T, kVector>& x_packed, const Packed<T, kVector>& branch_packed, int d,
                             float (&v)[kVector]) {
      x_packed.widen(v);
      if constexpr (kResidual) {
        float factor[kVector], term[kVector];
        load(gate + d, factor);
        branch_packed.widen(term);
#pragma unroll
        for (int i = 0; i < kVector; ++i) v[i] += factor[i] * term[i];
      }
    };
    // f(first column, values) for every vector of this thread. What lies beyond the registers is computed again.
    float kept[kSlots][kVector];
    const auto each = [&](auto&& f) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int d = (slot * threads + lane) * kVector;
        if (d < D) f(d, kept[slot]);
      }
      for (int d = (kSlots * threads + lane) * kVector; d < D; d += threads * kVector) {
        Packed<T, kVector> x_packed, branch_packed;
        x_packed.load(x + d, false);
        if constexpr (kResidual) branch_packed.load(branch + d, false);
        float v[kVector];
        combine(x_packed, branch_packed, d, v);
        f(d, v);
      }
    };

    // All loads are under way before the first value is needed.
    Packed<T, kVector> x_packed[kSlots], branch_packed[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int d = (slot * threads + lane) * kVector;
      if (d >= D) continue;
      x_packed[slot].load(x + d, true);
      if constexpr (kResidual) branch_packed[slot].load(branch + d, true);
    }
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int d = (slot * threads + lane) * kVector;
      if (d < D) combine(x_packed[slot], branch_packed[slot], d, kept[slot]);
    }

    float sum[1] = {0};
    each([&](int d, const float (&v)[kVector]) {
      if constexpr (kResidual) store(x_new + d, v);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[0] += v[i];
    });
    if constexpr (!kNorm) continue;
    const auto total = [&](float (&buffer)[1][kMaxWarps]) {
      if (shape.row_per_warp) {
        sum[0] = warp_sum(sum[0]);
      } else {
        group_sum(sum, buffer, threads);
      }
      return sum[0];
    };
    const float mean = total(scratch[0]) / static_cast<float>(D);
    sum[0] = 0;
    each([&](int, const float (&v)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[0] += (v[i] - mean) * (v[i] - mean);
    });
    const float rstd = 1.0f / sqrtf(total(scratch[1]) / static_cast<float>(D) + static_cast<float>(p.eps));
    if (lane == 0) {
      static_cast<float*>(p.mean.data)[b * shape.N + n] = mean;
      static_cast<float*>(p.rstd.data)[b * shape.N + n] = rstd;
    }
    each([&](int d, const float (&v)[kVector]) {
      float factor[kVector], offset[kVector], result[kVector];
      load(scale + d, factor);
      load(shift + d, offset);
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] = (v[i] - mean) * rstd * (1 + factor[i]) + offset[i];
      store(h + d, result);
    });
  }
}

template <bool kResidual, bool kNorm, class T, class M, int kVector>
void forward(const AdalnForwardParams& p, const CudaCall& call) {
  const int64_t B = p.x.shape[0], N = p.x.shape[1], D = p.x.shape[2];
  const int64_t warps = divide_up(D, static_cast<int64_t>(kKept<kVector> * kWarp));
  ForwardShape shape{};
  shape.N = static_cast<int>(N);
  shape.D = static_cast<int>(D);
  shape.gate_tokens = tokens_per_row(p.gate, N);
  shape.shift_tokens = tokens_per_row(p.shift, N);
  shape.scale_tokens = tokens_per_row(p.scale, N);
  shape.row_per_warp = warps == 1;
  const int64_t rows = shape.row_per_warp ? kRowsPerBlock : 1;
  const int64_t threads = kWarp * (shape.row_per_warp ? rows : std::min<int64_t>(warps, kMaxWarps));
  const dim3 grid(grid_size(divide_up(N, rows)), static_cast<unsigned>(std::min<int64_t>(B, 65535)));
  launch("adaln_forward", adaln_forward_kernel<kResidual, kNorm, T, M, kVector>, grid,
         dim3(static_cast<unsigned>(threads)), call, p, shape);
}

}  // namespace

void adaln_forward(const AdalnForwardParams& p, const CudaCall& call) {
  check(p);
  require_int(p.x.shape[1], "at most 2^30 tokens in a sample");
  require_int(p.x.shape[2], "at most 2^30 elements in a row");
  if (p.x.numel() == 0) return;
  const bool residual = p.branch.defined(), norm = p.h.defined();
  bool vectors = true;
  for (const TensorView* view : {&p.x, &p.branch, &p.gate, &p.shift, &p.scale, &p.x_new, &p.h}) {
    vectors = vectors && allows_vectors(*view);
  }
  dispatch_types(p.x.dtype, residual ? p.gate.dtype : p.scale.dtype, [&](auto x_type, auto rows_type) {
    using T = typename decltype(x_type)::type;
    using M = typename decltype(rows_type)::type;
    dispatch_parts(residual, norm, [&](auto has_branch, auto has_norm) {
      constexpr bool kResidual = decltype(has_branch)::value, kNorm = decltype(has_norm)::value;
      if (vectors) {
        forward<kResidual, kNorm, T, M, kVectorBytes / sizeof(T)>(p, call);
      } else {
        forward<kResidual, kNorm, T, M, 1>(p, call);
      }
    });
  });
}

}  // namespace walt::cuda::adaln_lora
