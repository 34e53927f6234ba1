#include "adaln_lora/params.h"
#include "common/checks.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace walt::WALT_ISA {
namespace {

// x_new = x + gate * branch for one row of D elements.
template <class T, class M>
void residual_row(const T* x, const T* branch, const M* gate, T* x_new, int64_t D) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>;
  int64_t d = 0;
  for (; d + lanes <= D; d += lanes) store(x_new + d, load(x + d) + load(gate + d) * load(branch + d));
  if (d < D) {
    const int64_t rest = D - d;
    store_partial(x_new + d, load_partial(x + d, rest) + load_partial(gate + d, rest) * load_partial(branch + d, rest),
                  rest);
  }
}

}  // namespace

void adaln_residual(const AdalnResidualParams& p) {
  const int64_t B = p.x.shape[0], N = p.x.shape[1], D = p.x.shape[2], F = p.gate.shape[1];
  require_view(p.branch, "branch", p.x.dtype, B, N, D);
  require_view(p.x_new, "x_new", p.x.dtype, B, N, D);
  dispatch_dtype(p.x.dtype, [&](auto x_tag) {
    dispatch_dtype(p.gate.dtype, [&](auto gate_tag) {
      using T = decltype(x_tag);
      using M = decltype(gate_tag);
      if constexpr (std::is_same_v<accumulate_t<T>, accumulate_t<M>>) {
        parallel_for(B * N, p.threads, [&](int64_t row, int) {
          const int64_t b = row / N, n = row % N;
          const auto at = [&](const TensorView& v, int64_t i) { return b * v.stride[0] + i * v.stride[1]; };
          residual_row(static_cast<const T*>(p.x.data) + at(p.x, n),
                       static_cast<const T*>(p.branch.data) + at(p.branch, n),
                       static_cast<const M*>(p.gate.data) + at(p.gate, n / (N / F)),
                       static_cast<T*>(p.x_new.data) + at(p.x_new, n), D);
        });
      } else {
        throw std::invalid_argument("gate must be float64 exactly when x is");
      }
    });
  });
}

}  // namespace walt::WALT_ISA
