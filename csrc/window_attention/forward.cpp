#include "window_attention/attention.h"
// Window attention. A task is one head of one window; its image tokens pass through, its video tokens attend, a block
// of queries at a time.
#include "window_attention/params.h"
#include "window_attention/tile_forward.h"

namespace walt::WALT_ISA::window_attention {
namespace {

// One thread's working memory for one head of one window.
template <class T>
struct ForwardScratch {
  using A = accumulate_t<T>;
  using Unit = typename Attention<T>::Unit;
  A *keys, *values, *queries, *stats, *scores, *out, *largest, *sum;
  Unit *key_units, *value_units, *query_units, *query_columns, *weight_units;

  ForwardScratch(const Attention<T>& at, Arena& arena) {
    const bool paired = Attention<T>::kPaired;
    const int64_t keys_size = round_up(at.max_keys, 2) * at.shape.ld;
    keys = arena.take<A>(keys_size);
    values = arena.take<A>(keys_size);
    queries = arena.take<A>(kBlock * at.shape.ld);
    stats = arena.take<A>(2 * std::max(at.max_keys, kBlock));
    scores = arena.take<A>(at.max_keys * kBlock + at.lanes);
    out = arena.take<A>(kBlock * at.shape.ld);
    largest = arena.take<A>(kBlock);
    sum = arena.take<A>(kBlock);
    key_units = arena.take<Unit>(paired ? keys_size : 0);
    value_units = arena.take<Unit>(paired ? keys_size / 2 : 0);
    query_units = arena.take<Unit>(paired ? kBlock * at.shape.ld : 0);
    query_columns = arena.take<Unit>(at.units * kBlock);
    weight_units = arena.take<Unit>(paired ? (at.max_keys + 1) / 2 * kBlock : 0);
  }
};

// Softmax over keys of `Vectors` vectors of queries, unnormalised: scores become weights exp(score - largest), the last
// key's partner in a pair zero.
template <class T, int Vectors>
void softmax_columns(int64_t keys, typename Attention<T>::A* scores, typename Attention<T>::Unit* weights,
                     typename Attention<T>::A* largest, typename Attention<T>::A* sum) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  constexpr int lanes = kLanes<A>;
  V top[Vectors], total[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    top[v] = load(scores + v * lanes);
    total[v] = V{};
  }
  for (int64_t n = 1; n < keys; ++n) {
    for (int v = 0; v < Vectors; ++v) top[v] = maximum(top[v], load(scores + n * kBlock + v * lanes));
  }
  for (int64_t n = 0; n < keys; ++n) {
    for (int v = 0; v < Vectors; ++v) {
      const V weight = exp(load(scores + n * kBlock + v * lanes) - top[v]);
      total[v] += weight;
      store(scores + n * kBlock + v * lanes, weight);
    }
    if constexpr (Attention<T>::kPaired) {
      if (n % 2 == 0 && n + 1 < keys) continue;
      const A* even = scores + n / 2 * 2 * kBlock;
      for (int v = 0; v < Vectors; ++v) {
        const V odd = n % 2 == 1 ? load(even + kBlock + v * lanes) : V{};
        store(weights + n / 2 * kBlock + v * lanes, pair_bf16(load(even + v * lanes), odd));
      }
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    store(largest + v * lanes, top[v]);
    store(sum + v * lanes, total[v]);
  }
}

template <class T>
void softmax(int64_t keys, int64_t queries, const ForwardScratch<T>& s) {
  constexpr int lanes = Attention<T>::lanes;
  int64_t i = 0;
  for (; i + 2 * lanes <= queries; i += 2 * lanes) {
    softmax_columns<T, 2>(keys, s.scores + i, s.weight_units + i, s.largest + i, s.sum + i);
  }
  for (; i < queries; i += lanes) {
    softmax_columns<T, 1>(keys, s.scores + i, s.weight_units + i, s.largest + i, s.sum + i);
  }
}

template <class T>
void attend(const Attention<T>& at, const Window& window, int64_t head, std::vector<Run>& runs,
            const ForwardScratch<T>& s) {
  using A = accumulate_t<T>;
  using U = typename Attention<T>::U;
  using Unit = typename U::Unit;
  const auto& p = at.p;
  const auto& shape = at.shape;
  const int64_t tokens = window.tokens();
  const int64_t keys = at.load_keys(window, head, p.k, p.context_k, &at.k_norm, s.stats, s.keys);
  at.load_keys(window, head, p.v, p.context_v, nullptr, nullptr, s.values);
  const Unit* key_units = at.along(s.keys, keys, s.key_units);
  const Unit* value_units = at.across(s.values, keys, s.value_units);
  const int64_t block = at.block_size(tokens);

  for (int64_t begin = 0; begin < tokens; begin += block) {
    const int64_t end = std::min(begin + block, tokens), queries = round_up(end - begin, at.lanes);
    at.load_queries(window, head, begin, end, queries, s.stats, s.queries);
    const Unit* query_units = at.along(s.queries, queries, s.query_units);
    transpose_units(query_units, shape.ld, s.query_columns, kBlock, queries, at.units);

    at.bias.runs(window, begin, end, at.lanes, runs);
    at.start_scores(window, head, runs, keys, end - begin, s.scores);
    gemm<U, false>(keys, queries / at.lanes, at.units, key_units, shape.ld, s.query_columns, kBlock, s.scores, kBlock);
    softmax(keys, queries, s);

    const Unit* weights;
    if constexpr (Attention<T>::kPaired) {
      weights = s.weight_units;
    } else {
      weights = s.scores;
    }
    at.clear_rows(s.out, 0, end - begin);
    gemm<U, true>(end - begin, shape.vectors, at.unit_rows(keys), weights, kBlock, value_units, shape.ld, s.out,
                  shape.ld);
    A* lse = static_cast<A*>(p.lse.data);
    window.each_token(begin, end, [&](int64_t n, int64_t frame, int64_t row, int64_t column) {
      A* out = s.out + n * shape.ld;
      scale_row(out, 1 / s.sum[n], shape.vectors);
      store_row(at.mutable_data(p.out) + window.offset(p.out, head, frame, row, column), 1, shape.dim, out);
      lse[lse_offset(p.lse, window, head, frame, row, column)] = s.largest[n] + std::log(s.sum[n]);
    });
  }
}

template <class T>
void pass_images_through(const Attention<T>& at, const Window& window, int64_t head) {
  const auto& p = at.p;
  window.each_image_token([&](int64_t frame, int64_t row, int64_t column) {
    copy_row(at.data(p.v) + window.offset(p.v, head, frame, row, column), p.v.stride[5],
             at.mutable_data(p.out) + window.offset(p.out, head, frame, row, column), 1, at.shape.dim);
    static_cast<accumulate_t<T>*>(p.lse.data)[lse_offset(p.lse, window, head, frame, row, column)] = 0;
  });
}

template <class S, class T>
void run(const Attention<T>& at) {
  Arena counter(nullptr);
  S{at, counter};
  const int threads = std::max(at.p.threads, 1);
  Scratch<char> memory(counter.used() * threads);
  std::vector<Window> windows(static_cast<size_t>(threads));
  std::vector<std::vector<Run>> runs(static_cast<size_t>(threads));
  for (auto& r : runs) r.reserve(kBlock);
  for (auto& w : windows) w.reserve(at.grid);

  parallel_for(at.p.q.shape[0] * at.grid.windows() * at.heads, threads, [&](int64_t task, int thread) {
    Arena arena(memory.data() + thread * counter.used());
    const S scratch(at, arena);
    Window& window = windows[static_cast<size_t>(thread)];
    const int64_t head = task % at.heads, index = task / at.heads;
    window.load(at.grid, at.p.image, index / at.grid.windows(), index % at.grid.windows());
    pass_images_through(at, window, head);
    if (!window.video.empty()) attend(at, window, head, runs[static_cast<size_t>(thread)], scratch);
  });
}

}  // namespace

void forward(const WindowAttentionParams& p) {
  check(p);
  require(p.out.defined() && p.out.contiguous(), "out must be contiguous");
  with_attention(p, [](const auto& attention) {
    using T = typename std::decay_t<decltype(attention)>::Element;
#ifdef WALT_HAS_TILES
    if constexpr (std::is_same_v<T, bfloat16>) {
      if (tiles_in_use()) return run<TileForwardScratch>(attention);
    }
#endif
    run<ForwardScratch<T>>(attention);
  });
}

}  // namespace walt::WALT_ISA::window_attention
