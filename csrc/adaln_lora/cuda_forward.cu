// Residual + gate, LayerNorm, scale and shift on a GPU: one pass over memory.
//
// A block has as many groups of threads as fit, each of which has a token to itself and walks a run of them; a thread
// has the same few columns of all its tokens, whose modulation stays in its registers. The next token is on its way
// while this one is worked on. There are some runs more than run at once, so that no multiprocessor is left with much
// more than the others.
#include "adaln_lora/rows.cuh"
#include "adaln_lora/runs.h"

namespace walt::cuda::adaln_lora {
namespace {

// Which of the modulation tensors.
enum Row { kGate, kShift, kScale, kRows };

constexpr int kGroupThreads = 128;  // of a block with several groups
constexpr int kMaxThreads = 512;    // of one group
constexpr int kThreadsPerProcessor = 4096;
// Blocks of so many threads that run at once: float32 modulation takes twice the registers, and a row that does not fit
// in them some more; for sm_100 half of them are too few for any.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMostBlocks = 1;
#else
constexpr int kMostBlocks = 2;
#endif
template <class M, bool kFits>
constexpr int kLargestBlocks = sizeof(M) == 4 || !kFits ? 1 : kMostBlocks;

struct ForwardShape {
  Runs runs;
  int N, D;
  int threads, groups;  // of a group, of a block
  int tokens_per_row[kRows];
  float share, eps;                                 // share: 1 / D
  int64_t step_x, step_branch, step_x_new, step_h;  // from a token of a group to its next one
};

// kFits: a row fits in the registers of its group. Otherwise what lies beyond them is read and computed again.
template <bool kResidual, bool kNorm, class T, class M, int kVector, bool kFits>
struct Forward {
  static constexpr int kSlots = kColumns<kVector> / kVector;

  const AdalnForwardParams& p;
  const ForwardShape& shape;
  int group, thread;  // of the group

  // Where the rows of a token lie.
  struct Place {
    const T *x = nullptr, *branch = nullptr;
    T *x_new = nullptr, *h = nullptr;
  };
  struct Token {
    Packed<T, kVector> x[kSlots], branch[kSlots];
  };
  struct Modulation {
    Packed<M, kVector> gate[kSlots], shift[kSlots], scale[kSlots];
  };

  __device__ int column(int slot) const { return (slot * shape.threads + thread) * kVector; }

  __device__ Place place_of(int64_t b, int n) const {
    Place place;
    place.x = row_of<const T>(p.x, b, n);
    if constexpr (kResidual) place.branch = row_of<const T>(p.branch, b, n), place.x_new = row_of<T>(p.x_new, b, n);
    if constexpr (kNorm) place.h = row_of<T>(p.h, b, n);
    return place;
  }
  __device__ Place next_of(Place place) const {
    place.x += shape.step_x;
    if constexpr (kResidual) place.branch += shape.step_branch, place.x_new += shape.step_x_new;
    if constexpr (kNorm) place.h += shape.step_h;
    return place;
  }

  __device__ void read(Token& token, int slot, int d, const Place& place, bool last_use) const {
    token.x[slot].load(place.x + d, last_use);
    if constexpr (kResidual) token.branch[slot].load(place.branch + d, last_use);
  }
  __device__ void read(Token& token, const Place& place) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (column(slot) < shape.D) read(token, slot, column(slot), place, true);
    }
  }

  __device__ void read(Modulation& rows, int slot, int d, int64_t b, int n) const {
    const auto row = [&](Packed<M, kVector>& to, const TensorView& view, Row which) {
      to.load(row_of<const M>(view, b, n / shape.tokens_per_row[which]) + d, false);
    };
    if constexpr (kResidual) row(rows.gate[slot], p.gate, kGate);
    if constexpr (kNorm) row(rows.shift[slot], p.shift, kShift), row(rows.scale[slot], p.scale, kScale);
  }

