// One binary, several instruction sets. setup.py compiles every <op>/cpu.cpp once per level with its own compiler flags
// and WALT_ISA naming the namespace everything in it lives in; the module calls the best level this processor has.
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

// Declares `void name(const Params&)` in the namespace of every level.
#define WALT_DECLARE_KERNEL(name, Params) \
  namespace isa_baseline {                \
  void name(const Params&);               \
  }                                       \
  namespace isa_avx2 {                    \
  void name(const Params&);               \
  }                                       \
  namespace isa_avx512 {                  \
  void name(const Params&);               \
  }

#ifdef WALT_HAS_AVX2
#define WALT_CASE_AVX2(name, params) \
  case walt::Isa::avx2: return walt::isa_avx2::name(params);
#else
#define WALT_CASE_AVX2(name, params)
#endif
#ifdef WALT_HAS_AVX512
#define WALT_CASE_AVX512(name, params) \
  case walt::Isa::avx512: return walt::isa_avx512::name(params);
#else
#define WALT_CASE_AVX512(name, params)
#endif

// Calls the chosen level's kernel and returns from the enclosing function.
#define WALT_CALL_KERNEL(name, params)                \
  switch (walt::current_isa().load()) {               \
    WALT_CASE_AVX512(name, params)                    \
    WALT_CASE_AVX2(name, params)                      \
    default: return walt::isa_baseline::name(params); \
  }

}  // namespace walt
