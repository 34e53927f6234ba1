// Gradients of the low-rank modulation. Sums over K, over layers and over the rows of `down` run in fixed order:
// partial sums of a number of blocks that depends on the shapes alone, then the blocks in order.
#include "adaln_lora/lora.h"
#include "adaln_lora/params.h"
#include "common/parallel.h"

namespace walt::WALT_ISA::adaln_lora {
namespace {

constexpr int64_t kMaxBlocks = 32;      // of partial sums, per layer (K) and in all (rows of down)
constexpr int64_t kMinBlockRows = 256;  // rows of `up` in a block
constexpr int kGroup = 4;               // weight rows that share a pass over the partial sums

// For weight rows begin..end, each `length` long, with coefficients c[b, row]:
//   grad_weights[row] = sum_b c[b, row] * vectors[b],   partial[b] += sum_row c[b, row] * weights[row].
// `coefficient(b, row)` returns c; partial rows are padded, `scratch` holds B * kGroup numbers.
template <int kRows, class T, class A, class F>
void outer_rows(const T* weights, T* grad_weights, const A* vectors, A* partial, A* scratch, int64_t row,
                int64_t length, int64_t width, int64_t B, F&& coefficient) {
  using V = vector_t<A>;
  for (int64_t b = 0; b < B; ++b) {
    for (int i = 0; i < kRows; ++i) scratch[b * kRows + i] = coefficient(b, row + i);
  }
  const auto step = [&](int64_t d, auto piece) __attribute__((always_inline)) {
    V w[kRows], grad[kRows] = {};
    for (int i = 0; i < kRows; ++i) w[i] = piece.load(weights + (row + i) * length + d);
    for (int64_t b = 0; b < B; ++b) {
      const V v = load(vectors + b * width + d);
      V sum = load(partial + b * width + d);
      for (int i = 0; i < kRows; ++i) {
        const A c = scratch[b * kRows + i];
        sum += c * w[i];
        grad[i] += c * v;
      }
      store(partial + b * width + d, sum);
    }
    for (int i = 0; i < kRows; ++i) piece.store(grad_weights + (row + i) * length + d, grad[i]);
  };
  int64_t d = 0;
  for (; d + kLanes<A> <= length; d += kLanes<A>) step(d, FullVector<>{});
  if (d < length) step(d, PartialVector{length - d});
}

template <class T, class A, class F>
void outer_range(const T* weights, T* grad_weights, const A* vectors, A* partial, A* scratch, int64_t begin,
                 int64_t end, int64_t length, int64_t width, int64_t B, F&& coefficient) {
  std::memset(partial, 0, static_cast<size_t>(B * width) * sizeof(A));
  int64_t row = begin;
  for (; row + kGroup <= end; row += kGroup) {
    outer_rows<kGroup>(weights, grad_weights, vectors, partial, scratch, row, length, width, B, coefficient);
  }
  for (; row < end; ++row) {
    outer_rows<1>(weights, grad_weights, vectors, partial, scratch, row, length, width, B, coefficient);
  }
}

// The same for `up` of a small rank, vectors along k: grad_up[k, j] = sum_b grad[b, k] * hidden[b, j] and
// partial[b, j] += sum_k grad[b, k] * up[k, j] for a block of `count` columns. `scratch` holds two transposed blocks.
template <class T, class A>
void narrow_block(const T* up, T* grad_up, const T* grad, const A* hidden, A* partial, A* scratch, int64_t count,
                  int64_t K, int64_t rank, int64_t width, int64_t B) {
  using V = vector_t<A>;
  A *const columns = scratch, *const grad_columns = scratch + kWideRank * kNarrowColumns;
  transpose_up<false>(up, columns, count, rank);
  for (int64_t j = 0; j < rank; ++j) {
    A* const column = columns + j * kNarrowColumns;
    for (int64_t b = 0; b < B; ++b) {
      V sums[kSlots] = {};
      sweep<A>(count, [&](int64_t k, auto piece, int slot) __attribute__((always_inline)) {
        sums[slot] += piece.load(grad + b * K + k) * piece.load(column + k);
      });
      partial[b * width + j] += sum_slots(sums);
    }
    sweep<A>(count, [&](int64_t k, auto piece, int) __attribute__((always_inline)) {
      V sum = {};
      for (int64_t b = 0; b < B; ++b) sum += hidden[b * width + j] * piece.load(grad + b * K + k);
      store(grad_columns + j * kNarrowColumns + k, sum);
    });
  }
  transpose_up<true>(grad_up, grad_columns, count, rank);
}

// A dense matrix in rows padded to whole vectors.
template <class T, class A>
void pad_rows(const T* source, A* target, int64_t rows, int64_t length, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) {
    widen(source + i * length, target + i * width, length);
    for (int64_t d = length; d < width; ++d) target[i * width + d] = 0;
  }
}

template <class T>
void backward(const LoraBackwardParams& p) {
  using A = accumulate_t<T>;
  const int64_t layers = p.down.shape[0], rank = p.down.shape[1], D = p.down.shape[2];
  const int64_t B = p.cond.shape[0], K = p.grad.shape[2];
  const T *const grad = static_cast<const T*>(p.grad.data), *const up = static_cast<const T*>(p.up.data);
  const T* const down = static_cast<const T*>(p.down.data);
  T *const grad_up = static_cast<T*>(p.grad_up.data), *const grad_down = static_cast<T*>(p.grad_down.data);
  T *const grad_base = static_cast<T*>(p.grad_base.data), *const grad_cond = static_cast<T*>(p.grad_cond.data);

  const int threads = threads_for(layers * (rank * (D + K) + B * K), p.threads);
  const int64_t rank_width = padded<A>(rank), cond_width = padded<A>(D);
  int64_t up_blocks = K / kMinBlockRows < kMaxBlocks ? K / kMinBlockRows : kMaxBlocks;
  up_blocks = up_blocks > 1 ? up_blocks : 1;
  const int64_t down_blocks = layers * rank < kMaxBlocks ? layers * rank : kMaxBlocks;
  const int64_t scratch_size = padded<A>(B * kGroup + 2 * kWideRank * kNarrowColumns);
  const Scratch<A> hidden(layers * B * rank_width), cond(B * cond_width), scratch(threads * scratch_size);
  const Scratch<A> up_partial(layers * up_blocks * B * rank_width), down_partial(down_blocks * B * cond_width);
  pad_rows(static_cast<const A*>(p.hidden.data), hidden.data(), layers * B, rank, rank_width);
  pad_rows(static_cast<const T*>(p.cond.data), cond.data(), B, D, cond_width);

  parallel_for(B * ((K + kNarrowColumns - 1) / kNarrowColumns), threads, [&](int64_t task, int) {
    const int64_t k0 = task / B * kNarrowColumns, count = K - k0 < kNarrowColumns ? K - k0 : kNarrowColumns;
    const int64_t at = task % B * K + k0;
    sweep<A>(count, [&](int64_t k, auto piece, int) __attribute__((always_inline)) {
      vector_t<A> sum = {};
      for (int64_t l = 0; l < layers; ++l) sum += piece.load(grad + l * B * K + at + k);
      piece.store(grad_base + at + k, sum);
    });
  });

  parallel_for(layers * up_blocks, threads, [&](int64_t task, int thread) {
    const int64_t l = task / up_blocks, block = task % up_blocks;
    const int64_t begin = part_begin(K, up_blocks, block), end = part_begin(K, up_blocks, block + 1);
    const T *const layer_up = up + l * K * rank, *const layer_grad = grad + l * B * K;
    T* const layer_grad_up = grad_up + l * K * rank;
    const A* const layer_hidden = hidden.data() + l * B * rank_width;
    A* const partial = up_partial.data() + task * B * rank_width;
    A* const thread_scratch = scratch.data() + thread * scratch_size;
    if (rank >= kWideRank) {
      outer_range(layer_up, layer_grad_up, layer_hidden, partial, thread_scratch, begin, end, rank, rank_width, B,
                  [&](int64_t b, int64_t k) { return to_float(layer_grad[b * K + k]); });
      return;
    }
    std::memset(partial, 0, static_cast<size_t>(B * rank_width) * sizeof(A));
    for (int64_t k = begin; k < end; k += kNarrowColumns) {
      narrow_block(layer_up + k * rank, layer_grad_up + k * rank, layer_grad + k, layer_hidden, partial, thread_scratch,
                   end - k < kNarrowColumns ? end - k : kNarrowColumns, K, rank, rank_width, B);
    }
  });

  // grad_hidden[l, b] goes where the first block's partial sum was.
  parallel_for(layers, threads, [&](int64_t l, int) {
    A* const total = up_partial.data() + l * up_blocks * B * rank_width;
    for (int64_t block = 1; block < up_blocks; ++block) {
      for (int64_t i = 0; i < B * rank_width; ++i) total[i] += total[block * B * rank_width + i];
    }
  });

  parallel_for(down_blocks, threads, [&](int64_t block, int thread) {
    const int64_t begin = part_begin(layers * rank, down_blocks, block);
    const int64_t end = part_begin(layers * rank, down_blocks, block + 1);
    outer_range(down, grad_down, cond.data(), down_partial.data() + block * B * cond_width,
                scratch.data() + thread * scratch_size, begin, end, D, cond_width, B, [&](int64_t b, int64_t row) {
                  const int64_t l = row / rank, j = row % rank;
                  return up_partial[(l * up_blocks * B + b) * rank_width + j];
                });
  });

  for (int64_t b = 0; b < B; ++b) {
    sweep<A>(D, [&](int64_t d, auto piece, int) __attribute__((always_inline)) {
      vector_t<A> sum = {};
      for (int64_t block = 0; block < down_blocks; ++block) {
        sum += load(down_partial.data() + (block * B + b) * cond_width + d);
      }
      piece.store(grad_cond + b * D + d, sum);
    });
  }
}

}  // namespace

void lora_backward(const LoraBackwardParams& p) {
  check(p);
  dispatch_dtype(p.cond.dtype, [&](auto tag) { backward<decltype(tag)>(p); });
}

}  // namespace walt::WALT_ISA::adaln_lora
