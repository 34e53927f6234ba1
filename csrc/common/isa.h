// One binary, several instruction sets, called levels. setup.py compiles every .cpp of an op but its bind.cpp once per
// level, with that level's compiler flags and with WALT_ISA naming its namespace; kernels are in walt::WALT_ISA::<op>.
// A call runs at the best level that was compiled and that this processor has, or at the one that set_isa chose.
#pragma once

#include <atomic>
#include <initializer_list>

namespace walt {

enum class Isa : int { baseline, avx2, avx512 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

inline bool isa_compiled(Isa isa) {
#ifdef WALT_HAS_AVX2
  if (isa == Isa::avx2) return true;
#endif
#ifdef WALT_HAS_AVX512
  if (isa == Isa::avx512) return true;
#endif
  return isa == Isa::baseline;
}

inline bool isa_runs_here(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
  if (isa == Isa::avx512) {
#ifdef WALT_EMULATE_AVX512
    return isa_runs_here(Isa::avx2);
#endif
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
  }
#endif
  return isa == Isa::baseline;
}

inline Isa best_isa() {
  for (Isa isa : {Isa::avx512, Isa::avx2}) {
    if (isa_compiled(isa) && isa_runs_here(isa)) return isa;
  }
  return Isa::baseline;
}

inline std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

// Declares `void name(const Params&)` of an op in the namespace of every level.
#define WALT_DECLARE_KERNEL(op, name, Params) \
  namespace isa_baseline::op {                \
  void name(const Params&);                   \
  }                                           \
  namespace isa_avx2::op {                    \
  void name(const Params&);                   \
  }                                           \
  namespace isa_avx512::op {                  \
  void name(const Params&);                   \
  }

#ifdef WALT_HAS_AVX2
#define WALT_CASE_AVX2(kernel, params) \
  case walt::Isa::avx2: return walt::isa_avx2::kernel(params);
#else
#define WALT_CASE_AVX2(kernel, params)
#endif
#ifdef WALT_HAS_AVX512
#define WALT_CASE_AVX512(kernel, params) \
  case walt::Isa::avx512: return walt::isa_avx512::kernel(params);
#else
#define WALT_CASE_AVX512(kernel, params)
#endif

// A function that calls the chosen level's `op::name`.
#define WALT_KERNEL(kernel)                               \
  [](const auto& params) {                                \
    switch (walt::current_isa().load()) {                 \
      WALT_CASE_AVX512(kernel, params)                    \
      WALT_CASE_AVX2(kernel, params)                      \
      default: return walt::isa_baseline::kernel(params); \
    }                                                     \
  }

}  // namespace walt
