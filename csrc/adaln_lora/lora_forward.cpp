// Low-rank modulation of all layers: hidden = down cond, out = base + up hidden.
#include "adaln_lora/lora.h"
#include "adaln_lora/params.h"
#include "common/parallel.h"

namespace walt::WALT_ISA::adaln_lora {
namespace {

// Weight rows and samples of one register tile: their products fill the registers.
constexpr int kTileRows = 4;
constexpr int kTileSamples = kVectorBytes == 64 ? 4 : 2;
constexpr int64_t kTaskBytes = 65536;

// finish(i, s, dot(weights[i], vectors[s])) for a tile of weight rows and samples, both `length` long and dense.
template <int kRows, int kSamples, class T, class A, class F>
inline void dot_tile(const T* weights, const A* vectors, int64_t vector_stride, int64_t length, F&& finish) {
  using V = vector_t<A>;
  V sums[kSamples * kRows] = {};
  const auto step = [&](int64_t d, auto piece) __attribute__((always_inline)) {
    V w[kRows];
    for (int i = 0; i < kRows; ++i) {
      w[i] = piece.load(weights + i * length + d);
      __builtin_prefetch(weights + (kRows + i) * length + d);  // the next tile; rows are too short for the hardware's
    }
    for (int s = 0; s < kSamples; ++s) {
      const V v = piece.load(vectors + s * vector_stride + d);
      for (int i = 0; i < kRows; ++i) sums[s * kRows + i] += w[i] * v;
    }
  };
  int64_t d = 0;
  for (; d + kLanes<A> <= length; d += kLanes<A>) step(d, FullVector{});
  if (d < length) step(d, PartialVector{length - d});
  if constexpr (kRows * kSamples == kLanes<A>) {  // as many sums as lanes: all at once
    transpose(sums);
    V total = sums[0];
    for (int i = 1; i < kLanes<A>; ++i) total += sums[i];
    for (int s = 0; s < kSamples; ++s) {
      for (int i = 0; i < kRows; ++i) finish(i, s, total[s * kRows + i]);
    }
  } else {
    for (int s = 0; s < kSamples; ++s) {
      for (int i = 0; i < kRows; ++i) finish(i, s, reduce_add(sums[s * kRows + i]));
    }
  }
}

// finish(row, sample, dot) for all rows begin..end and all samples.
template <class T, class A, class F>
void dot_rows(const T* weights, const A* vectors, int64_t vector_stride, int64_t length, int64_t begin, int64_t end,
              int64_t samples, F&& finish) {
  const auto rows = [&](int64_t row, auto tile_rows) __attribute__((always_inline)) {
    constexpr int kRows = decltype(tile_rows)::value;
    int64_t s = 0;
    const auto tile = [&](auto tile_samples) __attribute__((always_inline)) {
      constexpr int kSamples = decltype(tile_samples)::value;
      for (; s + kSamples <= samples; s += kSamples) {
        dot_tile<kRows, kSamples>(weights + row * length, vectors + s * vector_stride, vector_stride, length,
                                  [&](int i, int j, A dot) { finish(row + i, s + j, dot); });
      }
    };
    tile(std::integral_constant<int, kTileSamples>{});
    if constexpr (kTileSamples > 2) tile(std::integral_constant<int, 2>{});
    tile(std::integral_constant<int, 1>{});
  };
  int64_t row = begin;
  for (; row + kTileRows <= end; row += kTileRows) rows(row, std::integral_constant<int, kTileRows>{});
  for (; row < end; ++row) rows(row, std::integral_constant<int, 1>{});
}

// out[b, k] for one block of columns of one layer when the rank is small: vectors along k.
template <class T, class A>
void narrow_block(const T* up, const A* hidden, const T* base, T* out, A* columns, int64_t count, int64_t samples,
                  int64_t rank, int64_t K) {
  transpose_up<false>(up, columns, count, rank);
  for (int64_t b = 0; b < samples; ++b) {
    sweep<A>(count, [&](int64_t k, auto piece, int) __attribute__((always_inline)) {
      auto sum = piece.load(base + b * K + k);
      for (int64_t j = 0; j < rank; ++j) sum += hidden[b * rank + j] * load(columns + j * kNarrowColumns + k);
      piece.store(out + b * K + k, sum);
    });
  }
}

template <class T>
void forward(const LoraForwardParams& p) {
  using A = accumulate_t<T>;
  const int64_t layers = p.down.shape[0], rank = p.down.shape[1], D = p.down.shape[2];
  const int64_t B = p.cond.shape[0], K = p.base.shape[1];
  const T *const base = static_cast<const T*>(p.base.data), *const up = static_cast<const T*>(p.up.data);
  const T* const down = static_cast<const T*>(p.down.data);
  A* const hidden = static_cast<A*>(p.hidden.data);
  T* const out = static_cast<T*>(p.out.data);

  const int threads = threads_for(layers * (rank * (D + K) + B * K), p.threads);
  const Scratch<A> cond(B * D), columns(threads * kWideRank * kNarrowColumns);
  widen(static_cast<const T*>(p.cond.data), cond.data(), B * D);
  const int64_t down_rows = kTaskBytes / (D * static_cast<int64_t>(sizeof(T)) + 1) / kTileRows * kTileRows + kTileRows;
  parallel_for((layers * rank + down_rows - 1) / down_rows, threads, [&](int64_t task, int) {
    const int64_t begin = task * down_rows;
    const int64_t end = begin + down_rows < layers * rank ? begin + down_rows : layers * rank;
    dot_rows(down, cond.data(), D, D, begin, end, B,
             [&](int64_t row, int64_t b, A dot) { hidden[(row / rank * B + b) * rank + row % rank] = dot; });
  });

  const bool wide = rank >= kWideRank;
  const int64_t up_rows =
      wide ? kTaskBytes / (rank * static_cast<int64_t>(sizeof(T))) / kTileRows * kTileRows + kTileRows
           : 8 * kNarrowColumns;
  const int64_t blocks = (K + up_rows - 1) / up_rows;
  const Scratch<A> dots(wide ? threads * B * up_rows : 0);
  parallel_for(layers * blocks, threads, [&](int64_t task, int thread) {
    const int64_t l = task / blocks, begin = task % blocks * up_rows;
    const int64_t end = begin + up_rows < K ? begin + up_rows : K;
    const A* const layer_hidden = hidden + l * B * rank;
    const T* const layer_up = up + l * K * rank;
    T* const layer_out = out + l * B * K;
    if (wide) {
      A* const thread_dots = dots.data() + thread * B * up_rows;
      dot_rows(layer_up, layer_hidden, rank, rank, begin, end, B,
               [&](int64_t k, int64_t b, A dot) { thread_dots[b * up_rows + k - begin] = dot; });
      for (int64_t b = 0; b < B; ++b) {
        sweep<A>(end - begin, [&](int64_t k, auto piece, int) __attribute__((always_inline)) {
          const auto sum = piece.load(base + b * K + begin + k) + piece.load(thread_dots + b * up_rows + k);
          piece.store(layer_out + b * K + begin + k, sum);
        });
      }
      return;
    }
    for (int64_t k = begin; k < end; k += kNarrowColumns) {
      narrow_block(layer_up + k * rank, layer_hidden, base + k, layer_out + k,
                   columns.data() + thread * kWideRank * kNarrowColumns,
                   end - k < kNarrowColumns ? end - k : kNarrowColumns, B, rank, K);
    }
  });
}

}  // namespace

void lora_forward(const LoraForwardParams& p) {
  check(p);
  dispatch_dtype(p.cond.dtype, [&](auto tag) { forward<decltype(tag)>(p); });
}

}  // namespace walt::WALT_ISA::adaln_lora
