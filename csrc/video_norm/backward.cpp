// Gradients where statistics are over groups of channels of frames or clips. With g the gradient of what is activated,
// normal = (x - mean) * rstd and n elements in a group,
//   grad_x = rstd * (g * gain - sum(g * gain) / n - normal * sum(g * gain * normal) / n).
// The sums over a group are made of those over a channel, which the gradients of the modulation are made of, too.
#include "video_norm/activation.h"
#include "video_norm/gradients.h"

namespace walt::WALT_ISA::video_norm {
namespace {

constexpr int64_t kAhead = 8;  // pixels

// The rows of a frame's coefficients: those of the normal numbers, and of
//   grad_x = g * kFactor - kGroup - (x - mean) * kGroupNormal.
enum Row { kMean, kRstd, kFactor, kGroup, kGroupNormal, kRowCount };

// Up to so many bytes of a set's g are kept for the second pass: less work than to exponentiate once more, as long as
// a near cache holds them.
constexpr int64_t kKept = 2 << 20;

template <class T, bool kRows, bool kSilu>
void differentiate(const VideoNormBackwardParams& p) {
  using A = accumulate_t<T>;
  using V = vector_t<A>;
  const Sizes s(p);
  const Video<const T> x(p.x), grad_y(p.grad_y);
  const Video<T> grad_x(p.grad_x);
  const Modulation<A> modulation(p, s);
  const Units units = kRows ? Units(s.P, s.C, kTilePixels) : Units(s.C, s.P, 1);
  const int threads = threads_for(p.x.numel(), p.threads);
  const bool far = is_far(3 * p.x.numel() * static_cast<int64_t>(sizeof(T)));
  const int64_t width = padded<A>(s.C);
  const int64_t sets = s.sets(), frames = s.set_frames;

  // g, in lines of whole vectors: rows or planes.
  const int64_t line = padded<A>(kRows ? s.C : s.P), room_size = frames * units.items * line;
  const bool keep = kSilu && p.grad_x.defined() && room_size * static_cast<int64_t>(sizeof(A)) <= kKept;
  const Scratch<A> kept(keep ? rooms(sets, threads) * room_size : 0);
  const auto kept_of = [&](int64_t room, int64_t frame) {
    return kept.data() + room * room_size + frame % frames * units.items * line;
  };

  const ChannelSums sums(s);
  const Scratch<A> partial(kRows ? s.frames() * units.count() * 2 * width : 0);
  const Scratch<A> coefficients(s.frames() * kRowCount * width);
  const auto row_of = [&](int64_t frame, Row row) { return coefficients.data() + (frame * kRowCount + row) * width; };
  for (int64_t frame = 0; frame < s.frames(); ++frame) {
    std::fill(row_of(frame, kMean), row_of(frame + 1, kMean), A{0});
    for (int64_t c = 0; c < s.C; ++c) {
      const int64_t at = frame / frames * s.groups + c / s.channels;
      if (p.center) row_of(frame, kMean)[c] = static_cast<const A*>(p.mean.data)[at];
      row_of(frame, kRstd)[c] = static_cast<const A*>(p.rstd.data)[at];
    }
  }

  const auto measure = [&](int64_t frame, int64_t unit, int, int64_t room) {
    const A *const mean = row_of(frame, kMean), *const rstd = row_of(frame, kRstd);
    const A *const gain = modulation.gain(frame), *const offset = modulation.offset(frame);
    A* const g_lines = keep ? kept_of(room, frame) : nullptr;
    if constexpr (kRows) {
      A *const sum = partial.data() + (frame * units.count() + unit) * 2 * width, *const sum_normal = sum + width;
      std::fill(sum, sum + 2 * width, A{0});
      const auto add = [&](int64_t i, auto pixels) __attribute__((always_inline)) {
        const T *const x_row = x.frame(frame) + i * x.p, *const grad_row = grad_y.frame(frame) + i * grad_y.p;
        sweep<A>(s.C, [&](int64_t c, auto piece, int) __attribute__((always_inline)) {
          const V mean_c = load(mean + c), rstd_c = load(rstd + c), gain_c = load(gain + c),
                  offset_c = load(offset + c);
          constexpr int64_t count = decltype(pixels)::value;
          V g[count], normal[count], z[count];
          for (int64_t k = 0; k < count; ++k) {
            normal[k] = (piece.load(x_row + k * x.p + c) - mean_c) * rstd_c;
            z[k] = normal[k] * gain_c + offset_c;
            g[k] = piece.load(grad_row + k * grad_y.p + c);
            if (far) {
              __builtin_prefetch(x_row + (k + kAhead) * x.p + c);
              __builtin_prefetch(grad_row + (k + kAhead) * grad_y.p + c);
            }
          }
          through_activation<kSilu>(g, z);
          V g_sum{}, normal_sum{};
          for (int64_t k = 0; k < count; ++k) {
            if (g_lines != nullptr) store(g_lines + (i + k) * line + c, g[k]);
            g_sum += g[k];
            normal_sum += g[k] * normal[k];
          }
          store(sum + c, load(sum + c) + g_sum);
          store(sum_normal + c, load(sum_normal + c) + normal_sum);
        });
      };
      int64_t i = units.begin(unit);
      for (; i + 4 <= units.end(unit); i += 4) add(i, std::integral_constant<int64_t, 4>{});
      for (; i < units.end(unit); ++i) add(i, std::integral_constant<int64_t, 1>{});
    } else {
      for (int64_t c = units.begin(unit); c < units.end(unit); ++c) {
        const T *const from = x.frame(frame) + c * x.c, *const grad = grad_y.frame(frame) + c * grad_y.c;
        double sum = 0, sum_normal = 0;
        for (int64_t begin = 0; begin < s.P; begin += kGrain) {
          V g_sums[kSlots] = {}, normal_sums[kSlots] = {};
          const auto add = [&](int64_t i, auto piece, auto count) __attribute__((always_inline)) {
            V g[count], normal[count], z[count];
            for (int k = 0; k < count; ++k) {
              const int64_t at = begin + i + k * kLanes<A>;
              normal[k] = piece.keep((piece.load(from + at) - mean[c]) * rstd[c]);
              z[k] = normal[k] * gain[c] + offset[c];
              g[k] = piece.load(grad + at);
            }
            through_activation<kSilu>(g, z);
            for (int k = 0; k < count; ++k) {
              if (g_lines != nullptr) store(g_lines + c * line + begin + i + k * kLanes<A>, g[k]);
              g_sums[k] += g[k];
              normal_sums[k] += g[k] * normal[k];
            }
          };
          sweep_packs<A>(std::min(kGrain, s.P - begin), add);
          sum += static_cast<double>(sum_slots(g_sums));
          sum_normal += static_cast<double>(sum_slots(normal_sums));
        }
        sums.of(frame)[c] = sum;
        sums.with_normal(frame)[c] = sum_normal;
      }
    }
  };

  const auto finish = [&](int64_t set) {
    const int64_t first = set * frames, last = first + frames;
    if constexpr (kRows) {
      for (int64_t frame = first; frame < last; ++frame) {
        sums.join(frame, partial.data() + frame * units.count() * 2 * width, units.count(), width);
      }
    }
    const double n = static_cast<double>(frames * s.channels * s.P);
    const bool alone = p.center && n == 1;  // its own mean: x has no say, and rounding is not to give it one
    for (int64_t g = 0; g < s.groups; ++g) {
      double group = 0, group_normal = 0;
      for (int64_t frame = first; frame < last; ++frame) {
        const A* const gain = modulation.gain(frame);
        for (int64_t c = g * s.channels; c < (g + 1) * s.channels; ++c) {
          group += static_cast<double>(gain[c]) * sums.of(frame)[c];
          group_normal += static_cast<double>(gain[c]) * sums.with_normal(frame)[c];
        }
      }
      for (int64_t frame = first; frame < last; ++frame) {
        for (int64_t c = g * s.channels; c < (g + 1) * s.channels; ++c) {
          const double rstd = static_cast<double>(row_of(frame, kRstd)[c]);
          const double gain = static_cast<double>(modulation.gain(frame)[c]);
          row_of(frame, kFactor)[c] = static_cast<A>(alone ? 0 : rstd * gain);
          row_of(frame, kGroup)[c] = static_cast<A>(p.center && !alone ? rstd * (group / n) : 0);
          row_of(frame, kGroupNormal)[c] = static_cast<A>(rstd * rstd * (group_normal / n));
        }
      }
    }
  };

  const auto apply = [&](int64_t frame, int64_t unit, int64_t room) {
    if (!p.grad_x.defined()) return;
    const A *const mean = row_of(frame, kMean), *const rstd = row_of(frame, kRstd);
    const A *const factor = row_of(frame, kFactor), *const group = row_of(frame, kGroup);
    const A* const group_normal = row_of(frame, kGroupNormal);
    const A *const gain = modulation.gain(frame), *const offset = modulation.offset(frame);
    const A* const g_lines = keep ? kept_of(room, frame) : nullptr;
    for (int64_t i = units.begin(unit); i < units.end(unit); ++i) {
      const T* const from = x.frame(frame) + i * (kRows ? x.p : x.c);
      const T* const grad = grad_y.frame(frame) + i * (kRows ? grad_y.p : grad_y.c);
      T* const to = grad_x.frame(frame) + i * (kRows ? grad_x.p : grad_x.c);
      const auto at = [&](const A* row, int64_t j) __attribute__((always_inline)) {
        if constexpr (kRows) return load(row + j);
        return broadcast(row[i]);
      };
      const A* const g_line = g_lines + i * line;
      sweep_packs<A>(kRows ? s.C : s.P, [&](int64_t j, auto piece, auto count) __attribute__((always_inline)) {
        constexpr int64_t lanes = kLanes<A>;
        V g[count], centred[count];
        for (int k = 0; k < count; ++k) {
          centred[k] = piece.load(from + j + k * lanes) - at(mean, j + k * lanes);
          g[k] = keep ? load(g_line + j + k * lanes) : piece.load(grad + j + k * lanes);
        }
        if (!keep) {
          V z[count];
          for (int k = 0; k < count; ++k) {
            z[k] = centred[k] * at(rstd, j + k * lanes) * at(gain, j + k * lanes) + at(offset, j + k * lanes);
          }
          through_activation<kSilu>(g, z);
        }
        for (int k = 0; k < count; ++k) {
          const int64_t jk = j + k * lanes;
          g[k] = g[k] * at(factor, jk) - at(group, jk) - centred[k] * at(group_normal, jk);
        }
        store_pack(piece, to + j, g);
      });
    }
  };
  in_sets(sets, frames, units.count(), threads, measure, finish, apply);
  write_gradients(p, s, sums);
}

}  // namespace

void backward(const VideoNormBackwardParams& p) {
  check_video_norm(p);
  if (p.over == Over::pixel) return backward_pixels(p);
  dispatch(p.x, p.silu, [&](auto tag, auto rows, auto silu) { differentiate<decltype(tag), rows, silu>(p); });
}

}  // namespace walt::WALT_ISA::video_norm
