// Gradients of residual + gate + LayerNorm + scale and shift on a GPU: one pass over the tokens in runs, one run per
// block (runs.h), and a second kernel that adds up what runs share. The number of blocks depends on the machine, not on
// the number of tokens; nothing is atomic.
//
// A block has as many groups of threads as fit, each of which has a token to itself; a thread has the same few columns
// of all its tokens, whose modulation and sums stay in its registers. Fewer and larger blocks leave fewer sums to add
// up.
#include "adaln_lora/rows.cuh"
#include "adaln_lora/runs.h"

namespace walt::cuda::adaln_lora {
namespace {

// Of a multiprocessor: as many threads as its registers serve.
template <class T>
constexpr int kMaxThreads = sizeof(T) == 4 ? 384 : 512;
constexpr int kMaxWarps = 512 / kWarp;
constexpr int kGroupThreads = 256;  // of a block with several groups
constexpr int kMinTokens = 4;       // of a group
constexpr int kFinishColumns = 4, kFinishSplit = 8;

// Which of the three sums over tokens.
enum Sum { kGate, kShift, kScale, kSums };

struct BackwardShape {
  Runs runs;
  int N, D, width;      // width: D rounded up to whole vectors, the length of a partial row
  int threads, groups;  // of a group, of a block
  int chunks;           // of columns: more than one where a row is longer than a group holds
  int tokens_per_row[kSums];
  float* partial;  // [kSums, 2 * runs, width]
  float* totals;   // [tokens, 2] where there are several chunks: sum of g, sum of g * xhat

  __host__ __device__ float* partial_rows(int sum) const {
    return partial + sum * 2 * runs.count * static_cast<int64_t>(width);
  }
};

template <bool kResidual, bool kNorm, class T, class M, int kVector>
struct Backward {
  static constexpr int kSlots = kColumns<kVector> / kVector;
  using Values = float[kSlots][kVector];

  const AdalnBackwardParams& p;
  const BackwardShape& shape;
  int64_t begin, end;  // the run
  int group, thread;   // of the group
  int column = 0;      // of this thread's first vector in the current chunk

  // What is read of one token.
  struct Token {
    Packed<T, kVector> grad_x_new[kSlots], grad_h[kSlots], x[kSlots], branch[kSlots];
    float mean, rstd;
  };

  // Modulation of the current rows, and the sums over the tokens under them so far.
  struct State {
    Values gate, gain, sums[kSums];  // gain: 1 + scale
  };

  // f(slot, first column) for every vector of this thread that lies inside the row.
  template <class F>
  __device__ void each(F&& f) const {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int d = column + slot * shape.threads * kVector;
      if (d < shape.D) f(slot, d);
    }
  }

  __device__ void set_chunk(int chunk) { column = (chunk * kSlots * shape.threads + thread) * kVector; }

  __device__ void read(Token& token, const Stretch<kSums>& at, int i) const {
    const bool has_grad_x_new = !kNorm || (kResidual && p.grad_x_new.data != nullptr);
    const int64_t n = at.n + i;
    each([&](int slot, int d) {
      if (has_grad_x_new) token.grad_x_new[slot].load(row_of<const T>(p.grad_x_new, at.b, n) + d, false);
      if constexpr (kResidual) token.branch[slot].load(row_of<const T>(p.branch, at.b, n) + d, false);
      if constexpr (kNorm) {
        token.grad_h[slot].load(row_of<const T>(p.grad_h, at.b, n) + d, false);
        token.x[slot].load(row_of<const T>(p.x, at.b, n) + d, false);
      }
    });
    if constexpr (kNorm) {
      token.mean = static_cast<const float*>(p.mean.data)[at.token + i];
      token.rstd = static_cast<const float*>(p.rstd.data)[at.token + i];
    }
  }

