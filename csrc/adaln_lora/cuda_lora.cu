// Low-rank modulation of all layers on a GPU, forward in one launch and backward in two, whatever the number of layers:
// hidden = down cond, out = base + up hidden. Few samples meet many weights, so the floor is one pass over the weights.
#include "adaln_lora/rows.cuh"

namespace walt::cuda::adaln_lora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kThreadColumns = 4;  // of K
constexpr int kBlockColumns = kThreads * kThreadColumns;
constexpr int kSamples = 8;        // that share one read of `up` going forward
constexpr int kForwardRanks = 32;  // of which a block keeps hidden
constexpr int kRanks = 8;          // that go through registers together
constexpr int kTile = 64;          // coefficients that a block of the second backward launch keeps

struct LoraShape {
  int64_t layers, B, D, K, rank;
  bool vectors_d, vectors_r;  // whether rows of length D and r allow whole vectors
  float* partial;             // backward: gradient of hidden, [layers, chunks of K, B, r]
  int64_t chunks;
};

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// What a warp's lanes add up to is a dot product of two rows.
template <int kVector, class T>
__device__ inline float lane_dot(const T* a, const T* b, int64_t length) {
  float sum = 0;
  for (int64_t d = threadIdx.x % kWarp * kVector; d < length; d += kWarp * kVector) {
    float u[kVector], v[kVector];
    load(a + d, u);
    load(b + d, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += u[i] * v[i];
  }
  return sum;
}

// kRanks neighbouring elements of a row of `up` or of its gradient, of which `count` exist.
template <class T>
__device__ inline void load_ranks(const T* p, int count, bool vectors, float (&v)[kRanks]) {
  if (vectors) return load(p, v);
#pragma unroll
  for (int j = 0; j < kRanks; ++j) v[j] = j < count ? load(p + j) : 0.0f;
}
template <class T>
__device__ inline void store_ranks(T* p, int count, bool vectors, const float (&v)[kRanks]) {
  if (vectors) return store(p, v);
#pragma unroll
  for (int j = 0; j < kRanks; ++j) {
    if (j < count) store(p + j, v[j]);
  }
}

// A block: kBlockColumns of K of one layer for kSamples samples. It computes that layer's hidden itself, tile by tile.
template <class T>
__global__ void __launch_bounds__(kThreads) lora_forward_kernel(const LoraForwardParams p, const LoraShape shape) {
  __shared__ float hidden[kSamples][kForwardRanks];
  const int64_t layer = blockIdx.y, first_sample = static_cast<int64_t>(blockIdx.z) * kSamples;
  const int samples = static_cast<int>(shape.B - first_sample < kSamples ? shape.B - first_sample : kSamples);
  const int64_t first_k = static_cast<int64_t>(blockIdx.x) * kBlockColumns + threadIdx.x;
  const T* const cond = static_cast<const T*>(p.cond.data) + first_sample * shape.D;
  const T* const down = static_cast<const T*>(p.down.data) + layer * shape.rank * shape.D;
  const T* const up = static_cast<const T*>(p.up.data) + layer * shape.K * shape.rank;
  float* const hidden_out = static_cast<float*>(p.hidden.data) + (layer * shape.B + first_sample) * shape.rank;

  float sums[kThreadColumns][kSamples] = {};
  for (int64_t first = 0; first < shape.rank; first += kForwardRanks) {
    const int ranks = static_cast<int>(shape.rank - first < kForwardRanks ? shape.rank - first : kForwardRanks);
    for (int pair = static_cast<int>(threadIdx.x) / kWarp; pair < ranks * samples; pair += kWarps) {
      const int s = pair % samples, j = pair / samples;
      const T *const row = down + (first + j) * shape.D, *const vector = cond + s * shape.D;
      const float dot =
          warp_sum(shape.vectors_d ? lane_dot<kLanes<T>>(row, vector, shape.D) : lane_dot<1>(row, vector, shape.D));
      if (threadIdx.x % kWarp != 0) continue;
      hidden[s][j] = dot;
      if (blockIdx.x == 0) hidden_out[s * shape.rank + first + j] = dot;
    }
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t k = first_k + c * kThreads;
      if (k >= shape.K) continue;
      for (int j = 0; j < ranks; j += kRanks) {
        float weights[kRanks];
        load_ranks(up + k * shape.rank + first + j, ranks - j, shape.vectors_r, weights);
        for (int i = 0; i < kRanks && j + i < ranks; ++i) {
#pragma unroll
          for (int s = 0; s < kSamples; ++s) {
            if (s < samples) sums[c][s] += weights[i] * hidden[s][j + i];
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int c = 0; c < kThreadColumns; ++c) {
    const int64_t k = first_k + c * kThreads;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      if (k >= shape.K || s >= samples) continue;
      const float base = load(static_cast<const T*>(p.base.data) + (first_sample + s) * shape.K + k);
      store(static_cast<T*>(p.out.data) + (layer * shape.B + first_sample + s) * shape.K + k, base + sums[c][s]);
    }
  }
}

// grad_up, and the part of hidden's gradient that comes from one chunk of K. A block: one chunk of one layer.
template <class T>
__global__ void __launch_bounds__(kThreads) lora_up_kernel(const LoraBackwardParams p, const LoraShape shape) {
  __shared__ float scratch[2][kWarps][kRanks];
  const int64_t layer = blockIdx.y, chunk = blockIdx.x;
  const int64_t first_k = chunk * kBlockColumns + threadIdx.x;
  const T* const grad = static_cast<const T*>(p.grad.data) + layer * shape.B * shape.K;
  const T* const up = static_cast<const T*>(p.up.data) + layer * shape.K * shape.rank;
  T* const grad_up = static_cast<T*>(p.grad_up.data) + layer * shape.K * shape.rank;
  const float* const hidden = static_cast<const float*>(p.hidden.data) + layer * shape.B * shape.rank;
  float* const partial = shape.partial + (layer * shape.chunks + chunk) * shape.B * shape.rank;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;

  int turn = 0;
  for (int64_t first = 0; first < shape.rank; first += kRanks) {
    const int ranks = static_cast<int>(shape.rank - first < kRanks ? shape.rank - first : kRanks);
    float weights[kThreadColumns][kRanks] = {}, sums[kThreadColumns][kRanks] = {};
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t k = first_k + c * kThreads;
      if (k < shape.K) load_ranks(up + k * shape.rank + first, ranks, shape.vectors_r, weights[c]);
    }
    for (int64_t b = 0; b < shape.B; ++b, turn ^= 1) {
      float hidden_ranks[kRanks], parts[kRanks] = {};
#pragma unroll
      for (int j = 0; j < kRanks; ++j) hidden_ranks[j] = j < ranks ? hidden[b * shape.rank + first + j] : 0.0f;
#pragma unroll
      for (int c = 0; c < kThreadColumns; ++c) {
        const int64_t k = first_k + c * kThreads;
        const float g = k < shape.K ? load(grad + b * shape.K + k) : 0.0f;
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
          sums[c][j] += g * hidden_ranks[j];
          parts[j] += g * weights[c][j];
        }
      }
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (j >= ranks) break;
        parts[j] = warp_sum(parts[j]);
        if (lane == 0) scratch[turn][warp][j] = parts[j];
      }
      __syncthreads();
      if (static_cast<int>(threadIdx.x) < ranks) {
        float total = 0;
        for (int w = 0; w < kWarps; ++w) total += scratch[turn][w][threadIdx.x];
        partial[b * shape.rank + first + threadIdx.x] = total;
      }
    }
#pragma unroll
    for (int c = 0; c < kThreadColumns; ++c) {
      const int64_t k = first_k + c * kThreads;
      if (k < shape.K) store_ranks(grad_up + k * shape.rank + first, ranks, shape.vectors_r, sums[c]);
    }
  }
}