  // x + gate * branch, unrounded
  __device__ static void combine(const Token& token, const Modulation& rows, int slot, float (&v)[kVector]) {
    token.x[slot].widen(v);
    if constexpr (kResidual) {
      float factor[kVector], term[kVector];
      rows.gate[slot].widen(factor);
      token.branch[slot].widen(term);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] += factor[i] * term[i];
    }
  }

  // f(first column, values, modulation, slot of it) for every vector of this thread.
  template <class F>
  __device__ void each(const float (&kept)[kSlots][kVector], const Modulation& rows, const Place& place,
                       const Stretch<kRows>& at, F&& f) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (column(slot) < shape.D) f(column(slot), kept[slot], rows, slot);
    }
    if constexpr (!kFits) {
      for (int d = column(kSlots); d < shape.D; d += shape.threads * kVector) {
        Token token;
        Modulation others;
        float v[kVector];
        read(token, 0, d, place, false);
        read(others, 0, d, at.b, at.n);
        combine(token, others, 0, v);
        f(d, v, others, 0);
      }
    }
  }

  __device__ void run(int64_t begin, int64_t end) const {
    __shared__ float scratch[2][1][kMaxThreads / kWarp];
    for (int64_t token = begin; token < end;) {
      const Stretch<kRows> at(shape.tokens_per_row, shape.N, token, end);
      Place place = place_of(at.b, at.n + group);
      Token next;
      if (group < at.count) read(next, place);
      Modulation rows;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (column(slot) < shape.D) read(rows, slot, column(slot), at.b, at.n);
      }
      for (int i = group; i - group < at.count; i += shape.groups) {
        const Token now = next;
        if (i + shape.groups < at.count) read(next, next_of(place));
        normalise(now, rows, place, at, i, scratch);
        place = next_of(place);
      }
      token += at.count;
    }
  }

  // Token i of a stretch. Groups without one (not `valid`) only keep step.
  __device__ void normalise(const Token& token, const Modulation& rows, const Place& place, const Stretch<kRows>& at,
                            int i, float (&scratch)[2][1][kMaxThreads / kWarp]) const {
    float kept[kSlots][kVector], sum[1] = {0};
    const bool valid = i < at.count;
    if (valid) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (column(slot) < shape.D) combine(token, rows, slot, kept[slot]);
      }
      each(kept, rows, place, at, [&](int d, const float (&v)[kVector], const Modulation&, int) {
        if constexpr (kResidual) store(place.x_new + d, v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[0] += v[i];
      });
    }
    if constexpr (!kNorm) return;
    group_sum(sum, scratch[0], shape.threads);
    const float mean = sum[0] * shape.share;
    sum[0] = 0;
    if (valid) {
      each(kept, rows, place, at, [&](int, const float (&v)[kVector], const Modulation&, int) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[0] += (v[i] - mean) * (v[i] - mean);
      });
    }
    group_sum(sum, scratch[1], shape.threads);
    if (!valid) return;
    const float rstd = 1.0f / sqrtf(sum[0] * shape.share + shape.eps);
    if (thread == 0) {
      static_cast<float*>(p.mean.data)[at.token + i] = mean;
      static_cast<float*>(p.rstd.data)[at.token + i] = rstd;
    }
    each(kept, rows, place, at, [&](int d, const float (&v)[kVector], const Modulation& row, int slot) {
      float factor[kVector], result[kVector];
      row.scale[slot].widen(factor);
      row.shift[slot].widen(result);
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] += (v[i] - mean) * rstd * (1 + factor[i]);
      store(place.h + d, result);
    });
  }
};

template <bool kResidual, bool kNorm, class T, class M, int kVector, bool kFits>
__global__ void __launch_bounds__(kMaxThreads, kLargestBlocks<M, kFits>)
    adaln_forward_kernel(const AdalnForwardParams p, const ForwardShape shape) {
  const int64_t run = blockIdx.x;
  const int place = static_cast<int>(threadIdx.x);
  const Forward<kResidual, kNorm, T, M, kVector, kFits> pass{p, shape, place / shape.threads, place % shape.threads};
  pass.run(shape.runs.begin(run), shape.runs.begin(run + 1));
}

template <bool kResidual, bool kNorm, class T, class M, int kVector, bool kFits>
void forward(const AdalnForwardParams& p, const CudaCall& call) {
  const int64_t B = p.x.shape[0], N = p.x.shape[1], D = p.x.shape[2];
  ForwardShape shape{};
  shape.N = static_cast<int>(N);
  shape.D = static_cast<int>(D);
  shape.threads = threads_of<kVector>(D, kMaxThreads);
  shape.groups = std::max(1, kGroupThreads / shape.threads);
  const int block = shape.threads * shape.groups;
  const int64_t blocks = static_cast<int64_t>(call.processors) * (kThreadsPerProcessor / block);
  shape.runs = {B * N, std::max<int64_t>(std::min(blocks, B * N / shape.groups), 1)};
  shape.tokens_per_row[kGate] = tokens_per_row(p.gate, N);
  shape.tokens_per_row[kShift] = tokens_per_row(p.shift, N);
  shape.tokens_per_row[kScale] = tokens_per_row(p.scale, N);
  shape.share = 1.0f / static_cast<float>(D);
  shape.eps = static_cast<float>(p.eps);
  shape.step_x = shape.groups * p.x.stride[1];
  shape.step_branch = shape.groups * p.branch.stride[1];
  shape.step_x_new = shape.groups * p.x_new.stride[1];
  shape.step_h = shape.groups * p.h.stride[1];
  launch("adaln_forward", adaln_forward_kernel<kResidual, kNorm, T, M, kVector, kFits>,
         dim3(grid_size(shape.runs.count)), dim3(static_cast<unsigned>(block)), call, p, shape);
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
      constexpr int kVector = kVectorBytes / sizeof(T);
      if (vectors && p.x.shape[2] <= kMaxThreads * kColumns<kVector>) {
        forward<kResidual, kNorm, T, M, kVector, true>(p, call);
      } else if (vectors) {
        forward<kResidual, kNorm, T, M, kVector, false>(p, call);
      } else {
        forward<kResidual, kNorm, T, M, 1, false>(p, call);
      }
    });
  });
}

}  // namespace walt::cuda::adaln_lora