  __device__ void read_rows(State& state, const Stretch<kSums>& at) const {
    each([&](int slot, int d) {
      if constexpr (kResidual) {
        load(row_of<const M>(p.gate, at.b, at.n / shape.tokens_per_row[kGate]) + d, state.gate[slot]);
      }
      if constexpr (kNorm) {
        load(row_of<const M>(p.scale, at.b, at.n / shape.tokens_per_row[kScale]) + d, state.gain[slot]);
#pragma unroll
        for (int i = 0; i < kVector; ++i) state.gain[slot][i] += 1;
      }
    });
  }

  // xhat, grad_h and g = grad_h * (1 + scale) of one vector.
  __device__ void normal(const Token& token, const State& state, int slot, float (&xhat)[kVector],
                         float (&grad_h)[kVector], float (&g)[kVector]) const {
    token.x[slot].widen(xhat);
    token.grad_h[slot].widen(grad_h);
    if constexpr (kResidual) {  // the unrounded x_new once more, as in the forward pass
      float branch[kVector];
      token.branch[slot].widen(branch);
#pragma unroll
      for (int i = 0; i < kVector; ++i) xhat[i] += state.gate[slot][i] * branch[i];
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      xhat[i] = (xhat[i] - token.mean) * token.rstd;
      g[i] = __fmul_rn(grad_h[i], state.gain[slot][i]);  // rounded: where all are the same, less their mean it is 0
    }
  }

  // At the end of a row, or of the run: the sums over the row, or over as much of it as this run has.
  __device__ void write_sums(int sum, const TensorView& out, const Stretch<kSums>& last, Values& values) const {
    const int64_t tokens = shape.tokens_per_row[sum], after = last.token + last.count, row = last.token / tokens;
    if (after < end && after % tokens != 0) return;
    add_groups(values);
    const Piece piece = piece_of(row * tokens, (row + 1) * tokens, begin, end);
    each([&](int slot, int d) {
      if (group == 0 && piece == Piece::full) {
        store(row_of<M>(out, last.b, last.n / static_cast<int>(tokens)) + d, values[slot]);
      } else if (group == 0) {
        store(shape.partial_rows(sum) + partial_row(blockIdx.x, piece) * shape.width + d, values[slot]);
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) values[slot][i] = 0;
    });
  }

  // The first group gets the sums over all of them.
  __device__ void add_groups(Values& values) const {
    __shared__ float room[kColumns<kVector>][kGroupThreads];
    if (shape.groups == 1) return;
#pragma unroll
    for (int i = 0; i < kColumns<kVector>; ++i) room[i][threadIdx.x] = values[i / kVector][i % kVector];
    __syncthreads();
    for (int other = 1; other < shape.groups; ++other) {
#pragma unroll
      for (int i = 0; i < kColumns<kVector>; ++i) {
        if (group == 0) values[i / kVector][i % kVector] += room[i][other * shape.threads + thread];
      }
    }
    __syncthreads();
  }

  // Sums over whole rows that are longer than a group holds at once.
  __device__ void total_rows() {
    __shared__ float scratch[2][2][kMaxWarps];
    int turn = 0;
    for (int64_t token = begin; token < end; ++token, turn ^= 1) {
      const Stretch<kSums> at(shape.tokens_per_row, shape.N, token, token + 1);
      float sums[2] = {0, 0};
      for (int chunk = 0; chunk < shape.chunks; ++chunk) {
        set_chunk(chunk);
        Token values;
        State state = {};
        read(values, at, 0);
        read_rows(state, at);
        each([&](int slot, int) {
          float xhat[kVector], grad_h[kVector], g[kVector];
          normal(values, state, slot, xhat, grad_h, g);
#pragma unroll
          for (int i = 0; i < kVector; ++i) sums[0] += g[i], sums[1] += g[i] * xhat[i];
        });
      }
      group_sum(sums, scratch[turn], shape.threads);
      if (thread == 0) shape.totals[2 * token] = sums[0], shape.totals[2 * token + 1] = sums[1];
    }
    __syncthreads();
  }