// Blocks of the second backward launch: so many for grad_base, then for grad_down, then for grad_cond.
constexpr int kDownThreads = kThreads;               // columns of D of one row of grad_down
constexpr int kCondColumns = kThreads / 4;           // columns of D of one row of grad_cond, each four threads'
constexpr int kCondSplit = kThreads / kCondColumns;  // threads that share the layers and ranks

struct LoraBlocks {
  int64_t base, down, cond;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    lora_down_kernel(const LoraBackwardParams p, const LoraShape shape, const LoraBlocks blocks) {
  __shared__ float grad_hidden[kTile];
  __shared__ float scratch[kCondSplit][kCondColumns];
  const int64_t rank = shape.rank, rows = shape.layers * rank;
  const int thread = static_cast<int>(threadIdx.x);

  int64_t block = blockIdx.x;
  if (block < blocks.base) {
    const int64_t i = block * kThreads + thread, size = shape.B * shape.K;
    if (i >= size) return;
    float sum = 0;
#pragma unroll 4
    for (int64_t l = 0; l < shape.layers; ++l) sum += load(static_cast<const T*>(p.grad.data) + l * size + i);
    store(static_cast<T*>(p.grad_base.data) + i, sum);
    return;
  }
  block -= blocks.base;

  // The gradient of hidden[layer, b, j] for row = layer * r + j, from all chunks of K.
  const auto gradient = [&](int64_t row, int64_t b) {
    const float* const first = shape.partial + (row / rank * shape.chunks * shape.B + b) * rank + row % rank;
    float sum = 0;
    for (int64_t chunk = 0; chunk < shape.chunks; ++chunk) sum += first[chunk * shape.B * rank];
    return sum;
  };

  if (block < blocks.down) {
    const int64_t row = block % rows, d = block / rows * kDownThreads + thread;
    float sum = 0;
    for (int64_t first = 0; first < shape.B; first += kTile) {
      const int count = static_cast<int>(shape.B - first < kTile ? shape.B - first : kTile);
      if (thread < count) grad_hidden[thread] = gradient(row, first + thread);
      __syncthreads();
      for (int i = 0; i < count && d < shape.D; ++i) {
        sum += grad_hidden[i] * load(static_cast<const T*>(p.cond.data) + (first + i) * shape.D + d);
      }
      __syncthreads();
    }
    if (d < shape.D) store(static_cast<T*>(p.grad_down.data) + row * shape.D + d, sum);
    return;
  }
  block -= blocks.down;

  const int64_t b = block % shape.B, d = block / shape.B * kCondColumns + thread % kCondColumns;
  const int split = thread / kCondColumns;
  float sum = 0;
  for (int64_t first = 0; first < rows; first += kTile) {
    const int count = static_cast<int>(rows - first < kTile ? rows - first : kTile);
    if (thread < count) grad_hidden[thread] = gradient(first + thread, b);
    __syncthreads();
    for (int i = split; i < count && d < shape.D; i += kCondSplit) {
      sum += grad_hidden[i] * load(static_cast<const T*>(p.down.data) + (first + i) * shape.D + d);
    }
    __syncthreads();
  }
  scratch[split][thread % kCondColumns] = sum;
  __syncthreads();
  if (split > 0 || d >= shape.D) return;
  for (int other = 1; other < kCondSplit; ++other) sum += scratch[other][thread];
  store(static_cast<T*>(p.grad_cond.data) + b * shape.D + d, sum);
}

LoraShape shape_of(const TensorView& cond, const TensorView& down, const TensorView& up) {
  LoraShape shape{};
  shape.layers = down.shape[0];
  shape.B = cond.shape[0];
  shape.D = down.shape[2];
  shape.K = up.shape[1];
  shape.rank = down.shape[1];
  require(shape.layers <= 65535, "at most 65535 layers");
  shape.vectors_d = allows_vectors(cond) && allows_vectors(down);
  const int64_t size = up.dtype == DType::float32 ? 4 : 2;
  shape.vectors_r = allows_vectors(up) && shape.rank % kRanks == 0 && kRanks * size % kVectorBytes == 0;
  shape.chunks = divide_up<int64_t>(shape.K, kBlockColumns);
  return shape;
}

}  // namespace

