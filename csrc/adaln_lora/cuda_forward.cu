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
// Blocks of so many threads that run at once: float32 modulation takes twice the registers.
template <class M>
constexpr int kLargestBlocks = sizeof(M) == 4 ? 1 : 2;

struct ForwardShape {
  Runs runs;
  int N, D;
  int threads, groups;  // of a group, of a block
  int tokens_per_row[kRows];
};

template <bool kResidual, bool kNorm, class T, class M, int kVector>
struct Forward {
  static constexpr int kSlots = kColumns<kVector> / kVector;

  const AdalnForwardParams& p;
  const ForwardShape& shape;
  int group, thread;  // of the group

  struct Token {
    Packed<T, kVector> x[kSlots], branch[kSlots];
  };
  struct Modulation {
    Packed<M, kVector> gate[kSlots], shift[kSlots], scale[kSlots];
  };

  __device__ int column(int slot) const { return (slot * shape.threads + thread) * kVector; }

  __device__ void read(Token& token, int slot, int d, int64_t b, int n, bool last_use) const {
    token.x[slot].load(row_of<const T>(p.x, b, n) + d, last_use);
    if constexpr (kResidual) token.branch[slot].load(row_of<const T>(p.branch, b, n) + d, last_use);
  }
  __device__ void read(Token& token, int64_t b, int n) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (column(slot) < shape.D) read(token, slot, column(slot), b, n, true);
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

  // f(first column, values, modulation, slot of it) for every vector of this thread. What lies beyond the registers is
  // computed again.
  template <class F>
  __device__ void each(const float (&kept)[kSlots][kVector], const Modulation& rows, int64_t b, int n, F&& f) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (column(slot) < shape.D) f(column(slot), kept[slot], rows, slot);
    }
    for (int d = column(kSlots); d < shape.D; d += shape.threads * kVector) {
      Token token;
      Modulation others;
      float v[kVector];
      read(token, 0, d, b, n, false);
      read(others, 0, d, b, n);
      combine(token, others, 0, v);
      f(d, v, others, 0);
    }
  }

  __device__ void run(int64_t begin, int64_t end) const {
    __shared__ float scratch[2][1][kMaxThreads / kWarp];
    for (int64_t token = begin; token < end;) {
      const Stretch<kRows> at(shape.tokens_per_row, shape.N, token, end);
      token += at.count;
      Token next;
      if (group < at.count) read(next, at.b, at.n + group);
      Modulation rows;
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (column(slot) < shape.D) read(rows, slot, column(slot), at.b, at.n);
      }
      for (int i = group; i - group < at.count; i += shape.groups) {
        const Token now = next;
        if (i + shape.groups < at.count) read(next, at.b, at.n + i + shape.groups);
        normalise(now, rows, at.b, at.n + i, i < at.count, scratch);
      }
    }
  }

  // One token. Groups without one (not `valid`) only keep step.
  __device__ void normalise(const Token& token, const Modulation& rows, int64_t b, int n, bool valid,
                            float (&scratch)[2][1][kMaxThreads / kWarp]) const {
    float kept[kSlots][kVector], sum[1] = {0};
    if (valid) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        if (column(slot) < shape.D) combine(token, rows, slot, kept[slot]);
      }
      each(kept, rows, b, n, [&](int d, const float (&v)[kVector], const Modulation&, int) {
        if constexpr (kResidual) store(row_of<T>(p.x_new, b, n) + d, v);
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[0] += v[i];
      });
    }
    if constexpr (!kNorm) return;
    group_sum(sum, scratch[0], shape.threads);
    const float mean = sum[0] / static_cast<float>(shape.D);
    sum[0] = 0;
    if (valid) {
      each(kept, rows, b, n, [&](int, const float (&v)[kVector], const Modulation&, int) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[0] += (v[i] - mean) * (v[i] - mean);
      });
    }
    group_sum(sum, scratch[1], shape.threads);
    if (!valid) return;
    const float rstd = 1.0f / sqrtf(sum[0] / static_cast<float>(shape.D) + static_cast<float>(p.eps));
    if (thread == 0) {
      static_cast<float*>(p.mean.data)[b * shape.N + n] = mean;
      static_cast<float*>(p.rstd.data)[b * shape.N + n] = rstd;
    }
    each(kept, rows, b, n, [&](int d, const float (&v)[kVector], const Modulation& row, int slot) {
      float factor[kVector], result[kVector];
      row.scale[slot].widen(factor);
      row.shift[slot].widen(result);
#pragma unroll
      for (int i = 0; i < kVector; ++i) result[i] += (v[i] - mean) * rstd * (1 + factor[i]);
      store(row_of<T>(p.h, b, n) + d, result);
    });
  }
};

template <bool kResidual, bool kNorm, class T, class M, int kVector>
__global__ void __launch_bounds__(kMaxThreads, kLargestBlocks<M>)
    adaln_forward_kernel(const AdalnForwardParams p, const ForwardShape shape) {
  const int64_t run = blockIdx.x;
  const int place = static_cast<int>(threadIdx.x);
  const Forward<kResidual, kNorm, T, M, kVector> pass{p, shape, place / shape.threads, place % shape.threads};
  pass.run(shape.runs.begin(run), shape.runs.begin(run + 1));
}

template <bool kResidual, bool kNorm, class T, class M, int kVector>
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
  launch("adaln_forward", adaln_forward_kernel<kResidual, kNorm, T, M, kVector>, dim3(grid_size(shape.runs.count)),
         dim3(static_cast<unsigned>(block)), call, p, shape);
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