  // grad_x = grad_x_new + rstd * (g - mean(g) - xhat * mean(g * xhat)) of the columns of one chunk.
  __device__ void run_chunk() {
    State state = {};
    for (int64_t token = begin; token < end;) {
      const Stretch<kSums> stretch(shape.tokens_per_row, shape.N, token, end);
      read_rows(state, stretch);
      run_stretch(stretch, state);
      if constexpr (kResidual) write_sums(kGate, p.grad_gate, stretch, state.sums[kGate]);
      if constexpr (kNorm) write_sums(kShift, p.grad_shift, stretch, state.sums[kShift]);
      if constexpr (kNorm) write_sums(kScale, p.grad_scale, stretch, state.sums[kScale]);
      token += stretch.count;
    }
  }

  __device__ void run_stretch(const Stretch<kSums>& at, State& state) const {
    __shared__ float scratch[2][2][kMaxWarps];
    const float share = 1.0f / static_cast<float>(shape.D);
    Token next;
    if (group < at.count) read(next, at, group);
    int turn = 0;
    for (int first = 0; first < at.count; first += shape.groups, turn ^= 1) {
      const int i = first + group;  // the last tokens may leave groups without one, which only keep step
      const Token token = next;
      if (i + shape.groups < at.count) read(next, at, i + shape.groups);  // under way while this one is worked on

      Values xhat, g;
      float sums[2] = {0, 0};
      if constexpr (kNorm) {
        if (i < at.count) {
          each([&](int slot, int) {
            float grad_h[kVector];
            normal(token, state, slot, xhat[slot], grad_h, g[slot]);
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
              state.sums[kShift][slot][j] += grad_h[j];
              state.sums[kScale][slot][j] += grad_h[j] * xhat[slot][j];
              sums[0] += g[slot][j];
              sums[1] += g[slot][j] * xhat[slot][j];
            }
          });
        }
        if (shape.chunks == 1) {
          group_sum(sums, scratch[turn], shape.threads);
        } else {
          sums[0] = shape.totals[2 * (at.token + i)], sums[1] = shape.totals[2 * (at.token + i) + 1];
        }
      }
      if (i >= at.count) continue;
      const float g_mean = sums[0] * share, gx_mean = sums[1] * share;
      each([&](int slot, int d) {
        float grad[kVector];
        token.grad_x_new[slot].widen(grad);  // zeros where there is none
        if constexpr (kNorm) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            grad[j] += (g[slot][j] - g_mean - xhat[slot][j] * gx_mean) * token.rstd;
          }
          stream(row_of<T>(p.grad_x, at.b, at.n + i) + d, grad);
        }
        if constexpr (kResidual) {
          float branch[kVector], grad_branch[kVector];
          token.branch[slot].widen(branch);
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            grad_branch[j] = grad[j] * state.gate[slot][j];
            state.sums[kGate][slot][j] += grad[j] * branch[j];
          }
          stream(row_of<T>(p.grad_branch, at.b, at.n + i) + d, grad_branch);
        }
      });
    }
  }
};

template <bool kResidual, bool kNorm, class T, class M, int kVector>
__global__ void __launch_bounds__(kMaxThreads<T>, 1)
    adaln_backward_kernel(const AdalnBackwardParams p, const BackwardShape shape) {
  const int64_t run = blockIdx.x;
  const int place = static_cast<int>(threadIdx.x);
  Backward<kResidual, kNorm, T, M, kVector> pass{
      p, shape, shape.runs.begin(run), shape.runs.begin(run + 1), place / shape.threads, place % shape.threads};
  if (kNorm && shape.chunks > 1) pass.total_rows();
  for (int chunk = 0; chunk < shape.chunks; ++chunk) {
    pass.set_chunk(chunk);
    pass.run_chunk();
  }
}

