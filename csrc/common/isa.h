// One binary, several instruction sets, called levels. setup.py compiles every .cpp of an op but its bind.cpp once per
// level, with that level's compiler flags and with WALT_ISA naming its namespace; kernels are in walt::WALT_ISA::<op>.
// A call runs at the best level that was compiled and that this processor has, or at the one that set_isa chose.
// The level amx is the kernels of avx512, whose products of bfloat16 then run on tiles (amx.h).
#pragma once

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace walt {

enum class Isa : int { baseline, avx2, avx512, amx };
constexpr Isa kIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::amx};  // from the slowest on

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline: return "baseline";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

inline bool isa_compiled(Isa isa) {
#ifdef WALT_HAS_AVX2
  if (isa == Isa::avx2) return true;
#endif
#ifdef WALT_HAS_AVX512
  if (isa == Isa::avx512) return true;
#ifdef WALT_HAS_AMX
  if (isa == Isa::amx) return true;
#endif
#endif
  return isa == Isa::baseline;
}

// Whether the processor has tiles of bfloat16 and the operating system lets this process use them.
inline bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's edx
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
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
  if (isa == Isa::amx) {
#ifdef WALT_EMULATE_AMX
    return isa_runs_here(Isa::avx512);
#endif
    return isa_runs_here(Isa::avx512) && tiles_allowed();
  }
#endif
  return isa == Isa::baseline;
}

inline Isa best_isa() {
  Isa best = Isa::baseline;
  for (Isa isa : kIsas) {
    if (isa_compiled(isa) && isa_runs_here(isa)) best = isa;
  }
  return best;
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
  case walt::Isa::amx:                   \
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
