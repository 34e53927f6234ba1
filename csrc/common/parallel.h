// Threads and scratch memory. Work is cut into tasks whose results do not depend on which thread runs them, or on how
// many there are, so every kernel is deterministic.
#pragma once

#include <cstdint>

#include "common/scratch_pool.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace walt::WALT_ISA {

// Runs f(task, thread) for task = 0..tasks-1. f must not throw: allocate scratch before the call.
template <class F>
void parallel_for(int64_t tasks, int threads, F&& f) {
  if (tasks <= 0) return;
#ifdef _OPENMP
  if (threads > 1 && tasks > 1) {
    const int team = static_cast<int>(tasks < threads ? tasks : threads);
#pragma omp parallel num_threads(team)
    {
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < tasks; ++task) f(task, thread);
    }
    return;
  }
#endif
  (void)threads;
  for (int64_t task = 0; task < tasks; ++task) f(task, 0);
}

// Start and end of part `index` when n items are cut into `parts` nearly equal runs.
inline int64_t part_begin(int64_t n, int64_t parts, int64_t index) {
  return n / parts * index + (n % parts < index ? n % parts : index);
}

// Uninitialised memory, aligned to a cache line, given back with its owner.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : block_(ScratchPool::take(static_cast<size_t>(count) * sizeof(T) + 64)) {}
  ~Scratch() { ScratchPool::give(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data() const { return static_cast<T*>(block_.data); }
  T& operator[](int64_t i) const { return data()[i]; }

 private:
  ScratchPool::Block block_;
};

}  // namespace walt::WALT_ISA