// Adds up the partial rows of modulation rows that several runs share: [columns, candidates, sums] blocks.
template <class M>
__global__ void __launch_bounds__(kFinishSplit* kWarp)
    adaln_finish_kernel(const AdalnBackwardParams p, const BackwardShape shape) {
  __shared__ float scratch[kFinishSplit][kWarp][kFinishColumns];
  const int sum = static_cast<int>(blockIdx.z), lane = static_cast<int>(threadIdx.x) % kWarp;
  const int split = static_cast<int>(threadIdx.x) / kWarp;
  const TensorView& out = sum == kGate ? p.grad_gate : sum == kShift ? p.grad_shift : p.grad_scale;
  if (out.rank == 0) return;
  const int64_t F = out.shape[1];
  const int (&per_row)[kSums] =
      shape.tokens_per_row;  // indexed by constants: an array that is searched leaves registers
  const int tokens = sum == kGate ? per_row[kGate] : sum == kShift ? per_row[kShift] : per_row[kScale];
  const SharedRows shared{shape.runs, out.shape[0] * F, tokens};
  int64_t row, first, last;
  if (blockIdx.y >= shared.candidates() || !shared.find(blockIdx.y, row, first, last)) return;

  const int d = (static_cast<int>(blockIdx.x) * kWarp + lane) * kFinishColumns;
  float total[kFinishColumns] = {};
  if (d < shape.width) {
#pragma unroll 4
    for (int64_t run = first + split; run <= last; run += kFinishSplit) {
      float values[kFinishColumns];
      const int64_t index = partial_row(run, run == first ? Piece::tail : Piece::head);
      load(shape.partial_rows(sum) + index * shape.width + d, values);
#pragma unroll
      for (int i = 0; i < kFinishColumns; ++i) total[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kFinishColumns; ++i) scratch[split][lane][i] = total[i];
  __syncthreads();
  if (split > 0) return;
  for (int other = 1; other < kFinishSplit; ++other) {
#pragma unroll
    for (int i = 0; i < kFinishColumns; ++i) total[i] += scratch[other][lane][i];
  }
  M* const target = row_of<M>(out, row / F, row % F);
#pragma unroll
  for (int i = 0; i < kFinishColumns; ++i) {
    if (d + i < shape.D) store(target + d + i, total[i]);
  }
}

// Gradients of modulation rows that no token is under.
template <class M>
__global__ void adaln_zero_kernel(const AdalnBackwardParams p) {
  for (const TensorView* out : {&p.grad_gate, &p.grad_shift, &p.grad_scale}) {
    if (out->rank == 0 || blockIdx.y >= out->shape[1]) continue;
    for (int64_t d = threadIdx.x; d < out->shape[2]; d += blockDim.x) {
      store(row_of<M>(*out, blockIdx.x, blockIdx.y) + d, 0.0f);
    }
  }
}

struct Plan {
  BackwardShape shape;
  bool vectors;
  int64_t bytes;
};

Plan make_plan(const AdalnBackwardParams& p, int processors) {
  const TensorView& tokens = p.grad_h.defined() ? p.grad_h : p.grad_x_new;
  const int64_t B = tokens.shape[0], N = tokens.shape[1], D = tokens.shape[2];
  require_int(N, "at most 2^30 tokens in a sample");
  require_int(D, "at most 2^30 elements in a row");
  Plan plan{};
  BackwardShape& shape = plan.shape;
  plan.vectors = true;
  for (const TensorView* view : {&p.grad_x_new, &p.grad_h, &p.x, &p.branch, &p.gate, &p.scale, &p.grad_x,
                                 &p.grad_branch, &p.grad_gate, &p.grad_shift, &p.grad_scale}) {
    plan.vectors = plan.vectors && allows_vectors(*view);
  }
  const int columns = plan.vectors ? kColumns<kVectorBytes> : kColumns<1>;
  const int most = tokens.dtype == DType::float32 ? kMaxThreads<float> : kMaxThreads<bfloat16>;
  shape.threads = plan.vectors ? threads_of<kVectorBytes>(D, most) : threads_of<1>(D, most);
  shape.groups = std::max(1, kGroupThreads / shape.threads);
  const int64_t blocks = static_cast<int64_t>(processors) * (most / (shape.threads * shape.groups));  // all run at once
  shape.runs = {B * N, std::max<int64_t>(std::min(blocks, B * N / (kMinTokens * shape.groups)), 1)};
  shape.N = static_cast<int>(N);
  shape.D = static_cast<int>(D);
  shape.width = divide_up(shape.D, kFinishColumns) * kFinishColumns;
  shape.chunks = divide_up(shape.D, columns * shape.threads);
  shape.tokens_per_row[kGate] = tokens_per_row(p.grad_gate, N);
  shape.tokens_per_row[kShift] = tokens_per_row(p.grad_shift, N);
  shape.tokens_per_row[kScale] = tokens_per_row(p.grad_scale, N);
  const int64_t totals = p.grad_h.defined() && shape.chunks > 1 ? 2 * B * N : 0;
  plan.bytes = (kSums * 2 * shape.runs.count * shape.width + totals) * static_cast<int64_t>(sizeof(float));
  return plan;
}

template <class M>
void finish(const AdalnBackwardParams& p, const BackwardShape& shape, const CudaCall& call) {
  int64_t candidates = 1;
  for (const TensorView* out : {&p.grad_gate, &p.grad_shift, &p.grad_scale}) {
    if (!out->defined()) continue;
    candidates = std::max(candidates, std::min(out->shape[0] * out->shape[1], shape.runs.count));
  }
  const dim3 grid(grid_size(divide_up(shape.width, kWarp * kFinishColumns)), static_cast<unsigned>(candidates), kSums);
  launch("adaln_backward", adaln_finish_kernel<M>, grid, dim3(kFinishSplit * kWarp), call, p, shape);
}

}  // namespace

int64_t adaln_backward_workspace(const AdalnBackwardParams& p, int processors) {
  check(p);
  return make_plan(p, processors).bytes;
}

void adaln_backward(const AdalnBackwardParams& p, const CudaCall& call) {
  check(p);
  const bool residual = p.branch.defined(), norm = p.grad_h.defined();
  const TensorView& tokens = norm ? p.grad_h : p.grad_x_new;
  Plan plan = make_plan(p, call.processors);
  require(call.workspace_bytes >= plan.bytes, "the workspace is too small");
  plan.shape.partial = static_cast<float*>(call.workspace);
  plan.shape.totals = plan.shape.partial_rows(kSums);
  dispatch_types(tokens.dtype, residual ? p.gate.dtype : p.scale.dtype, [&](auto x_type, auto rows_type) {
    using T = typename decltype(x_type)::type;
    using M = typename decltype(rows_type)::type;
    if (tokens.numel() == 0) {
      int64_t rows = 0;
      for (const TensorView* out : {&p.grad_gate, &p.grad_shift, &p.grad_scale}) {
        if (out->defined()) rows = std::max(rows, out->shape[1]);
      }
      if (tokens.shape[0] == 0 || rows == 0) return;
      require(rows <= 65535, "at most 65535 modulation rows without tokens");
      const dim3 grid(grid_size(tokens.shape[0]), static_cast<unsigned>(rows));
      launch("adaln_backward", adaln_zero_kernel<M>, grid, dim3(kWarp), call, p);
      return;
    }
    const dim3 grid(grid_size(plan.shape.runs.count)),
        block(static_cast<unsigned>(plan.shape.threads * plan.shape.groups));
    const BackwardShape& shape = plan.shape;
    dispatch_parts(residual, norm, [&](auto has_branch, auto has_norm) {
      constexpr bool kResidual = decltype(has_branch)::value, kNorm = decltype(has_norm)::value;
      const auto kernel = plan.vectors ? adaln_backward_kernel<kResidual, kNorm, T, M, kVectorBytes / sizeof(T)>
                                       : adaln_backward_kernel<kResidual, kNorm, T, M, 1>;
      launch("adaln_backward", kernel, grid, block, call, p, shape);
    });
    finish<M>(p, shape, call);
  });
}

}  // namespace walt::cuda::adaln_lora
