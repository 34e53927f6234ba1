// CUDA's execution model on one CPU thread, for tests: every thread of a block is a fiber, blocks run one after
// another. A barrier that not all threads reach is an error. The order in which threads run changes from launch to
// launch: a kernel that depends on it gives two results in two launches.
#pragma once

#include <ucontext.h>

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/simd.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __forceinline__ inline

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace walt::emulate {

constexpr size_t kStackBytes = 256 << 10;
constexpr unsigned kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

// Threads that wait for one another: the block, or one warp of it.
struct Group {
  unsigned threads = 0, waiting = 0, passed = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Group> groups;  // the block, then its warps
  std::vector<float> exchanged[2];
  std::function<void()> body;
  ucontext_t scheduler;
  unsigned current = 0;
  bool moved = false;
};
inline Block block;
inline unsigned launches = 0;

inline void wait(Group& group) {
  block.moved = true;
  const unsigned turn = group.passed;
  if (++group.waiting == group.threads) {
    group.waiting = 0;
    ++group.passed;
    return;
  }
  while (group.passed == turn) swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void enter() {
  block.body();
  block.fibers[block.current].done = block.moved = true;
}

// Runs the threads of one block in an order that `shuffle` decides.
inline void run_block(unsigned shuffle) {
  const unsigned threads = blockDim.x;
  for (unsigned i = 0; i < block.groups.size(); ++i) block.groups[i] = {i == 0 ? threads : kWarp, 0, 0};
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &block.scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left > 0;) {
    block.moved = false;
    left = 0;
    for (unsigned i = 0; i < threads; ++i) {
      const unsigned thread = (shuffle % 2 == 0 ? i + shuffle : threads - 1 - i + shuffle) % threads;
      Fiber& fiber = block.fibers[thread];
      if (fiber.done) continue;
      block.current = thread;
      threadIdx = {thread % blockDim.x, 0, 0};
      swapcontext(&block.scheduler, &fiber.context);
      left += !fiber.done;
    }
    if (left > 0 && !block.moved) throw std::runtime_error("a barrier that not all threads of the group reach");
  }
}

template <class F>
void run(dim3 grid, dim3 size, F&& body) {
  if (size.x % kWarp != 0 || size.x > 1024 || size.y != 1 || size.z != 1) throw std::invalid_argument("block size");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::invalid_argument("grid size");
  }
  block.body = body;
  for (std::vector<float>& values : block.exchanged) values.resize(size.x);
  block.groups.resize(1 + size.x / kWarp);
  while (block.fibers.size() > size.x) block.fibers.pop_back();
  while (block.fibers.size() < size.x) {
    block.fibers.emplace_back();
    block.fibers.back().stack.reset(new char[kStackBytes]);
  }
  gridDim = grid;
  blockDim = size;
  ++launches;
  const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t index = launches % 2 == 0 ? i : blocks - 1 - i;
    blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(launches * 7);
  }
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class T>
struct Pair {
  static void unpack(uint32_t word, float& low, float& high) {
    low = WALT_ISA::to_float(T{static_cast<uint16_t>(word)});
    high = WALT_ISA::to_float(T{static_cast<uint16_t>(word >> 16)});
  }
  static uint32_t pack(float low, float high) {
    return WALT_ISA::from_float<T>(low).bits | static_cast<uint32_t>(WALT_ISA::from_float<T>(high).bits) << 16;
  }
};

}  // namespace walt::emulate

inline void __syncthreads() { walt::emulate::wait(walt::emulate::block.groups[0]); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  auto& block = walt::emulate::block;
  const unsigned thread = block.current;
  auto& warp = block.groups[1 + thread / walt::emulate::kWarp];
  auto& values = block.exchanged[warp.passed % 2];  // the other one may still be read
  values[thread] = value;
  walt::emulate::wait(warp);
  return values[thread ^ static_cast<unsigned>(offset)];
}

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline float __fmul_rn(float a, float b) { return a * b; }