void lora_forward(const LoraForwardParams& p, const CudaCall& call) {
  check(p);
  const LoraShape shape = shape_of(p.cond, p.down, p.up);
  const int64_t groups = divide_up<int64_t>(shape.B, kSamples);
  require(groups <= 65535, "at most 524280 samples");
  if (shape.layers * shape.B == 0 || shape.chunks == 0) return;
  const dim3 grid(grid_size(shape.chunks), static_cast<unsigned>(shape.layers), static_cast<unsigned>(groups));
  dispatch_type(p.cond.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("adaln_lora", lora_forward_kernel<T>, grid, dim3(kThreads), call, p, shape);
  });
}

int64_t lora_backward_workspace(const LoraBackwardParams& p, int) {
  check(p);
  const LoraShape shape = shape_of(p.cond, p.down, p.up);
  return shape.layers * shape.chunks * shape.B * shape.rank * static_cast<int64_t>(sizeof(float));
}

void lora_backward(const LoraBackwardParams& p, const CudaCall& call) {
  require(call.workspace_bytes >= lora_backward_workspace(p, call.processors), "the workspace is too small");
  LoraShape shape = shape_of(p.cond, p.down, p.up);
  shape.vectors_r = shape.vectors_r && allows_vectors(p.grad_up);
  shape.partial = static_cast<float*>(call.workspace);
  LoraBlocks blocks{};
  blocks.base = divide_up<int64_t>(shape.B * shape.K, kThreads);
  blocks.down = shape.layers * shape.rank * divide_up<int64_t>(shape.D, kDownThreads);
  blocks.cond = shape.B * divide_up<int64_t>(shape.D, kCondColumns);
  const int64_t all = blocks.base + blocks.down + blocks.cond;
  const int64_t up_blocks = shape.rank > 0 ? shape.chunks * shape.layers : 0;
  dispatch_type(p.cond.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (up_blocks > 0) {
      const dim3 grid(grid_size(shape.chunks), static_cast<unsigned>(shape.layers));
      launch("adaln_lora_backward", lora_up_kernel<T>, grid, dim3(kThreads), call, p, shape);
    }
    if (all > 0) {
      launch("adaln_lora_backward", lora_down_kernel<T>, dim3(grid_size(all)), dim3(kThreads), call, p, shape, blocks);
    }
  });
}

}  // namespace walt::cuda::adaln_lora
